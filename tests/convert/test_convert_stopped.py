"""Whole models: stopped by a full disk, by another conversion, over sources that change."""

import fcntl
import json
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from convert.command import main
from convert.memory import model as memory
from convert.quantize import model as quantized_model
from convert.quantize.model import plan
from convert.upload import _uploaded
from mlx_hmem import load
from mlx_hmem.errors import run_program
from mlx_hmem.folders import RECORD, REPLACED
from tests.helpers.faults import stop_at
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused
from tests.test_folders import ONE, write

KINDS = ("from pytorch", "to pytorch", "quantise")


def command(kind: str, wide: Path, layout: Path, out: Path) -> list[str]:
    return {
        "from pytorch": [str(layout), str(out)],
        "to pytorch": [str(wide), str(out), "--to", "pytorch"],
        "quantise": ["quantize", str(wide), str(out), "--bank-bits", "8", "--bank-level", "1:none"],
    }[kind]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing beyond ``size`` bytes of a file fails here, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_fails_ends_in_one_line_and_is_made_up_for(
    wide, layout, tmp_path, kind, capsys
):
    main(command(kind, wide, layout, tmp_path / "whole"))
    wanted = bytes_of(tmp_path / "whole")
    out, part = tmp_path / "out", tmp_path / "out.part"
    arguments = command(kind, wide, layout, out)
    sizes = sorted({len(data) for data in wanted.values()})
    for limit in (sizes[len(sizes) // 2] - 1, sizes[-1] - 1):
        capsys.readouterr()
        with largest_file(limit), pytest.raises(SystemExit) as end:
            run_program(lambda: main(arguments))
        assert end.value.code == 2
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if not line.startswith("dropped")]
        assert len(lines) == 1
        assert lines[0].startswith("error: File too large")
        assert not out.exists()
        assert not list(part.rglob(".*.part"))
        refused("", load, part)
    main(arguments)
    assert bytes_of(out) == wanted
    assert not part.exists()


@pytest.mark.parametrize("kind", ["from pytorch", "quantise"])
def test_an_anchor_does_not_load_before_its_memory_is_there(
    wide, layout, tmp_path, kind, monkeypatch
):
    # Where the anchor is whole and nothing else is.
    module, name = (memory, "write_retriever")
    if kind == "quantise":
        module, name = (quantized_model, "change_bank")
    stop_at(monkeypatch, module, name, 1)
    with pytest.raises(KeyboardInterrupt):
        main(command(kind, wide, layout, tmp_path / "out"))
    part = tmp_path / "out.part"
    if kind == "quantise":
        shutil.rmtree(part / "retriever")
    assert (part / "config.json").exists()
    assert list(part.glob("model*.safetensors"))
    refused(r"hmem\.json is missing", load, part)


def test_a_source_of_another_content_is_not_gone_on_with(layout, tmp_path, monkeypatch):
    """Stopped when nothing but hmem.json was missing; then a table gets other numbers."""
    source, out = Path(shutil.copytree(layout, tmp_path / "source")), tmp_path / "out"

    def stopped(path: Path, data: str | bytes) -> None:
        if path.name == "hmem.json":
            raise KeyboardInterrupt
        memory_write(path, data)

    memory_write = memory.write_atomic
    monkeypatch.setattr(memory, "write_atomic", stopped)
    with pytest.raises(KeyboardInterrupt):
        main([str(source), str(out)])
    monkeypatch.undo()
    shard = "bank/level-1.00000.safetensors"
    old = (tmp_path / "out.part" / shard).read_bytes()
    table = source / "memory-level-1.safetensors"
    size, data = table.stat().st_size, bytearray(table.read_bytes())
    data[-4:] = b"\x00\x00\x80\x3f"  # 1.0
    table.write_bytes(data)
    assert table.stat().st_size == size
    main([str(source), str(out)])
    main([str(source), str(tmp_path / "fresh")])
    assert bytes_of(out) == bytes_of(tmp_path / "fresh")
    assert (out / shard).read_bytes() != old


def test_a_source_that_changes_while_it_is_read_gives_no_model(layout, tmp_path, monkeypatch):
    source, out = Path(shutil.copytree(layout, tmp_path / "source")), tmp_path / "out"
    write_retriever = memory.write_retriever

    def changed(*arguments: object) -> object:
        os.utime(source / "memory-level-1.safetensors", ns=(1, 1))
        return write_retriever(*arguments)

    monkeypatch.setattr(memory, "write_retriever", changed)
    refused(r"changed while .*memory-level-1\.safetensors; run the", main, [str(source), str(out)])
    assert not out.exists()
    monkeypatch.undo()
    main([str(source), str(out)])
    load(out)


def test_a_conversion_at_its_last_step_is_not_disturbed(tmp_path):
    """The folder has its name already, and its writer, which holds the lock, tidies up."""
    out = tmp_path / "out"
    out.mkdir()
    (out / RECORD).write_text(json.dumps(ONE))
    (out / "a").write_text("a 1")
    handle = os.open(out, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    for replace in (False, True):
        refused("another program writes here", write, out, ONE, "a", replace=replace)
        assert {f.name for f in out.iterdir()} == {"a", RECORD}
        assert os.listdir(tmp_path) == ["out"]
    os.close(handle)
    assert write(out, ONE, "a") == []
    assert os.listdir(out) == ["a"]


def test_a_folder_renamed_before_it_could_be_locked_is_not_written_to(tmp_path, monkeypatch):
    out, part, flock = tmp_path / "out", tmp_path / "out.part", fcntl.flock

    def after_the_other(*arguments: int) -> None:
        os.rename(part, out)
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", after_the_other)
    refused("another program writes here", write, out, ONE, "a")
    assert not part.exists()
    assert not os.listdir(out)


def test_a_model_that_came_while_one_was_put_aside_is_replaced_too(tmp_path):
    """Killed between the two renames with --overwrite; then somebody puts a model there."""
    out, part = tmp_path / "out", tmp_path / "out.part"
    for folder in (part / REPLACED, out):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("old")
    (part / RECORD).write_text(json.dumps(ONE))
    refused("the destination exists", write, out, ONE, "a")
    assert write(out, ONE, "a", replace=True) == ["a"]
    assert os.listdir(out) == ["a"]
    assert not part.exists()


def test_what_a_kill_in_the_last_step_leaves_goes_nowhere(wide, tmp_path):
    """The record names folders of this computer, and the model of before is another."""
    folder = Path(shutil.copytree(wide, tmp_path / "model"))
    clean = set(_uploaded(folder)), set(plan(folder, None, {}).files)
    (folder / RECORD).write_text(json.dumps({"sources": {"/home/me/model.pt": [1, 1]}}))
    shutil.copytree(wide, folder / REPLACED)
    load(folder)
    assert (set(_uploaded(folder)), set(plan(folder, None, {}).files)) == clean
