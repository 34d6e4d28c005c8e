"""A folder that is made: whole or not there, gone on with, never over another's."""

import fcntl
import json
import os
import random
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from benchmarks.kills.cases import cases
from benchmarks.kills.conversions import run_case
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from mlx_hmem.folders import RECORD, identity_of, lies_in, locked, whole_folder
from tests.helpers.programs import refused

ONE, TWO = {"sources": {}, "what": 1}, {"sources": {}, "what": 2}


def write(
    out: Path, identity: dict | None, names: str, stop: str = "", replace: bool = False
) -> list[str]:
    """Writes files of one letter, skipping those that are there; returns the ones written."""
    written = []
    with whole_folder(out, identity, replace=replace, need_bytes=100) as part:
        for name in names:
            if name == stop:
                raise KeyboardInterrupt
            if not (part / name).exists():
                write_atomic(part / name, f"{name} {identity and identity['what']}")
                written.append(name)
    return written


def test_what_was_stopped_is_gone_on_with_and_then_appears(tmp_path):
    out, part = tmp_path / "deep" / "out", tmp_path / "deep" / "out.part"
    with pytest.raises(KeyboardInterrupt):
        write(out, ONE, "abc", stop="c")
    assert not out.exists()
    assert {f.name for f in part.iterdir()} == {"a", "b", RECORD}
    (part / ".c.part").write_text("half")  # as a kill leaves it
    assert write(out, ONE, "abc") == ["c"]
    assert {f.name for f in out.iterdir()} == {"a", "b", "c"}
    assert not part.exists()


def test_what_another_conversion_has_left_is_made_anew(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write(out, ONE, "abc", stop="c")
    assert write(out, TWO, "ab") == ["a", "b"]
    assert (out / "a").read_text() == "a 2"
    assert not (out / "c").exists()


def test_the_same_sources_and_options_are_the_same_conversion(tmp_path):
    file = tmp_path / "file"
    file.write_text("one")
    first = identity_of([file], dtype="F16")
    assert identity_of([file], dtype="F16") == first
    assert identity_of([file], dtype="F32") != first
    os.utime(file, ns=(1, 1))
    assert identity_of([file], dtype="F16") != first


def test_a_destination_that_exists_is_replaced_only_when_told(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    refused(r"exists: .*out; choose another or add --overwrite", write, out, ONE, "a")
    assert not (tmp_path / "out.part").exists()
    with pytest.raises(KeyboardInterrupt):
        write(out, ONE, "ab", stop="b", replace=True)
    assert (out / "config.json").read_text() == "old"
    assert write(out, ONE, "ab", replace=True) == ["b"]
    assert {f.name for f in out.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: (p.mkdir(), (p / "letters.txt").write_text("dear")), "holds no model"),
        (lambda p: p.write_text("a file"), "not a folder"),
        (lambda p: p.symlink_to(p.parent), "not a folder"),
    ],
)
def test_nothing_but_a_model_is_ever_overwritten(tmp_path, make, words):
    out = tmp_path / "out"
    make(out)
    refused(words, write, out, ONE, "a", replace=True)
    assert out.exists()
    assert not (tmp_path / "out.part").exists()


def test_the_source_is_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(UserError, match="the source lies in the destination"):
        write(out, identity_of([out / "config.json"], what=1), "a", replace=True)
    assert (out / "config.json").exists()


def test_a_folder_that_no_conversion_made_is_not_deleted(tmp_path):
    part = tmp_path / "out.part"
    part.mkdir()
    (part / "letters.txt").write_text("dear")
    refused("something else lies in the way", write, tmp_path / "out", ONE, "a")
    assert (part / "letters.txt").exists()


def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 901, 99))
    with pytest.raises(UserError, match="no room on the disk: 100 bytes are needed, 99 are free"):
        write(tmp_path / "out", ONE, "a")
    assert not list(tmp_path.iterdir())


def test_two_conversions_do_not_write_into_one_folder(tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    part.mkdir()
    handle = os.open(part, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    refused("another program writes here", write, out, ONE, "a")
    os.close(handle)
    assert write(out, ONE, "a") == ["a"]


@pytest.mark.parametrize("step", ["before the old moves away", "before the new", "before tidying"])
def test_a_kill_in_the_last_step_is_made_up_for(tmp_path, monkeypatch, step):
    """Each of the renames at the end is the last thing that happens."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    out.mkdir()
    (out / "config.json").write_text("old")
    calls, rename, rmtree = [], os.rename, shutil.rmtree
    stop = ["before the old moves away", "before the new", "before tidying"].index(step)

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) > stop:
            raise KeyboardInterrupt
        return rename(*args) if len(calls) <= 2 else rmtree(*args, **kwargs)

    monkeypatch.setattr(os, "rename", counted)
    monkeypatch.setattr(shutil, "rmtree", counted)
    with pytest.raises(KeyboardInterrupt):
        write(out, ONE, "ab", replace=True)
    monkeypatch.undo()
    assert (out.exists(), part.exists()) == [(True, True), (False, True), (True, False)][stop]
    assert write(out, ONE, "ab", replace=True) == []
    assert {f.name for f in out.iterdir()} == {"a", "b"}
    assert not part.exists()


def test_what_does_not_go_on_begins_anew_and_leaves_nothing_where_it_fails(tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.part"
    with pytest.raises(KeyboardInterrupt):
        write(out, None, "ab", stop="b")
    assert not list(tmp_path.iterdir())
    write_atomic(part / "a", "of a run that was killed")
    write_atomic(part / RECORD, "{}")
    assert write(out, None, "ab") == ["a", "b"]
    assert {f.name for f in out.iterdir()} == {"a", "b"}
    refused(r"exists: .*out; choose another$", write, out, None, "a")


def test_a_folder_inside_another_is_seen_by_whatever_name(tmp_path, monkeypatch):
    """On macOS `Model` and `model` are one folder: text or pages for one person would land in what
    is passed on, and a source be overwritten."""
    model, other = tmp_path / "model", tmp_path / "Model"
    assert lies_in(model / "run", model)
    assert lies_in(model, model)
    assert not lies_in(tmp_path / "model.run", model)
    assert lies_in(other / "run", model)  # neither is there yet
    assert lies_in(tmp_path / "cafe\u0301" / "run", tmp_path / "CAF\u00c9")
    model.mkdir()
    (tmp_path / "link").symlink_to(model)
    assert lies_in(tmp_path / "link" / "run", model)
    other.mkdir(exist_ok=True)
    assert lies_in(other / "run", model) is other.samefile(model)
    monkeypatch.setattr(Path, "samefile", lambda self, path: self.name.lower() == "model")
    assert lies_in(other / "run", model)


def test_a_lock_is_refused_or_given_as_none_where_another_has_it(tmp_path):
    file = tmp_path / "deep" / "lock"
    with locked(file) as first:
        assert first is not None
        with locked(file) as second:
            assert second is None
        with pytest.raises(UserError, match="taken"), locked(file, UserError("taken", file, "")):
            pass
    with locked(file) as again:
        assert again is not None


def test_what_was_replaced_comes_back_where_another_conversion_begins(tmp_path):
    """Killed between the two renames, and then something else is converted to the same place."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    (part / "replaced").mkdir(parents=True)
    (part / "replaced" / "config.json").write_text("old")
    (part / RECORD).write_text(json.dumps(ONE))
    refused("the destination exists", write, out, TWO, "a")
    assert (out / "config.json").read_text() == "old"
    assert not part.exists()


def test_conversions_that_are_killed_come_out_the_same(tmp_path):
    """Few, over an older model; benchmarks/kills.py has many, of every kind."""
    over = list(cases(tmp_path, layers=2))[-1]
    found = run_case(tmp_path, over, random.Random(1), kills=2, shard_bytes=100_000)
    assert found["kills"] == 2
