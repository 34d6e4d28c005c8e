"""Shards: in parallel, over ranks and processes, gone on with after a stop, the same as in one."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.places import ROOT
from tests.helpers.programs import refused
from tests.helpers.shard_worker import squares
from tests.train.test_ranks import free_port
from train.data.arrays import new_array, save_pieces

MANY = list(range(20, 60))  # a job of them is not done before it is stopped
WORKER = ROOT / "tests" / "helpers" / "shard_worker.py"
LAUNCH = Path(sys.executable).with_name("mlx.launch")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def log(folder: Path) -> list[list[int]]:
    """(number, process) of each shard that was made."""
    lines = (folder / "log").read_text().splitlines()
    return [[int(word) for word in line.split()] for line in lines]


def start(folder: Path, seconds: float, *numbers: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(WORKER), "together", str(folder), str(seconds)]
    return subprocess.Popen(
        [*command, *map(str, numbers)], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE
    )


def until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_processes_share_the_shards_and_give_them_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr("train.corpus.shards.num_cores", lambda: 2)
    assert squares(tmp_path, list(range(8)), 0.2) == [n**2 for n in range(8)]
    made = log(tmp_path)
    assert sorted(number for number, _ in made) == list(range(8))
    processes = {process for _, process in made}
    assert len(processes) == 2
    assert os.getpid() not in processes


def test_one_process_needs_no_other_and_what_is_done_is_not_done_again(tmp_path):
    assert squares(tmp_path / "a", [2, 3], 0, processes=1) == [4, 9]
    assert {process for _, process in log(tmp_path / "a")} == {os.getpid()}
    squares(tmp_path, [1, 2, 3], 0, processes=1)
    (tmp_path / "shards" / "shard-000001").unlink()
    assert squares(tmp_path, [1, 2, 3], 0, processes=1) == [1, 4, 9]
    assert [number for number, _ in log(tmp_path)] == [1, 2, 3, 2]
    assert squares(tmp_path, [1, 2, 4], 0, processes=1) == [1, 4, 16]
    assert len(log(tmp_path)) == 7


@pytest.mark.parametrize("cores", [1, 2])
def test_a_wrong_input_is_the_same_line_from_any_process(tmp_path, monkeypatch, cores):
    monkeypatch.setattr("train.corpus.shards.num_cores", lambda: cores)
    refused(r"^an unlucky number: 13; take another$", squares, tmp_path, [12, 13, 14, 15], 0)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_job_leaves_no_process_and_goes_on(tmp_path, sent):
    """Killed, it cannot tell its processes; they must see it."""
    job = start(tmp_path, 1.0, *MANY)
    made = tmp_path / "machine" / "log"
    until(made.exists)
    processes = {process for _, process in log(tmp_path / "machine")}
    job.send_signal(sent)
    assert job.wait(30) != 0
    until(lambda: not any(map(is_running, processes)), 10)
    before = len(log(tmp_path / "machine"))
    again = start(tmp_path, 0.0, *MANY)
    assert again.communicate(timeout=60)[0].strip() == str([n**2 for n in MANY])
    assert sorted(number for number, _ in log(tmp_path / "machine")) == MANY
    assert 0 < before < len(MANY)


def test_a_process_that_is_killed_is_named_and_the_rest_stays(tmp_path, monkeypatch):
    monkeypatch.setattr("train.corpus.shards.num_cores", lambda: 2)
    job = start(tmp_path, 1.0, *MANY)
    made = tmp_path / "machine" / "log"
    until(made.exists)
    os.kill(log(tmp_path / "machine")[0][1], signal.SIGKILL)
    assert job.wait(60) != 0
    assert squares(tmp_path / "machine", MANY, 0) == [n**2 for n in MANY]


@pytest.mark.parametrize("kind", ["together", "apart"])
def test_ranks_take_their_own_shards_and_machines_exchange_them(tmp_path, kind):
    command = [str(LAUNCH), "-n", "2", "--backend", "ring", "-p", str(free_port())]
    command += ["--env", f"PYTHONPATH={ROOT}", "--python", sys.executable, str(WORKER)]
    command += [kind, str(tmp_path), "0.05", *map(str, range(5))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout.count("[0, 1, 4, 9, 16]") == 2, result.stderr
    if kind == "together":
        assert sorted(number for number, _ in log(tmp_path / "machine")) == list(range(5))
        return
    for rank in (0, 1):
        machine = tmp_path / f"machine-{rank}"
        assert sorted(number for number, _ in log(machine)) == list(range(rank, 5, 2))
        assert len(list((machine / "shards").glob("shard-*"))) == 5


def test_an_array_in_pieces_or_filled_in_any_order_is_what_numpy_saves(tmp_path):
    values = np.arange(60, dtype=np.uint16).reshape(20, 3)
    np.save(tmp_path / "whole.npy", values)
    save_pieces(tmp_path / "pieces.npy", np.split(values, [3, 3, 11]))
    with new_array(tmp_path / "filled.npy", np.uint16, (20, 3)) as array:
        order = np.random.default_rng(0).permutation(20)
        array[order[:9]] = values[order[:9]]
        assert not (tmp_path / "filled.npy").exists()
        array[order[9:]] = values[order[9:]]
    for name in ("pieces", "filled"):
        assert (tmp_path / f"{name}.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


@pytest.mark.skipif(sys.platform == "darwin", reason="asks macOS in another way")
@pytest.mark.parametrize("number", [0, errno.EOPNOTSUPP, errno.ENOSPC])
def test_a_mapped_array_has_its_room_before_it_is_filled(number, tmp_path, monkeypatch):
    """A sparse one ends the process (SIGBUS) where the disk fills up meanwhile."""

    def refuse(*arguments: int) -> None:
        raise OSError(number, os.strerror(number))

    if number:
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    refused = pytest.raises(OSError, match="No space left")
    with refused if number == errno.ENOSPC else contextlib.nullcontext():
        with new_array(tmp_path / "a.npy", np.uint16, (1 << 20, 3)):
            part = (tmp_path / ".a.npy.part").stat()
            assert part.st_blocks * 512 >= part.st_size == 128 + (6 << 20)
        assert np.load(tmp_path / "a.npy").shape == (1 << 20, 3)
