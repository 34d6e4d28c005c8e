"""The bytes of stored blocks, out of files into MLX's own buffers.

All blocks of a fetch are begun together: the disk is told what will be read, and while it is at
work buffers are allocated; a few threads then read pieces of some MB straight into them, and the
checksum follows piece by piece. So a cold fetch takes hardly longer than the disk, and a warm one
as long as two passes over the bytes: MLX knows no buffer that it has not filled with zeros before.
"""

import fcntl
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import xxhash

from mlx_hmem.bank.quantization import Part

THREADS = 4
PIECE = 4 << 20  # bytes read at once
F_RDADVISE = 44  # of macOS; its argument is struct radvisory


class Place(NamedTuple):
    """Where a block lies: its parts follow one another from ``offset`` on."""

    file: BinaryIO
    offset: int
    parts: Sequence[Part]


class StoredBlock(NamedTuple):
    """The parts of a block as they lie in the file, each an array of integers."""

    buffers: list[mx.array]

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def arrays(self, parts: Sequence[Part]) -> list[mx.array]:
        """The parts in their own dtypes and shapes; nothing is copied."""
        return [
            buffer.view(part.dtype).reshape(part.shape)
            for buffer, part in zip(self.buffers, parts, strict=True)
        ]


class Reading:
    """A block that is being read."""

    def __init__(self, place: Place, pool: ThreadPoolExecutor, alone: bool):
        self._buffers: list[mx.array] = []
        self._views: list[memoryview] = []
        self._pieces: list[tuple[memoryview, Future[int]]] = []
        offset, file = place.offset, place.file.fileno()
        for part in place.parts:
            buffer = mx.zeros((part.nbytes // part.bits.size,), dtype=part.bits)
            mx.eval(buffer)
            self._buffers.append(buffer)
            self._views.append(memoryview(buffer).cast("B"))  # type: ignore[arg-type]
            for start in range(0, part.nbytes, PIECE):
                piece = self._views[-1][start : start + PIECE]
                submit = _at_once if alone else pool.submit
                self._pieces.append((piece, submit(_read_into, file, piece, offset + start)))
            offset += part.nbytes

    def result(self, with_checksum: bool) -> tuple[StoredBlock, str] | None:
        """The block, and its XXH3 as 16 hex digits if asked for; None if the file ends before."""
        digest = xxhash.xxh3_64()
        for piece, count in self._pieces:
            if count.result() < len(piece):
                return None
            if with_checksum:
                digest.update(piece)
        self.release()
        return StoredBlock(self._buffers), digest.hexdigest() if with_checksum else ""

    def release(self) -> None:
        """Waits until nobody writes into the buffers any more, and gives them back to MLX."""
        wait([count for _, count in self._pieces])
        for piece, _ in self._pieces:
            piece.release()
        for view in self._views:
            view.release()
        self._pieces, self._views = [], []


class BlockReader:
    """Reads blocks with threads of its own; :meth:`close` ends them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="bank")

    def begin(self, places: Sequence[Place]) -> Iterator[Reading]:
        """Begins to read all blocks, one after the other as they are taken."""
        sizes = [sum(part.nbytes for part in place.parts) for place in places]
        for place, size in zip(places, sizes, strict=True):
            advise(place.file, place.offset, size)
        for place in places:
            yield Reading(place, self._pool, alone=sum(sizes) <= PIECE)

    def close(self) -> None:
        self._pool.shutdown()


def advise(file: BinaryIO, offset: int, length: int) -> None:
    """Tells the system that these bytes will be read soon."""
    with suppress(OSError):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
        elif sys.platform == "darwin":
            most = (1 << 31) - 1
            fcntl.fcntl(file, F_RDADVISE, struct.pack("@qi", offset, min(length, most)))


def _at_once(work: Callable[..., int], *args: Any) -> Future[int]:
    """What a pool does, without the 50 us that a thread takes to wake."""
    future: Future[int] = Future()
    try:
        future.set_result(work(*args))
    except OSError as error:
        future.set_exception(error)
    return future


def _read_into(file: int, target: memoryview, offset: int) -> int:
    """Reads at ``offset`` until ``target`` is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(target):
        with target[done:] as rest:
            count = os.preadv(file, [rest], offset + done)
        if count == 0:
            break
        done += count
    return done
