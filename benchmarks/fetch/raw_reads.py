"""The fastest ways to read some parts of files, without MLX: what a fetch is measured against.

All read into one buffer that was made and touched before. Which way is fastest depends on the
machine, so each is tried: the parts one after the other; the same after the system was told of all
of them; pieces of 1 to 8 MB by several threads; and each of these past the page cache (O_DIRECT, or
macOS' F_NOCACHE).
"""

import fcntl
import io
import mmap
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.common.counting import Timed, evict, timed
from benchmarks.common.models import FilePart
from mlx_hmem.bank.read.blocks import advise

DIRECT = "O_DIRECT" if hasattr(os, "O_DIRECT") else "F_NOCACHE"
F_NOCACHE = 48  # of macOS
SECTOR = 4096  # what O_DIRECT wants offsets, lengths and buffers to be multiples of


class Way(NamedTuple):
    """``piece`` 0: a part at once."""

    threads: int = 1
    piece: int = 0
    hints: bool = False
    direct: bool = False

    def __str__(self) -> str:
        piece = f"{self.piece >> 20} MB pieces" if self.piece else "whole blocks"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        extra = f", {DIRECT}" if self.direct else ", hints" if self.hints else ""
        return f"{piece}, {threads}{extra}"


PLAIN = Way()
WARM_WAYS = [PLAIN, *(Way(n, mb << 20) for n, mb in product((2, 4, 8), (1, 2, 4, 8)))]
COLD_WAYS = [
    *WARM_WAYS,
    *(way._replace(hints=True) for way in WARM_WAYS),
    *(way._replace(direct=True) for way in WARM_WAYS),
]


class RawReader(ExitStack):
    """Reads parts of files one way; a context manager that holds files, buffer and threads."""

    def __init__(self, parts: Sequence[FilePart], way: Way):
        super().__init__()
        self.parts = parts
        files = {path: self.enter_context(_open(path, way)) for path in {p.file for p in parts}}
        rooms = [-(-part.nbytes // SECTOR) * SECTOR for part in parts]
        self._starts = [sum(rooms[:i]) for i in range(len(rooms))]
        self._buffer = memoryview(mmap.mmap(-1, sum(rooms)))
        self._buffer[::SECTOR] = bytes(len(self._buffer[::SECTOR]))
        self._hints = list[tuple[io.FileIO, int, int]]()
        self._jobs = list[tuple[int, memoryview, int]]()
        for part, room, at in zip(parts, rooms, self._starts, strict=True):
            # O_DIRECT reads to the end of the sector: the padding of the block.
            file, size = files[part.file], room if way.direct else part.nbytes
            if way.hints:
                self._hints.append((file, part.offset, size))
            for start in range(0, size, way.piece or size):
                end = min(start + (way.piece or size), size)
                self._jobs.append(
                    (file.fileno(), self._buffer[at + start : at + end], part.offset + start)
                )
        self._pool = None
        if way.threads > 1:
            self._pool = self.enter_context(ThreadPoolExecutor(way.threads))
            list(self._pool.map(abs, range(64)))  # threads are running before the clock is

    def read(self) -> None:
        """Reads all parts."""
        for hint in self._hints:
            advise(*hint)
        assert all((self._pool.map if self._pool else map)(_read, self._jobs))

    def data(self) -> list[bytes]:
        """What was read, part by part."""
        pairs = zip(self._starts, self.parts, strict=True)
        return [bytes(self._buffer[at : at + part.nbytes]) for at, part in pairs]


def _open(path: Path, way: Way) -> io.FileIO:
    direct = getattr(os, "O_DIRECT", 0) if way.direct else 0
    file = io.FileIO(os.open(path, os.O_RDONLY | direct))
    if way.direct and not direct:
        fcntl.fcntl(file, F_NOCACHE, 1)
    if way.hints and hasattr(os, "posix_fadvise"):  # no read-ahead beyond the parts
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return file


def _read(job: tuple[int, memoryview, int]) -> bool:
    handle, target, offset = job
    return os.preadv(handle, [target], offset) == len(target)


def make_ready(parts: Sequence[FilePart], heat: str) -> None:
    """Parts of files out of the page cache, or in it."""
    if heat == "cold":
        evict({part.file for part in parts})
    else:
        with RawReader(parts, PLAIN) as reader:
            reader.read()


def raw_read(all_parts: Sequence[Sequence[FilePart]], way: Way, heat: str, number: int) -> Timed:
    """One of ``all_parts``, another in each round."""
    parts = all_parts[number % len(all_parts)]
    make_ready(parts, heat)
    with RawReader(parts, way) as reader:
        return timed(reader.read)


def fastest_ways(parts: Sequence[FilePart], heat: str, rounds: int, keep: int = 3) -> list[Way]:
    """The ``keep`` ways with the least median time; ways this file system refuses are left out."""
    found = dict[Way, float]()
    for way in COLD_WAYS if heat == "cold" else WARM_WAYS:
        with suppress(OSError):
            found[way] = median(raw_read([parts], way, heat, 0).ms for _ in range(rounds))
    return sorted(found, key=found.__getitem__)[:keep]
