"""The fastest ways to read some parts of files, without MLX: what a fetch is measured against.

All read into one buffer that was made and touched before. Which way is fastest depends on the
machine, so each is tried: the parts one after the other; the same after the system was told of all
of them; pieces of 1 to 8 MB by several threads; and each of these past the page cache (O_DIRECT).
"""

import mmap
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from types import TracebackType
from typing import Self

from benchmarks.common.banks import FilePart
from benchmarks.common.counting import evict, median, timed

SECTOR = 4096  # what O_DIRECT wants offsets, lengths and buffers to be multiples of


@dataclass(frozen=True)
class Way:
    """``piece`` 0: a part at once."""

    threads: int = 1
    piece: int = 0
    hints: bool = False
    direct: bool = False

    def __str__(self) -> str:
        piece = f"{self.piece >> 20} MB pieces" if self.piece else "whole blocks"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        extra = ", O_DIRECT" if self.direct else ", hints" if self.hints else ""
        return f"{piece}, {threads}{extra}"


PLAIN = Way()
PIECES = [Way(threads, mb << 20) for threads, mb in product((2, 4, 8), (1, 2, 4, 8))]
WARM_WAYS = [PLAIN, *PIECES]
COLD_WAYS = [
    *WARM_WAYS,
    *(Way(w.threads, w.piece, hints=True) for w in WARM_WAYS),
    *(Way(w.threads, w.piece, direct=True) for w in WARM_WAYS),
]


class RawReader:
    """Reads parts of files one way; a context manager that holds files, buffer and threads."""

    def __init__(self, parts: Sequence[FilePart], way: Way):
        self.parts, self.way = list(parts), way
        self._files = ExitStack()
        flags = os.O_RDONLY | (os.O_DIRECT if way.direct else 0)
        handles: dict[os.PathLike[str], int] = {}
        for part in parts:
            if part.file not in handles:
                handles[part.file] = os.open(part.file, flags)
                self._files.callback(os.close, handles[part.file])
        for handle in handles.values() if way.hints else ():  # no read-ahead beyond the parts
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
        # O_DIRECT reads to the end of the sector: the padding of the block.
        sizes = [_round_up(p.nbytes, SECTOR) if way.direct else p.nbytes for p in parts]
        self._buffer = mmap.mmap(-1, sum(_round_up(size, SECTOR) for size in sizes))
        for at in range(0, len(self._buffer), SECTOR):
            self._buffer[at] = 1
        view, at = memoryview(self._buffer), 0
        self._jobs: list[tuple[int, memoryview, int]] = []
        self._hints = [
            (handles[p.file], p.offset, size) for p, size in zip(parts, sizes, strict=True)
        ]
        for handle, offset, size in self._hints:
            for start in range(0, size, way.piece or size):
                end = min(start + (way.piece or size), size)
                self._jobs.append((handle, view[at + start : at + end], offset + start))
            at += _round_up(size, SECTOR)
        self._pool = ThreadPoolExecutor(way.threads) if way.threads > 1 else None
        if self._pool is not None:
            list(self._pool.map(abs, range(64)))  # threads are running before the clock is

    def read(self) -> None:
        """Reads all parts."""
        if self.way.hints:
            for hint in self._hints:
                os.posix_fadvise(*hint, os.POSIX_FADV_WILLNEED)
        run = map if self._pool is None else self._pool.map
        assert all(run(_read, self._jobs))

    def data(self) -> list[bytes]:
        """What was read, part by part."""
        starts, at = [], 0
        for _, _, size in self._hints:
            starts.append(at)
            at += _round_up(size, SECTOR)
        pairs = zip(starts, self.parts, strict=True)
        return [bytes(self._buffer[at : at + part.nbytes]) for at, part in pairs]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._files.close()
        for _, target, _ in self._jobs:
            target.release()


def _read(job: tuple[int, memoryview, int]) -> bool:
    handle, target, offset = job
    done = 0
    while done < len(target):
        count = os.preadv(handle, [target[done:]], offset + done)
        if count == 0:
            return False
        done += count
    return True


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def fastest_ways(parts: Sequence[FilePart], cold: bool, rounds: int, keep: int = 3) -> list[Way]:
    """The ``keep`` ways with the least median time; ways this file system refuses are left out."""
    files, found = {part.file for part in parts}, defaultdict(list)
    for way in COLD_WAYS if cold else WARM_WAYS:
        try:
            with RawReader(parts, way) as reader:
                for _ in range(rounds):
                    if cold:
                        evict(files)
                    found[way].append(timed(reader.read).ms)
        except OSError:
            continue
    return sorted(found, key=lambda way: median(found[way]))[:keep]
