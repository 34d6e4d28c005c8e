"""Faults that the store of the blocks under training survives: kills, full disks, other writers."""

import random
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.errors import UserError
from tests.helpers.programs import refused
from tests.helpers.store_worker import PROGRESS, TO_THE_END, fill, small_store, start, training_run
from tests.helpers.stores import assert_same, store_state
from train.loop.log import read_log
from train.loop.stopping import Stopping
from train.store.blocks import BlockStore
from train.store.records import RecordStore
from train.store.sound import check_free_space, check_store

KILLS = 6  # python -m benchmarks.kills training has fifty of them


def test_a_run_killed_at_random_moments_has_the_losses_of_one_that_was_not(tmp_path):
    training_run(tmp_path / "whole")
    folder, rng, kills = tmp_path / "killed", random.Random(0), 0
    for _ in range(KILLS):
        process = start("slow", folder)
        process.stdout.readline()  # it has begun
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    training_run(folder)
    print(f"killed {kills} times")
    assert kills >= 2
    assert_same_runs(tmp_path / "whole", folder)


def assert_same_runs(a: Path, b: Path) -> None:
    assert (a / "loss.jsonl").read_bytes() == (b / "loss.jsonl").read_bytes()
    with (
        small_store(a / "store", readonly=True) as first,
        small_store(b / "store", readonly=True) as second,
    ):
        assert first.progress() == second.progress()
        assert_same(store_state(first), store_state(second))


@pytest.fixture(scope="module")
def to_the_end(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    training_run(folder, TO_THE_END)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_saves_at_once_and_goes_on_from_that_step(
    number, to_the_end, tmp_path
):
    process, log = start("signalled", tmp_path), tmp_path / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)  # until it has logged step 20
    process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "stopping after this step" in errors
    with small_store(tmp_path / "store", readonly=True) as store:
        stopped = store.progress()
    assert 20 <= stopped.step < 300
    assert len((tmp_path / "loss.jsonl").read_text().splitlines()) == stopped.step
    assert read_log(log)[-1]["step"] == stopped.step
    training_run(tmp_path, TO_THE_END)
    assert_same_runs(to_the_end, tmp_path)


def test_a_second_signal_stops_at_once_and_handlers_are_as_they_were():
    before = signal.getsignal(signal.SIGTERM)
    with Stopping(alone=True) as stopping:
        signal.raise_signal(signal.SIGTERM)
        assert stopping.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with Stopping(alone=False):  # of several ranks
        assert signal.getsignal(signal.SIGTERM) is before


def test_what_was_not_committed_is_gone_and_what_was_is_whole(tmp_path):
    with small_store(tmp_path) as store:
        assert store.progress() is None
        fill(store, 2, [0, 1, 2], 1.0)
        arrays = {"anchor.norm": np.arange(6.0).reshape(2, 3), "step": np.array(7)}
        store.commit(PROGRESS, arrays)
        fill(store, 2, [1, 2, 3], 2.0)
        for first in (4, 10, 16):  # pushes them out to the disk
            store.gather(2, np.arange(first, first + 6), 6)
        assert not store._dirty
        assert np.all(np.array(store.gather(2, np.array([3]), 1)[0]) == 2)
    with small_store(tmp_path) as store:
        assert store.progress() == PROGRESS
        assert len(store.touched()) == 3
        for name, array in store.arrays().items():
            assert array.dtype == arrays[name].dtype
            assert np.array_equal(array, arrays[name])
        state = store_state(store)
        assert np.all(state["2.weights"][:3] == 1)
        assert state["2.steps"][:5].tolist() == [1, 1, 1, 0, 0]
        fill(store, 2, [1, 2, 3], 3.0)
        store.commit(replace(PROGRESS, step=3))
    with small_store(tmp_path, readonly=True) as store:
        assert [float(store.block(2, c).max()) for c in range(4)] == [1, 3, 3, 3]


def test_a_second_writer_is_refused_in_one_line_and_a_reader_is_not(tmp_path):
    with small_store(tmp_path / "store") as store:
        store.commit(PROGRESS)
        line = "error: the training store has a writer already: .*; wait for it.*\n"
        assert re.fullmatch(line, start("open", tmp_path).communicate()[1])
        reader = start("read", tmp_path)
        assert reader.communicate()[0].strip() == "2"
    assert start("open", tmp_path).wait() == 0


def overfill(store: BlockStore, how: str) -> None:
    for first in range(0, 30, 3):
        fill(store, 2, [first, first + 1, first + 2], 2.0)
        if how == "prefetch":
            store.prefetch([(2, (first + n) % 32) for n in range(3, 6)], [])
    store.commit(PROGRESS)


@pytest.mark.parametrize("how", ["commit", "eviction", "prefetch"])
def test_a_full_store_is_one_line_and_the_last_commit_is_intact(how, tmp_path):
    """Wherever it fills up: the worker's error is raised to the caller."""
    cache = 1 << 30 if how == "commit" else 6 * 2308
    with small_store(tmp_path, map_size=100_000, cache_bytes=cache) as store:
        fill(store, 2, [0, 1, 2], 1.0)
        store.commit(PROGRESS)
        refused(r"store .* is full: map size .*commit is intact", overfill, store, how)
    with small_store(tmp_path) as store:
        assert store.progress() == PROGRESS
        assert np.all(store_state(store)["2.weights"][:3] == 1)


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not keep to RLIMIT_AS")
def test_a_map_takes_the_address_space_of_its_file_and_too_little_loses_nothing(tmp_path):
    """A map of a terabyte was refused under ``ulimit -v``, with the advice to delete the run."""
    process = start("mapped", tmp_path)
    assert process.wait() == 0, process.communicate()[1]
    errors = start("not mapped", tmp_path).communicate()[1]
    assert re.fullmatch(
        "error: the training store .* cannot be mapped: .*intact.*ulimit.*\n", errors
    )
    with small_store(tmp_path / "store", readonly=True) as store:
        assert store.progress() == PROGRESS


def test_a_map_grows_with_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr("train.store.records.FIRST_MAP", 64 << 10)
    with small_store(tmp_path) as store:
        for first in range(0, 30, 3):
            fill(store, 2, [first, first + 1, first + 2], first + 1.0)
        store.commit(PROGRESS)
        assert store.records._env.info()["map_size"] > 64 << 10
    with small_store(tmp_path, readonly=True) as store:
        assert store.progress() == PROGRESS
        assert [float(store.block(2, c).max()) for c in range(30)] == [
            c // 3 * 3 + 1 for c in range(30)
        ]


def test_a_file_that_may_not_grow_is_one_line_and_the_last_commit_is_intact(tmp_path):
    """The system's own refusal of a write, as on a full disk."""
    with small_store(tmp_path / "store") as store:
        fill(store, 2, [0, 1, 2], 1.0)
        store.commit(PROGRESS)
    process = start("limited", tmp_path)
    error = "error: cannot write the training store .*commit is intact.*\n"
    assert re.fullmatch(error, process.communicate()[1])
    assert process.returncode == 2
    with small_store(tmp_path / "store") as store:
        assert store.progress() == PROGRESS
        assert np.all(store_state(store)["2.weights"][:3] == 1)


def test_no_room_on_the_disk_a_record_of_another_size_and_a_missing_store_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"too little disk space .* it may grow by .* are free;"):
        check_free_space(tmp_path, 1 << 60)
    check_free_space(tmp_path, 1 << 10)
    with RecordStore(tmp_path) as records:
        records.write([(b"a", np.zeros(3))])
        refused("another size", lambda: records.read(b"a", np.zeros(2)))
        assert not records.read(b"b", np.zeros(2))
    refused("is missing", RecordStore, tmp_path / "none", readonly=True)
    (tmp_path / "data.mdb").write_bytes(b"no store" * 2000)
    refused("cannot open the training store", RecordStore, tmp_path)


@pytest.mark.parametrize("how", ["bit", "head", "cut", "page"])
def test_a_damaged_store_is_one_line_or_does_no_harm(how, tmp_path):
    """Of 200 such, 42 ended in tracebacks, signals, or in other numbers without a word."""
    with small_store(tmp_path / "whole") as store:
        for step, clusters in enumerate(([0, 1, 2], [2, 3, 4], [0, 8, 9]), 1):
            fill(store, 2, clusters, float(step))
            store.commit(replace(PROGRESS, step=step), {"anchor": np.arange(2000.0)})
    with small_store(tmp_path / "whole", readonly=True) as store:
        wanted, progress = store_state(store), store.progress()
    data, rng = (tmp_path / "whole" / "data.mdb").read_bytes(), random.Random(how)
    found = {"refused": 0, "same": 0}
    for number in range(12):
        folder, changed = tmp_path / str(number), bytearray(data)
        at = rng.randrange(8192 if how == "head" else len(data))
        if how == "cut":
            del changed[at:]
        elif how == "page":
            changed[at // 4096 * 4096 : at // 4096 * 4096 + 4096] = rng.randbytes(4096)
        else:
            changed[at] ^= 1 << rng.randrange(8)
        folder.mkdir()
        (folder / "data.mdb").write_bytes(changed)
        try:
            check_store(folder)
            with small_store(folder, readonly=True) as store:
                assert store.progress() == progress
                assert_same(store_state(store), wanted)
            found["same"] += 1
        except UserError:
            found["refused"] += 1
    print(how, found)
    assert found["refused"] or how == "head"
