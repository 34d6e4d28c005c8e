"""A long job over a corpus, cut into shards: each is worked on by itself and leaves one file.

A shard whose file is there is done, so that a stopped job goes on with the others. Each rank takes
every n-th shard, and the cores of its machine share those in processes of their own; machines
without a common folder then exchange their files. A process has one shard in memory at a time.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic

from ..ranks import Ranks

Advance = Callable[[int], object]  # moves the progress bar on
Work = Callable[[Path, Any, Advance], None]


class Shard(NamedTuple):
    """``task`` is all that the work is told, and can be pickled; ``size`` is in the bar's unit."""

    task: Any
    size: int = 0


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_shards(
    folder: Path,
    ranks: Ranks,
    work: Work,
    shards: Sequence[Shard],
    identity: Any,
    *,
    desc: str,
    unit: str,
    processes: int | None = None,
) -> list[Path]:
    """Calls ``work(file, task, advance)`` for each shard that has no file yet; returns the files.

    ``work`` is a function of a module and writes its file atomically. ``identity`` is JSON that
    tells this job from others: the files in ``folder`` are of the same one, or deleted.
    ``processes``: at most so many at once, by default the cores of the machine.
    """
    _begin(folder, ranks, {"job": identity, "sizes": [shard.size for shard in shards]})
    files = [folder / f"shard-{number:06d}" for number in range(len(shards))]
    own = range(ranks.rank, len(shards), ranks.size)
    left = [number for number in own if not files[number].exists()]
    total = sum(shards[number].size for number in own)
    done = total - sum(shards[number].size for number in left)
    count = min(len(left), processes or max(1, num_cores() // ranks.on_this_machine))
    with tqdm(
        total=total or None, initial=done, desc=desc, unit=unit, unit_scale=unit == "B",
        disable=not ranks.first,
    ) as bar:  # fmt: skip
        jobs = [(files[number], shards[number].task) for number in left]
        if count > 1:
            _in_processes(count, work, jobs, bar)
        else:
            for file, task in jobs:
                work(file, task, bar.update)
    _exchange(files, ranks)
    return files


def _begin(folder: Path, ranks: Ranks, identity: Any) -> None:
    plan, text = folder / "plan.json", json.dumps(identity, sort_keys=True) + "\n"
    if len(set(ranks.gather(zlib.crc32(text.encode()) >> 1))) > 1:
        raise UserError(
            "the ranks do not prepare the same texts",
            folder.parent,
            "give all of them the same recipe and files",
        )
    if ranks.first and not (plan.exists() and plan.read_text() == text):
        shutil.rmtree(folder, ignore_errors=True)
        write_atomic(plan, text)
    ranks.wait()


def _exchange(files: list[Path], ranks: Ranks) -> None:
    """Gives each machine the files that only others have."""
    ranks.wait()
    if ranks.size == 1:
        return
    there = np.zeros((ranks.size, len(files)), np.int32)
    there[ranks.rank] = [file.exists() for file in files]
    there = np.array(ranks.sum(mx.array(there)))
    for number in np.flatnonzero(~there.all(axis=0)):
        ranks.share_file(files[number], int(there[:, number].argmax()))
    ranks.wait()


def _in_processes(count: int, work: Work, jobs: list[tuple[Path, Any]], bar: tqdm) -> None:
    context = multiprocessing.get_context("spawn")  # a fork of a process that has run MLX hangs
    progress, stop = context.Value("q", 0), context.Event()
    pool = ProcessPoolExecutor(count, context, _start, (progress, stop))
    try:
        waiting = {pool.submit(_run, work, file, task) for file, task in jobs}
        shown = 0
        while waiting:
            finished, waiting = wait(waiting, 0.3, FIRST_EXCEPTION)
            new = progress.value - shown
            bar.update(new)
            shown += new
            for future in finished:
                future.result()
    except BrokenProcessPool:
        raise UserError(
            "a process that prepares texts was ended from outside",
            f"one of {count}",
            "see whether memory ran out, and run the same command again",
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_own: dict[str, Advance] = {}  # what a process of the pool begins with


def _start(progress: Any, stop: Any) -> None:
    """Begins a process of the pool: Ctrl-C and the end of its parent end it at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def follow() -> None:
        connection.wait([multiprocessing.parent_process().sentinel])  # type: ignore[union-attr]
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()

    def advance(count: int) -> None:
        with progress.get_lock():
            progress.value += count
        if stop.is_set():
            sys.exit()

    _own["advance"] = advance


def _run(work: Work, file: Path, task: Any) -> None:
    work(file, task, _own["advance"])
