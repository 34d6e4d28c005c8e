from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from train.recipe import Recipe, TreeSection
from train.sequences import pack_anchor, pack_by_leaf
from train.tokenizer import EOT_ID, load_tokenizer, train_tokenizer
from train.tree import encode_windows
from train.windows import Windows, cut_windows

CONTEXT = 16
TEXTS = [
    f"Town {i} lies on river {i % 7}.\nIt has {i * 37} people" + " and more" * (i % 30)
    for i in range(120)
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer(TEXTS, 320, folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def processor(run: Path) -> spm.SentencePieceProcessor:
    return load_tokenizer(run)


@pytest.fixture(scope="module")
def windows(processor: spm.SentencePieceProcessor) -> Windows:
    return cut_windows(TEXTS, processor, CONTEXT)


def made_up_paths(count: int) -> np.ndarray:
    leaves = np.random.default_rng(0).integers(0, 12, count)
    return np.stack([leaves // 4, leaves], axis=1).astype(np.int32)


def check_each_token_is_a_target_once(rows: np.ndarray, members: list[np.ndarray]) -> None:
    """The first EOT has nothing before it; padding adds at most one after the last token."""
    counted = (rows[:, :-1] != EOT_ID) | (rows[:, 1:] != EOT_ID)
    targets, wanted = rows[:, 1:][counted], np.concatenate(members)
    assert sorted(targets[targets != EOT_ID]) == sorted(wanted[wanted != EOT_ID])
    assert np.sum(targets == EOT_ID) - np.sum(wanted == EOT_ID) in (-1, 0)


def test_windows_begin_with_end_of_text_fit_and_hold_the_whole_document(processor, windows):
    assert windows.tokens.dtype == np.uint16
    parts = [windows[i] for i in range(len(windows))]
    assert all(len(p) <= CONTEXT and p[0] == EOT_ID and EOT_ID not in p[1:] for p in parts)
    joined = np.concatenate([p[1:] for p in parts]).tolist()
    assert joined == [i for text in TEXTS for i in processor.encode(text)]
    assert min(len(p) for p in parts) > CONTEXT // 2  # an even cut leaves no crumbs


def test_windows_of_a_document_that_fits_are_its_text(processor):
    windows = cut_windows(["Town 1", "", "river\n2"], processor, CONTEXT)
    assert list(windows.texts(processor)) == ["Town 1", "river\n2"]
    assert list(windows.texts(processor, first=1)) == ["river\n2"]


def test_saved_windows_come_back(windows, tmp_path):
    windows.save(tmp_path)
    again = Windows.load(tmp_path)
    assert np.array_equal(again.tokens, windows.tokens)
    assert np.array_equal(again.offsets, windows.offsets)


def test_anchor_rows_teach_each_token_once(windows):
    rows = pack_anchor(windows, CONTEXT, seed=0)
    assert rows.shape[1] == CONTEXT + 1
    assert rows.dtype == np.uint16
    check_each_token_is_a_target_once(rows, [windows.tokens])


def test_leaf_rows_hold_one_leaf_and_teach_each_token_once(windows):
    paths = made_up_paths(len(windows))
    rows, row_paths = pack_by_leaf(windows, paths, CONTEXT, seed=0)
    assert rows.dtype == np.uint16
    assert row_paths.dtype == np.int32
    assert row_paths.shape == (len(rows), 2)
    for leaf in range(12):
        members = [windows[i] for i in np.flatnonzero(paths[:, 1] == leaf)]
        of_leaf = row_paths[:, 1] == leaf
        assert (row_paths[of_leaf, 0] == leaf // 4).all()
        check_each_token_is_a_target_once(rows[of_leaf], members)
    # Leaves are mixed over the whole.
    assert len(np.unique(row_paths[: len(rows) // 4, 1])) > 6


def test_the_order_follows_from_the_seed(windows):
    paths = made_up_paths(len(windows))
    assert np.array_equal(pack_anchor(windows, CONTEXT, 3), pack_anchor(windows, CONTEXT, 3))
    assert not np.array_equal(pack_anchor(windows, CONTEXT, 3), pack_anchor(windows, CONTEXT, 4))
    first, again = (pack_by_leaf(windows, paths, CONTEXT, 3) for _ in range(2))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])


class LetterEncoder:
    """Letter frequencies as a vector; stops like Ctrl-C after some calls."""

    name, dim, fingerprint = "letters", 26, "letters"

    def __init__(self, most_calls: int = 1000):
        self.calls_left = most_calls

    def encode(self, texts, progress=False):
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyboardInterrupt
        counts = np.array([[t.count(c) for c in "abcdefghijklmnopqrstuvwxyz"] for t in texts])
        return (counts / (np.linalg.norm(counts, axis=1, keepdims=True) + 1e-9)).astype(np.float32)


def test_encoding_goes_on_where_it_was_stopped(run, windows, monkeypatch):
    monkeypatch.setattr("train.tree.CHUNK", 50)
    (run / "tree").mkdir(exist_ok=True)
    with pytest.raises(KeyboardInterrupt):
        encode_windows(windows, run, LetterEncoder(most_calls=2))
    rest = LetterEncoder()
    vectors = encode_windows(windows, run, rest)
    assert 1000 - rest.calls_left == -(-len(windows) // 50) - 2
    whole = LetterEncoder().encode(list(windows.texts(load_tokenizer(run))))
    assert np.array_equal(vectors, whole.astype(np.float16))


def test_the_tree_stage_routes_every_window(run, windows, monkeypatch, capsys):
    from train import tree

    monkeypatch.setattr(tree, "load_encoder", lambda name: LetterEncoder())
    windows.save(run / "windows")
    recipe = Recipe(name="t", tree=TreeSection(branching=(3, 2)))
    tree.run_tree(recipe, run)
    paths = np.load(run / "tree" / "paths.npy")
    assert paths.shape == (len(windows), 2)
    assert (paths[:, 1] // 2 == paths[:, 0]).all()
    vectors = np.load(run / "tree" / "vectors.npy").astype(np.float32)
    fitted = tree.ClusterTree.load(run / "tree" / "tree.safetensors")
    assert np.array_equal(fitted.route_batch(vectors), paths)
    assert "empty" in capsys.readouterr().out
