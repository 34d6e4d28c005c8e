# ruff: noqa: F811 (fixtures of another module)
"""A model follows its folder: what has changed is learned, what is gone is forgotten, and the bytes
are those of remembering the folder anew in the same clusters."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_hmem.bank.documents import read_documents
from mlx_hmem.bank_tools.command import main as bank_program
from mlx_hmem.model.load import load
from tests.helpers.faults import stop_at
from tests.helpers.own_documents import remember, sentences, write_documents
from tests.helpers.places import ROOT, bytes_of
from tests.helpers.programs import refused
from tests.remember.test_remember import anchor, eager  # noqa: F401
from train.remember.forget import main as forget_program
from train.remember.sync import folder as folder_module
from train.remember.sync import remembering
from train.remember.sync.listed import CHECKED
from train.stages import alone
from train.step.memories import MemoryTrainee

PASSES = ("--passes", "2")
NEW = "The lighthouse of document 70 has 91 lamps. The lamps of document 70 were made in 1903."
SECRET = "The cellar of document 71 has 44 casks. The casks of document 71 were made in 1871."


@pytest.fixture(scope="module")
def first(anchor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of twelve documents in ``notes`` and what was remembered of it in ``model``."""
    folder = tmp_path_factory.mktemp("first")
    write_documents(folder / "notes", 4)
    (folder / "notes" / "secret.txt").write_text(SECRET)
    (folder / "notes" / "stars" / "3.txt").unlink()
    remember(folder / "notes", anchor, folder / "model", *PASSES)
    return folder


@pytest.fixture
def life(first: Path, tmp_path: Path) -> Path:
    """A copy of it in which a year has passed."""
    return live(shutil.copytree(first, tmp_path / "life"))


def live(folder: Path) -> Path:
    """Two documents are edited, one is deleted, one renamed, and two come."""
    notes = folder / "notes"
    (notes / "boats" / "0.txt").write_text(sentences("boats", 0) + " The keel is of oak.")
    (notes / "bread" / "1.txt").write_text(sentences("bread", 9))
    (notes / "secret.txt").unlink()
    (notes / "stars" / "2.txt").rename(notes / "stars" / "second.txt")
    (notes / "new.txt").write_text(NEW)
    (notes / "boats" / "7.txt").write_text(sentences("boats", 7))
    return folder


def update(folder: Path, model: Path, *options: str) -> Path:
    return remember(folder / "notes", model, folder / "model", *options)


def anew(folder: Path, model: Path, out: Path) -> Path:
    """The folder is remembered from nothing in the clusters of its model."""
    old, run = folder / "model.run", out.with_name(f"{out.name}.run")
    run.mkdir(parents=True)
    for name in ("documents.jsonl", "tree.safetensors", "paths.npy", "settings.json"):
        shutil.copyfile(old / name, run / name)
    return remember(folder / "notes", model, out)


def same_model(folder: Path, out: Path) -> bool:
    """Whether model and run are, byte for byte, those of another folder."""
    parts = ((folder / "model", out), (folder / "model.run", out.with_name(f"{out.name}.run")))
    return all(but_times(one) == but_times(other) for one, other in parts)


def but_times(folder: Path) -> dict[str, bytes]:
    """The files, without what was noted of their times."""
    return {name: data for name, data in bytes_of(folder).items() if CHECKED not in name}


@pytest.fixture(scope="module")
def undisturbed(first: Path, anchor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an update comes to that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed") / "life"
    live(Path(shutil.copytree(first, folder)))
    update(folder, anchor)
    return folder


def test_a_year_in_the_life_of_a_folder(life, anchor, tmp_path, capsys):
    before = load(life / "model")
    assert "secret.txt" in before.fetch("How many casks has the cellar?").documents
    capsys.readouterr()
    update(life, anchor)
    printed = capsys.readouterr().out
    assert "2 added, 2 changed, 1 renamed, 1 gone, 8 unchanged" in printed
    assert "  gone          secret.txt\n" in printed
    assert "  renamed       stars/2.txt → stars/second.txt\n" in printed
    known = {d.name for d in read_documents(life / "model" / "bank")}
    files = [file for file in (life / "notes").rglob("*") if file.is_file()]
    assert known == {file.relative_to(life / "notes").as_posix() for file in files}
    after = load(life / "model")
    assert "new.txt" in after.fetch("How many lamps has the lighthouse?").documents
    assert after.fetch("How many casks has the cellar?").why
    # The old text is in no file of either folder.
    for secret in (SECRET.split(".")[0], sentences("bread", 1).split(".")[0]):
        for place in ("model", "model.run"):
            assert not any(secret.encode() in data for data in bytes_of(life / place).values())
    assert same_model(life, anew(life, anchor, tmp_path / "anew"))
    # And once more, on what an update has made.
    (life / "notes" / "new.txt").write_text(NEW.replace("91", "92"))
    (life / "notes" / "boats" / "1.txt").unlink()
    update(life, anchor)
    assert same_model(life, anew(life, anchor, tmp_path / "again"))
    assert sorted(path.name for path in life.iterdir()) == ["model", "model.run", "notes"]
    assert not any(path.name == "next" for path in (life / "model.run").iterdir())


def test_a_model_among_the_notes_is_none_of_them(first, anchor, tmp_path, capsys):
    """``remember . --out model`` learned its own run, and what was deleted from there."""
    notes = Path(shutil.copytree(first / "notes", tmp_path / "notes"))
    for name in ("model", "model.run"):
        shutil.copytree(first / name, notes / name)
    capsys.readouterr()
    remember(notes, anchor, notes / "model")
    assert "up to date" in capsys.readouterr().out
    (notes / "secret.txt").unlink()
    remember(notes, anchor, notes / "model", "--dry-run")
    assert "1 gone, 11 unchanged" in capsys.readouterr().out


def test_what_is_passed_over_is_named_of_an_unchanged_folder_too(first, anchor, tmp_path, capsys):
    """The first time had named it, and no other."""
    folder = Path(shutil.copytree(first, tmp_path / "copy"))
    (folder / "notes" / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    capsys.readouterr()
    update(folder, anchor, "--passed-over")
    printed = capsys.readouterr()
    assert "up to date" in printed.out
    assert "passed over photo.jpg: *.jpg" in printed.err


def test_only_the_clusters_that_a_change_touches_are_trained(life, anchor):
    old = {f: f.stat().st_ino for f in (life / "model.run").glob("subtrees/*/blocks.safetensors")}
    shutil.rmtree(life / "notes")
    write_documents(life / "notes", 4)
    (life / "notes" / "stars" / "3.txt").unlink()
    (life / "notes" / "secret.txt").write_text(SECRET.replace("44", "45"))
    update(life, anchor)
    new = {f: f.stat().st_ino for f in (life / "model.run").glob("subtrees/*/blocks.safetensors")}
    assert new.keys() == old.keys()
    assert sum(new[file] != old[file] for file in new) == 1
    assert same_model(life, anew(life, anchor, life / "anew"))


def test_nothing_changed_is_said_and_nothing_written(anchor, undisturbed, capsys, monkeypatch):
    update(undisturbed, anchor)
    assert "up to date" in capsys.readouterr().out
    before = {f: f.stat().st_mtime_ns for f in undisturbed.rglob("*") if f.name != "lock"}
    os.utime(undisturbed / "notes" / "new.txt", (0, 0))  # another time, the same text
    update(undisturbed, anchor)
    assert "up to date" in capsys.readouterr().out
    changed = {f.name for f, when in before.items() if f.stat().st_mtime_ns != when}
    assert changed == {"settings.json", CHECKED, "new.txt", "model.run"}
    monkeypatch.setattr(remembering, "open_base", None)  # it is not even asked for
    update(undisturbed, anchor)
    assert "up to date" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_changes_nothing(life, anchor, tmp_path, capsys):
    before = bytes_of(life)
    update(life, anchor, "--dry-run")
    assert "2 added, 2 changed, 1 renamed, 1 gone" in capsys.readouterr().out
    assert bytes_of(life) == before
    remember(life / "notes", anchor, tmp_path / "not" / "new", "--dry-run")
    assert "documents       13, from" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["life"]


def test_views_and_other_banks_of_the_model_stay(first, model_folder, tmp_path):
    folder = Path(shutil.copytree(first / "notes", tmp_path / "notes")).parent
    update(folder, model_folder, "--passes", "1")
    bank_program(["block", str(folder / "model"), "3", "--view", "guest"])
    live(folder)
    update(folder, model_folder)
    assert load(folder / "model", view="guest").bank.bars(1, 3)
    assert same_blocks(folder / "model", anew(folder, model_folder, tmp_path / "anew"))


def same_blocks(one: Path, other: Path) -> bool:
    found, wanted = (
        {name: data for name, data in bytes_of(folder).items() if "views" not in name}
        for folder in (one, other)
    )
    return found == wanted


def test_a_stopped_update_goes_on_to_the_same_bytes(life, anchor, undisturbed, monkeypatch):
    before = bytes_of(life / "model")
    stop_at(monkeypatch, MemoryTrainee, "step", 8, 20)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            update(life, anchor)
        assert bytes_of(life / "model") == before
    update(life, anchor)
    assert same_but_times(life, undisturbed)


def same_but_times(one: Path, other: Path) -> bool:
    """Whether models and runs are the same but for the times of the files that were read."""
    found, wanted = (
        {n: data for n, data in but_times(folder).items() if n != "model.run/settings.json"}
        for folder in (one, other)
    )
    return found == wanted


# Where an update is killed while one takes the other's place.
KILLED = """
import os, signal
from tests.remember.conftest import several
from train.remember import command, plan
from train.remember.sync import renewal, swap
plan.branching_for = renewal.branching_for = several
def kill(*given, **options):
    os.kill(os.getpid(), signal.SIGKILL)
def after(function):
    def wrapped(*given):
        result = function(*given)
        kill()
    return wrapped
{where}
command.main({arguments!r})
"""
KILLS = {
    "before it is made": "swap.folder_locked = kill",
    "made": "swap.exchange = kill",
    "between the two": "swap.exchange = lambda *given: False\nreal = os.rename\n"
    "os.rename = lambda a, b: kill() if str(a).endswith('.next') else real(a, b)",
    "exchanged": "swap.exchange = after(swap.exchange)",
    "in the run": "swap.link_or_copy = after(swap.link_or_copy)",
    "at the end": "swap.sync_folder = lambda f: kill() if str(f).endswith('.run') else None",
    "all but gone": "os.rename = after(os.rename)",
}


@pytest.mark.parametrize("where", KILLS)
def test_an_update_that_was_killed_goes_on_to_the_same_bytes(
    where, life, anchor, undisturbed, first
):
    arguments = [str(life / "notes"), "--model", str(anchor), "--out", str(life / "model")]
    program = KILLED.format(arguments=arguments, where=KILLS[where])
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    if where != "between the two":  # one of both, whole
        found = bytes_of(life / "model")
        assert found in (bytes_of(first / "model"), bytes_of(undisturbed / "model"))
    update(life, anchor)
    assert same_but_times(life, undisturbed)
    assert sorted(path.name for path in life.iterdir()) == ["model", "model.run", "notes"]


def test_a_tree_that_no_longer_fits_is_said_and_another_made(life, anchor, tmp_path, capsys):
    write_documents(life / "notes" / "more", 12)
    bank_program(["block", str(life / "model"), "3", "--view", "guest"])  # a new tree loses it
    update(life, anchor, "--dry-run")
    printed = capsys.readouterr().out
    assert "it no longer fits: " in printed
    assert "--new-tree" in printed
    update(life, anchor, "--new-tree", *PASSES)
    assert "no longer" not in capsys.readouterr().out
    remember(life / "notes", anchor, tmp_path / "other", *PASSES)
    assert same_model(life, tmp_path / "other")
    update(life, anchor)
    assert "up to date" in capsys.readouterr().out


def test_a_first_note_that_becomes_several_gets_a_tree_of_them(anchor, tmp_path, capsys):
    """All of them went to the one leaf of the first, and the model knew less of each."""
    life = tmp_path / "life"
    (life / "notes").mkdir(parents=True)
    for number, topic in enumerate(["bread", "boats"]):
        (life / "notes" / f"{number}.txt").write_text(sentences(topic, number)[:80])
        update(life, anchor, *PASSES)
        said = capsys.readouterr().out
        assert ("another tree: 2 windows lie in 1 of its" in said) == (number == 1)
    remember(life / "notes", anchor, tmp_path / "other", *PASSES)
    assert same_model(life, tmp_path / "other")


def test_several_folders_are_named_by_theirs(life, anchor, tmp_path):
    more = write_documents(tmp_path / "letters", 1)
    words = [str(life / "notes"), str(more), "--model", str(anchor), "--out", str(life / "model")]
    from train.remember.command import main

    main(words)
    known = {d.name for d in read_documents(life / "model" / "bank")}
    assert {"notes/new.txt", "notes/boats/7.txt"} <= known
    assert not {name for name in known if name.partition("/")[0] not in ("notes", "letters")}
    other = tmp_path / "other" / "notes"
    other.mkdir(parents=True)
    refused("two folders have the same name: notes", main, [*words[:2], str(other), *words[2:]])


def test_bad_folders_and_models_are_one_line_and_the_model_stays(
    life, anchor, model_folder, tmp_path, monkeypatch
):
    before = bytes_of(life)
    refused("was made from another model", update, life, model_folder)
    other = remember(write_documents(tmp_path / "o", 1), anchor, tmp_path / "m", *PASSES)
    words = ("--run", f"{other}.run")
    refused("this run did not make the model's clusters", update, life, anchor, *words)
    real = folder_module.read_folder

    def changing(files, *given):
        found = real(files, *given)
        files[0].path.write_text("another text")
        return found

    monkeypatch.setattr(folder_module, "read_folder", changing)
    text = (life / "notes" / "boats" / "0.txt").read_text()
    refused("a file changed while it was read: boats/0.txt", update, life, anchor)
    (life / "notes" / "boats" / "0.txt").write_text(text)

    def vanishing(files, *given):
        (life / "notes").rename(life / "elsewhere")
        return real(files, *given)

    monkeypatch.setattr(folder_module, "read_folder", vanishing)
    refused("a file changed while it was read", update, life, anchor)
    refused("no such file or folder", update, life, anchor)
    (life / "notes").mkdir()  # a disk that is not there: not all is gone
    refused("a folder without text", update, life, anchor)
    (life / "notes").rmdir()
    (life / "elsewhere").rename(life / "notes")
    assert bytes_of(life) == before


def test_who_forgets_finds_run_and_model_of_one_time(life, anchor, tmp_path):
    """An update was killed when the model was there, and its run was still the old one."""
    arguments = [str(life / "notes"), "--model", str(anchor), "--out", str(life / "model")]
    program = KILLED.format(arguments=arguments, where=KILLS["exchanged"])
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True).returncode
    forget_program([str(life / "model"), "new.txt", "--out", str(tmp_path / "less")])
    assert "new.txt" not in {d.name for d in read_documents(tmp_path / "less" / "bank")}
    assert not (life / "model.run" / "next").exists()


def test_what_is_gone_is_found_by_no_stranger(undisturbed, tmp_path, capsys):
    for name, text in {"secret.txt": SECRET, "1.txt": sentences("bread", 1)}.items():
        (tmp_path / name).write_text(text)
    capsys.readouterr()
    words = [str(undisturbed / "model"), str(tmp_path), "--check"]
    with pytest.raises(SystemExit) as end:
        forget_program(words)
    assert "nothing is found of 2 documents" in capsys.readouterr().out
    assert end.value.code == 0


def test_two_updates_at_once_are_one_too_many(life, anchor):
    before = bytes_of(life)
    with alone("train remember", life / "model.run"):
        refused("running in another process", update, life, anchor)
    assert bytes_of(life) == before
