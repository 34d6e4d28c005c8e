"""A document leaves a memory: its blocks become the bits of blocks that never saw it."""

import json
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.bank.documents import read_documents
from mlx_hmem.bank.format import Manifest
from mlx_hmem.errors import UserError
from mlx_hmem.model.load import load
from tests.helpers.own_documents import remember, sentences, write_documents
from tests.helpers.places import ROOT, bytes_of
from tests.helpers.programs import refused
from tests.remember.test_remember import anchor, eager  # noqa: F401
from train.corpus.own import OwnDocument
from train.data.arrays import save_array
from train.remember import plan
from train.remember.blocks import Trainer, results_of, subtree_folder, subtrees_of
from train.remember.export import open_base, text_of
from train.remember.forget import check_changed
from train.remember.forget import main as forget_program
from train.remember.plan import branching_for
from train.remember.proof import halves
from train.remember.rest import without
from train.remember.run import Settings, begin_run, documents_of, leaves_of

# Where a forgetting is killed: all is trained, and the new model written but for its last file; it
# has just been renamed; its proof is to be taken.
KILLED = """
import os, signal
from pathlib import Path
from mlx_hmem import folders
from train.remember import forget
def kill(*given, **options):
    os.kill(os.getpid(), signal.SIGKILL)
out = Path({arguments!r}[-1])
real = folders.sync_folder
{where}
forget.main({arguments!r})
"""
KILLS = {
    "written": "forget.write_card = kill",
    "renamed": "folders.sync_folder = lambda f: kill() if Path(f) == out.parent else real(f)",
    "whole": "forget.proof = kill",
}


@pytest.fixture(scope="module")
def learned(anchor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    folder = write_documents(tmp_path_factory.mktemp("documents"), 3)
    return remember(folder, anchor, tmp_path_factory.mktemp("m") / "model", "--passes", "4")


def forget(model: Path, out: Path, *documents: str) -> None:
    forget_program([str(model), *documents, "--out", str(out)])


def blocks_of(run: Path) -> dict[str, bytes]:
    return {f.parent.name: f.read_bytes() for f in run.glob("subtrees/*/blocks.safetensors")}


def checksums(model: Path) -> dict[tuple[int, int], str]:
    manifest = Manifest.from_file(model / "bank" / "bank.json")
    return {
        (level.level, shard.first_cluster + i): shard.xxh3[16 * i : 16 * i + 16]
        for level in manifest.all_levels
        for shard in level.shards
        for i in range(shard.num_clusters)
    }


@pytest.fixture(scope="module")
def less(learned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What nobody disturbed in forgetting a document."""
    model = tmp_path_factory.mktemp("less") / "model"
    forget(learned, model, "bread/1.txt")
    return model


def test_a_sentence_is_asked_of_the_leaf_of_its_window(learned):
    """A long document as a whole went to a leaf that had learned none of it, or a part."""
    model, text = load(learned), sentences("boats", 1)
    found = halves(model, OwnDocument("", "a", text))
    decode = partial(model.tokenizer.decode, skip_special_tokens=True)
    begun = [decode(each.first).split()[:4] for each in found]
    inside = [" ".join(words) in each.window for words, each in zip(begun, found, strict=True)]
    assert len({each.window for each in found}) > 4
    assert np.mean(inside) > 0.7  # others begin where one window ends


def test_a_forgotten_block_is_bit_equal_to_one_that_never_saw_the_document(
    learned, tmp_path, capsys
):
    before = bytes_of(learned), bytes_of(Path(f"{learned}.run"))
    known = read_documents(learned / "bank")
    gone = next(d for d in known if d.name == "bread/1.txt")
    forget(learned, tmp_path / "model", "bread/1.txt")
    assert (bytes_of(learned), bytes_of(Path(f"{learned}.run"))) == before
    # One that never saw the document: trained from nothing on the others, given the same tree.
    run, never = Path(f"{learned}.run"), tmp_path / "never"
    base, settings = open_base(str(learned)), Settings.load(run)
    others = [d for d in documents_of(run) if d.sha256 != gone.sha256]
    text, tokenizer = text_of(base, others)
    begin_run(never, settings, others, {})
    whole, _ = text_of(base, documents_of(run))
    _, paths = without(
        whole, leaves_of(run, settings, base.encoder, whole, tokenizer), {gone.sha256}
    )
    save_array(never / "paths.npy", paths)
    Trainer(load_anchor(learned)[0], settings, tokenizer).train(never, text, paths)
    found = blocks_of(Path(f"{tmp_path / 'model'}.run"))
    assert found == blocks_of(never)
    assert found.keys() == {str(n) for n in subtrees_of(paths)}
    # In the bank nothing else has changed, and what it trained has.
    old, new = checksums(learned), checksums(tmp_path / "model")
    changed = {key for key in old if old[key] != new[key]}
    assert changed
    assert changed >= gone.keys
    assert {c for level, c in changed if level == 1} == {c for level, c in gone.keys if level == 1}
    assert [d for d in known if d != gone] == read_documents(tmp_path / "model" / "bank")
    secret = sentences("bread", 1).split(".")[0].encode()
    for folder in (tmp_path / "model", Path(f"{tmp_path / 'model'}.run")):
        assert not any(secret in data for data in bytes_of(folder).values())
    assert "still hold the documents: delete them" in capsys.readouterr().out


def test_of_few_documents_the_model_is_that_which_has_read_the_others_alone(
    anchor,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    """They share one cluster, in as many passes as it needs, which are more without one of them."""
    monkeypatch.setattr(plan, "branching_for", branching_for)
    folder = tmp_path / "notes"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(sentences("boats", number))
    all_of_them = remember(folder, anchor, tmp_path / "all")
    forget(all_of_them, tmp_path / "less", "1.txt")
    (folder / "1.txt").unlink()
    never = remember(folder, anchor, tmp_path / "never")
    runs = [Path(f"{tmp_path / name}.run") for name in ("all", "less", "never")]
    every, less, others = map(blocks_of, runs)
    assert every.keys() == less.keys() == {"0"}
    assert less == others != every
    steps = [results_of(run, [0])[0]["steps"] for run in runs]
    assert steps[1] == steps[2]
    assert checksums(tmp_path / "less") == checksums(never)


@pytest.mark.parametrize("where", KILLS)
def test_a_forgetting_that_was_killed_goes_on_to_the_same_bytes(where, learned, less, tmp_path):
    killed = tmp_path / "killed" / "model"
    arguments = [str(learned), "bread/1.txt", "--out", str(killed)]
    program = KILLED.format(arguments=arguments, where=KILLS[where])
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert killed.exists() == (where != "written")
    assert len([*killed.parent.iterdir()]) == 2  # the run, and what was written
    done = {f: f.stat().st_mtime_ns for f in tmp_path.glob("killed/model.run/subtrees/*/done.json")}
    assert done
    # Another one does not go on with it.
    refused("", forget, learned, killed, "bread/0.txt")
    forget(learned, killed, "bread/1.txt")
    assert all(file.stat().st_mtime_ns == when for file, when in done.items())  # not trained again
    for folder in ("model", "model.run"):
        assert bytes_of(tmp_path / "killed" / folder) == bytes_of(less.with_name(folder))
    assert sorted(p.name for p in killed.parent.iterdir()) == ["model", "model.run"]
    if where == "whole":  # and once more: a kill may come when all is done
        forget(learned, killed, "bread/1.txt")
        assert bytes_of(killed.with_name("model.run")) == bytes_of(less.with_name("model.run"))
        refused("the folder of another run", forget, learned, killed, "bread/0.txt")
        refused("the destination exists", forget, learned, less.parent, "bread/1.txt")


@pytest.mark.parametrize(
    "name", ["paths.npy", "documents.jsonl", "tree.safetensors", "settings.json"]
)
def test_a_bit_that_has_flipped_in_the_run_is_found_before_it_forgets(name, learned, tmp_path):
    """One in paths.npy had another document's blocks trained anew, and was called forgetting."""
    run = Path(shutil.copytree(f"{learned}.run", tmp_path / "run"))
    data = (run / name).read_bytes()
    places = [len(data) // 3, len(data) // 2]
    if name == "paths.npy":
        places = range(128, len(data), 4 * 7)  # of windows in all parts, and of both levels
    elif name == "settings.json":
        places = range(3, len(data), 97)
    elif name == "documents.jsonl":
        places = [data.index(word) + 12 for word in (b'"sha256"', b'"text"', b'"name"', b"xxh3")]
    flipped = [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in places]
    for damaged in (*flipped, b""):  # an empty array ended in a traceback
        (run / name).write_bytes(damaged)
        line = [str(learned), "bread/1.txt", "--run", str(run), "--out", str(tmp_path / "model")]
        refused("", forget_program, line)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_block_that_a_forgotten_document_trained_must_change(learned):
    base = open_base(str(learned))
    changed = next(d for d in base.documents if d.name == "bread/1.txt")
    with pytest.raises(UserError, match=r"a block of bread/1.txt has not changed: level 1"):
        check_changed(base, base.manifest, [changed])


def test_the_report_tells_a_document_that_is_known_from_one_that_is_not(learned, tmp_path, capsys):
    control = write_documents(tmp_path / "control", 1)
    for file in control.rglob("*.txt"):
        file.write_text(sentences(file.parent.name, 77))
    names = ["boats/0.txt", "stars/2.txt"]
    options = ["--out", str(tmp_path / "model"), "--control", str(control)]
    forget_program([str(learned), *names, *options])
    report = json.loads((tmp_path / "model.run" / "forgotten.json").read_text())
    own = report["forgotten"]
    assert len(own["documents"]) == 2
    assert len(report["control"]["documents"]) == 3
    assert own["before"]["loss"] < own["after"]["loss"]
    assert own["before_less_anchor"]["mean"] < own["after_less_anchor"]["mean"]
    assert own["before"]["sentences"] > 20
    assert "forgotten, 2 documents" in capsys.readouterr().out
    assert load(tmp_path / "model").fetch(sentences("boats", 1)).path is not None
    # And from what is left the next one.
    forget(tmp_path / "model", tmp_path / "second", "boats/1.txt")
    assert len(read_documents(tmp_path / "second" / "bank")) == 6


def test_a_model_that_had_a_memory_keeps_it_bit_for_bit(model_folder, tmp_path):
    folder = write_documents(tmp_path / "documents", 2)
    model = remember(folder, model_folder, tmp_path / "model", "--passes", "1")
    forget(model, tmp_path / "less", "bread/0.txt")
    old, new, first = checksums(model_folder), checksums(tmp_path / "less"), checksums(model)
    assert all(new[key] == value for key, value in old.items())
    assert new.keys() == first.keys()
    assert new != first


@pytest.mark.parametrize(
    ("documents", "says"),
    [
        (["nowhere.txt"], "the bank knows no such document: nowhere.txt"),
        (["00000000"], "the bank knows no such document: 00000000"),
    ],
)
def test_a_document_that_was_never_there_is_one_line(learned, tmp_path, documents, says):
    refused(says, forget, learned, tmp_path / "model", *documents)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_another_model_is_refused(learned, anchor, tmp_path):  # noqa: F811
    folder = write_documents(tmp_path / "documents", 1)
    other = remember(folder, anchor, tmp_path / "other", "--passes", "1")
    with pytest.raises(UserError, match="this run did not make the model's clusters"):
        forget_program(
            [str(learned), "bread/1.txt", "--run", f"{other}.run", "--out",
             str(tmp_path / "model")]
        )  # fmt: skip
    with pytest.raises(UserError, match="not the folder of a train remember"):
        forget_program(
            [str(learned), "bread/1.txt", "--run", str(tmp_path), "--out",
             str(tmp_path / "model")]
        )  # fmt: skip
    shutil.rmtree(subtree_folder(Path(f"{other}.run"), 0))
    assert not (tmp_path / "model").exists()
