"""Models of parts of others: add, split, merge. What they are made of stays as it is."""

import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.errors import UserError
from mlx_hmem.memory import initial_block
from mlx_hmem.model.load import load
from tests.conftest import MEMORY, edit_json, save_anchor
from tests.helpers.banks import blocks_of, flip_block, refused, rewrite, said, write_colleague
from tests.helpers.places import bytes_of


@pytest.fixture
def colleague(model_folder, texts, tmp_path) -> Path:
    return write_colleague(model_folder, texts, tmp_path / "colleague")


def test_only_files_of_the_format_come_along(known, colleague, tmp_path, capsys):
    """A page or a note in a model's folder may name what the new model must not know."""
    out, made = tmp_path / "out", {f for folder in (known, colleague) for f in bytes_of(folder)}
    for folder in (known, colleague):
        for stray in ("bank.html", "notes.txt", "diary.json", "bank/old.txt", "private/a.json"):
            (folder / stray).parent.mkdir(exist_ok=True)
            (folder / stray).write_text("secret")
        (folder / "bank" / "level-1.00000.safetensors.bak").write_text("secret")
    said(capsys, "add", known, colleague, "--name", "notes", "--out", out)
    found = {name.removeprefix("banks/notes/") for name in bytes_of(out)}
    assert found == made


def test_an_added_bank_answers_what_lies_nearer_to_it(known, colleague, texts, tmp_path, capsys):
    before, out = bytes_of(known), tmp_path / "both"
    said(capsys, "block", known, 0, "--view", "guest")
    said(capsys, "add", known, colleague, "--name", "notes", "--out", out)
    both, alone, other = load(out), load(known), load(colleague)
    answered = {both.route(text)[0] for text in texts}
    assert answered == {"", "notes"}
    for text in [texts[0], *texts[20:26]]:
        beginning = text[:120]
        vector = alone.retriever.vector(beginning)
        name, path = both.route(beginning)
        nearness = {}
        for bank, model in (("", alone), ("notes", other)):
            own = model.retriever.tree.route(vector)
            centroid = model.retriever.tree.centroids[-1][own[-1]]
            nearness[bank] = float(centroid @ vector / np.linalg.norm(centroid))
        assert name == max(nearness, key=nearness.get)
        chosen = other if name else alone
        assert path == chosen.retriever.route(beginning)
        answer = "".join(p.text for p in both.stream(beginning, max_tokens=5))
        assert answer == "".join(p.text for p in chosen.stream(beginning, max_tokens=5))
    found = both.fetch(texts[0][:120])
    assert (found.bank, found.to_dict()["bank"]) == ("notes", "notes")
    # A view from before does not see what was added, and nothing was copied or changed.
    assert load(out, view="guest").route(texts[0])[0] == ""
    assert both.route(texts[0], blocked=[("notes",)])[0] == ""
    shard = "level-1.00000.safetensors"
    assert os.path.samefile(colleague / "bank" / shard, out / "banks" / "notes" / "bank" / shard)
    assert "19 blocks are sound, nothing found damaged" in said(capsys, "verify", out)
    del (after := bytes_of(known))["bank/views.json"]
    assert after == before
    assert "a bank of this name is there already: notes" in refused(
        "add", out, colleague, "--name", "notes", "--out", tmp_path / "third"
    )


def test_rows_of_several_banks_and_views_share_a_batch(known, colleague, texts, tmp_path, capsys):
    from mlx_hmem.generation.batch import batch_generate

    out = tmp_path / "both"
    said(capsys, "block", known, 0, "--view", "guest")
    said(capsys, "add", known, colleague, "--name", "notes", "--out", out)
    both = load(out)
    routes = [*texts[:3], *texts[20:24]]
    views = [None, "guest"] * 3 + [None]
    found = batch_generate(
        both, ["The old lighthouse"] * 7, route_texts=routes, views=views, max_tokens=6
    )
    assert {completion.bank for completion in found} == {"", "notes"}
    for completion, text, view in zip(found, routes, views, strict=True):
        alone = both.under(view).stream("The old lighthouse", route_text=text, max_tokens=6)
        assert completion.text == "".join(piece.text for piece in alone)


def test_a_bank_that_does_not_belong_is_refused_in_one_line(known, colleague, tmp_path):
    out = tmp_path / "new"
    edit_json(colleague / "hmem.json", lambda v: v["retriever"].update(encoder_hash="xxh3:other"))
    line = refused("add", known, colleague, "--name", "notes", "--out", out)
    assert "is routed by another encoder" in line
    assert "xxh3:other" in line
    save_anchor(colleague, seed=7)
    own = anchor_hash(colleague)
    edit_json(colleague / "hmem.json", lambda v: v.update(anchor_hash=own))
    edit_json(colleague / "bank" / "bank.json", lambda v: v.update(anchor_hash=own))
    line = refused("add", known, colleague, "--name", "notes", "--out", out)
    assert "was made for another anchor" in line
    assert own in line
    assert "wrong name of a bank: '3'" in refused("add", known, known, "--name", 3, "--out", out)
    assert not list(tmp_path.glob("*new*"))
    # Nor is one that somebody has put there by hand.
    shutil.copytree(colleague, known / "banks" / "notes")
    with pytest.raises(UserError, match="bank notes was made for another anchor"):
        load(known)


@pytest.mark.parametrize("length", [1, 3])
def test_a_subtree_split_off_routes_and_answers_as_it_did(length, known, texts, tmp_path, capsys):
    whole = load(known)
    by_path = {whole.retriever.route(text): text for text in texts}
    leaf = next(iter(by_path))
    path, out = leaf[:length], tmp_path / "part"
    said(capsys, "block", known, ",".join(map(str, leaf)), "--view", "guest")
    before = bytes_of(known)
    said(capsys, "split", known, ",".join(map(str, path)), "--out", out)
    part = load(out)
    for old, text in by_path.items():
        new = part.retriever.route(text)
        assert new[:length] == (0,) * length  # nothing else can be reached
        if old[:length] == path:
            pairs = zip(whole.bank.fetch(old).blocks, part.bank.fetch(new).blocks, strict=True)
            assert all((a is None and b is None) or mx.array_equal(a, b) for a, b in pairs)
    documents = {d.sha256: d for d in read_documents(out / "bank", part.bank.config)}
    for given in read_documents(known / "bank"):
        assert (given.sha256 in documents) == (given.clusters[0][:length] == path)
    guest = [block["level"] for block in load(out, view="guest").fetch(by_path[leaf]).blocks]
    assert guest == [1]
    assert "nothing found damaged" in said(capsys, "verify", out)
    assert bytes_of(known) == before


def test_what_cannot_be_split_is_one_line(known, tmp_path):
    out = tmp_path / "part"
    assert "no such cluster on level 1: 8" in refused("split", known, 8, "--out", out)
    out.mkdir()
    assert "the destination exists" in refused("split", known, 0, "--out", out)


def half(model_folder: Path, target: Path, subtrees: set[int]) -> Path:
    """The model with the blocks of some subtrees trained, the others as they were at first."""
    shutil.copytree(model_folder, target)
    rng = np.random.default_rng(len(subtrees))

    def change(level: int, cluster: int, block: np.ndarray) -> np.ndarray:
        below = MEMORY.num_clusters[level - 1] // MEMORY.branching[0]
        if level == 0 or cluster // below in subtrees:
            return block
        return initial_block(MEMORY, MEMORY.r[level - 1], rng)

    rewrite(target, change, shard_bytes=40_000)
    return target


def test_two_banks_that_trained_other_subtrees_become_one(model_folder, model, tmp_path, capsys):
    first, second = (half(model_folder, tmp_path / str(n), {n, 2 * n}) for n in (0, 1))
    out = tmp_path / "merged"
    said(capsys, "merge", first, second, "--out", out)
    merged, wanted = blocks_of(load(out).bank), blocks_of(model.bank)
    assert all(np.array_equal(merged[key], wanted[key]) for key in wanted)
    shard = "bank/level-1.00000.safetensors"  # of the first subtree alone
    assert os.path.samefile(first / shard, out / shard)
    third = half(model_folder, tmp_path / "third", {0, 1})
    flip_block(third)
    line = refused("merge", first, third, "--out", tmp_path / "no")
    assert "1 blocks were trained in both banks and differ: the first is level 1" in line
    assert not (tmp_path / "no").exists()


def test_of_an_added_bank_on_the_hub_a_shard_comes_when_it_is_needed(
    known, colleague, texts, tmp_path, capsys, hub
):
    said(capsys, "add", known, colleague, "--name", "notes", "--out", tmp_path / "both")
    hub.add("someone/both", tmp_path / "both")
    model, local = load("someone/both", lazy=True), load(tmp_path / "both")
    shards = [name for name in hub.downloads() if name.endswith("00000.safetensors")]
    assert shards == []
    text = next(text[:120] for text in texts if local.route(text[:120])[0] == "notes")
    answer = "".join(piece.text for piece in model.stream(text, max_tokens=5))
    assert answer == "".join(piece.text for piece in local.stream(text, max_tokens=5))
    assert hub.downloads() == ["banks/notes/bank/level-1.00000.safetensors"]
