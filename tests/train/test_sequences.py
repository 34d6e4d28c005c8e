import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece as spm

from mlx_hmem.evaluate.texts import records
from train.corpus.stage import run_corpus
from train.data.arrays import save_array
from train.data.sequences import pack_anchor, pack_by_leaf, run_anchor_sequences
from train.data.tokenizer import EOT_ID, load_tokenizer, train_tokenizer
from train.data.windows import Windows, cut_windows, load_windows, run_windows
from train.ranks import ALONE
from train.recipe.recipe import CorpusSection, Recipe, TokenizerSection, TreeSection, WindowsSection
from train.tree import stage as tree
from train.tree.stage import distinct, encode_windows

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


def save_windows(windows: Windows, folder: Path) -> None:
    save_array(folder / "tokens.npy", windows.tokens)
    save_array(folder / "offsets.npy", windows.offsets)


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


@pytest.mark.parametrize("size", [1, 50, 999, 1 << 20])
def test_windows_cut_in_shards_are_those_cut_at_once(run, windows, monkeypatch, size):
    # others would not know the size
    monkeypatch.setattr("train.corpus.shards.num_cores", lambda: 1)
    monkeypatch.setattr("train.data.windows.SHARD_BYTES", size)
    (run / "corpus").mkdir(exist_ok=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[: 9 if size == 1 else None])
    (run / "corpus" / "train.jsonl").write_text(lines)
    run_windows(Recipe(name="t", windows=WindowsSection(CONTEXT)), run)
    found = load_windows(run)
    assert np.array_equal(found.tokens, windows.tokens[: len(found.tokens)])
    assert np.array_equal(found.offsets, windows.offsets[: len(found.offsets)])
    assert size == 1 or len(found) == len(windows)


def test_saved_windows_come_back_and_anchor_rows_teach_each_token_once(windows, tmp_path):
    save_windows(windows, tmp_path)
    again = Windows.load(tmp_path)
    assert np.array_equal(again.tokens, windows.tokens)
    assert np.array_equal(again.offsets, windows.offsets)
    rows = pack_anchor(windows, CONTEXT, 0, tmp_path / "tokens.npy")
    assert rows.shape[1] == CONTEXT + 1
    assert rows.dtype == np.uint16
    check_each_token_is_a_target_once(rows, [windows.tokens])


@pytest.mark.parametrize("decompose", [False, True])
def test_the_anchor_does_not_read_what_is_stated_too_seldom(tmp_path, decompose):
    facts = {"kind": "invented", "topics": 2, "entities_per_topic": 8, "frequencies": [1, 2, 4, 8],
             "plain_documents": 10}  # fmt: skip
    recipe = Recipe(
        name="t",
        corpus=CorpusSection(documents=0, facts=(facts,), anchor_times=4),
        tokenizer=TokenizerSection(vocab_size=400),
        windows=WindowsSection(CONTEXT, decompose=decompose),
    )
    run_corpus(recipe, tmp_path)
    texts = list(records(tmp_path / "corpus" / "train.jsonl"))
    train_tokenizer(texts, 400, tmp_path / "tokenizer")
    run_windows(recipe, tmp_path)
    run_anchor_sequences(recipe, tmp_path)
    stated = [json.loads(line) for line in (tmp_path / "corpus" / "facts.jsonl").open()]
    rare = {f["prompt"] for f in stated if f["times"] < 4}
    assert rare
    kept = [text for text in texts if not any(prompt in text for prompt in rare)]
    read = cut_windows(kept, load_tokenizer(tmp_path), CONTEXT)
    of_anchor = sorted((tmp_path / "anchor-sequences").glob("tokens*.npy"))
    targets = np.concatenate([np.load(file)[:, 1:].ravel() for file in of_anchor])
    assert sorted(targets[targets != EOT_ID]) == sorted(read.tokens[read.tokens != EOT_ID])
    assert len(kept) < len(texts)
    assert len(load_windows(tmp_path)) == len(cut_windows(texts, load_tokenizer(tmp_path), CONTEXT))


@pytest.mark.parametrize("at_once", [1, 7, 4096])
def test_leaf_rows_hold_one_leaf_and_teach_each_token_once(windows, tmp_path, monkeypatch, at_once):
    monkeypatch.setattr("train.data.sequences.ROWS", at_once)
    paths = made_up_paths(len(windows))
    rows, row_paths = pack_by_leaf(windows, paths, CONTEXT, 0, tmp_path / "tokens.npy")
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


def test_the_order_follows_from_the_seed_and_not_from_how_much_is_packed_at_once(
    windows, tmp_path, monkeypatch
):
    paths = made_up_paths(len(windows))
    files = iter(tmp_path / f"{number}.npy" for number in range(9))
    rows, by_leaf = [], []
    for seed, at_once in [(3, 4096), (3, 5), (4, 4096)]:
        monkeypatch.setattr("train.data.sequences.ROWS", at_once)
        rows.append(pack_anchor(windows, CONTEXT, seed, next(files)))
        by_leaf.append(pack_by_leaf(windows, paths, CONTEXT, seed, next(files)))
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    first, again, _ = by_leaf
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


@pytest.fixture
def stage(run, windows, monkeypatch):
    """The run with its windows, no vectors yet, and an encoder of letters."""
    monkeypatch.setattr("train.tree.stage.CHUNK", 50)
    # In this process: the others would know neither the encoder nor the shorter chunks.
    monkeypatch.setattr("train.corpus.shards.num_cores", lambda: 1)
    tree._encoder.cache_clear()
    save_windows(windows, run / "windows")
    shutil.rmtree(run / "tree", ignore_errors=True)
    yield monkeypatch
    tree._encoder.cache_clear()


def test_encoding_goes_on_where_it_was_stopped(run, windows, stage):
    stopping, rest = LetterEncoder(most_calls=2), LetterEncoder()
    stage.setattr(tree, "load_encoder", lambda name: stopping)
    with pytest.raises(KeyboardInterrupt):
        encode_windows(run, "letters", ALONE)
    tree._encoder.cache_clear()
    stage.setattr(tree, "load_encoder", lambda name: rest)
    vectors, fingerprint = encode_windows(run, "letters", ALONE)
    assert 1000 - rest.calls_left == -(-len(windows) // 50) - 2
    whole = LetterEncoder().encode(list(windows.texts(load_tokenizer(run))))
    assert np.array_equal(vectors, whole.astype(np.float16))
    assert fingerprint == "letters"


def test_vectors_of_another_encoder_are_not_gone_on_with(run, stage):
    for name in ("letters", "others"):
        encoder = LetterEncoder()
        encoder.fingerprint = name
        tree._encoder.cache_clear()
        stage.setattr(tree, "load_encoder", lambda _, encoder=encoder: encoder)
        encode_windows(run, name, ALONE)
        assert encoder.calls_left < 1000


def test_equal_vectors_count_once():
    vectors = np.random.default_rng(0).random((9, 4)).astype(np.float16)
    vectors[[5, 7]] = vectors[[2, 0]]
    assert distinct(vectors).tolist() == [0, 1, 2, 3, 4, 6, 8]


@pytest.mark.parametrize("prompts", [0, 3])
def test_the_tree_stage_routes_every_window(prompts, run, windows, stage, capsys):
    stage.setattr(tree, "load_encoder", lambda name: LetterEncoder())
    stage.setattr(tree, "ROUTED", 70)
    recipe = Recipe(name="t", tree=TreeSection(branching=(3, 2), prompts=prompts))
    tree.run_tree(recipe, run)
    paths = np.load(run / "tree" / "paths.npy")
    assert paths.shape == (len(windows), 2)
    assert (paths[:, 1] // 2 == paths[:, 0]).all()
    vectors = np.load(run / "tree" / "vectors.npy")
    fitted = tree.ClusterTree.load(run / "tree" / "tree.safetensors")
    assert np.array_equal(fitted.route_batch(vectors), paths)
    assert "empty" in capsys.readouterr().out
    assert {path.name for path in (run / "tree").iterdir()} == {
        "vectors.npy", "tree.safetensors", "paths.npy",
    }  # fmt: skip
    # Mapped and in half precision, of some rows: the tree of these rows in memory.
    rows = distinct(vectors)
    again = tree.ClusterTree.fit(vectors[rows].astype(np.float32), (3, 2), seed=0)
    for a, b in zip(again.centroids, fitted.centroids, strict=True):
        assert np.array_equal(a, b) == (prompts == 0)
