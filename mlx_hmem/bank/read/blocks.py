"""The bytes of stored blocks, out of files into MLX's own buffers.

All blocks of a fetch are begun together: the disk is told what will be read, and while it is at
work buffers are allocated; a few threads then read pieces of some MB straight into them, and the
checksum follows piece by piece. So a cold fetch takes hardly longer than the disk.

Pieces are read in the order in which the layers of the anchor will ask for them: the first of all
blocks, then the second of all. Who can use a part of a block need not wait for the rest.
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
PIECE = 2 << 20  # bytes read at once
F_RDADVISE = 44  # of macOS; its argument is struct radvisory


class Place(NamedTuple):
    """Where a block lies: its parts follow one another from ``offset`` on. The file stays open for
    as long as this is held."""

    file: BinaryIO
    offset: int
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


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


class _Piece(NamedTuple):
    start: int  # in the block
    target: memoryview
    offset: int  # in the file


class Reading:
    """A block that is being read: :meth:`wait_for` its bytes, then take the :meth:`result`.

    ``block`` may be looked at as far as was waited for; its parts may be taken one by one, so that
    it is never there as a whole. Used by one thread.
    """

    def __init__(self, place: Place, with_checksum: bool):
        self.nbytes, self.with_checksum = place.nbytes, with_checksum
        self.file: BinaryIO | None = None  # held: the bank may let go of it meanwhile
        self.pieces: list[_Piece] = []
        self.counts: list[Future[int]] = []  # of the bytes read, in order of the pieces
        self._views: list[memoryview] = []
        self._digest, self._done, self._whole = xxhash.xxh3_64(), 0, True
        buffers, start = [], 0
        for part in place.parts:
            buffer = mx.zeros(part.nbytes // part.bits.size, part.bits)
            mx.eval(buffer)
            buffers.append(buffer)
            view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
            self._views.append(view)
            for at in range(0, part.nbytes, PIECE):
                piece = _Piece(start + at, view[at : at + PIECE], place.offset + start + at)
                self.pieces.append(piece)
            start += part.nbytes
        self.block = StoredBlock(buffers)
        self.file = place.file

    def is_here(self, nbytes: int) -> bool:
        """Whether the first ``nbytes`` have been read."""
        pairs = zip(self.pieces[self._done :], self.counts[self._done :], strict=True)
        return all(count.done() for piece, count in pairs if piece.start < nbytes)

    def wait_for(self, nbytes: int) -> None:
        """Waits until the first ``nbytes`` have been read; OSError if they cannot be."""
        while self._done < len(self.pieces) and self.pieces[self._done].start < nbytes:
            piece, count = self.pieces[self._done], self.counts[self._done].result()
            self._whole &= count == len(piece.target)
            if self.with_checksum:
                self._digest.update(piece.target)
            piece.target.release()
            self._done += 1

    def take(self) -> mx.array:
        """The first part that has not been taken: read to its end, and given away."""
        self._views.pop(0).release()
        return self.block.buffers.pop(0)

    def result(self) -> str | None:
        """Waits for all; the XXH3 as 16 hex digits, or "" without; None if the file ends before."""
        self.wait_for(self.nbytes)
        self.release()
        if not self._whole:
            return None
        return self._digest.hexdigest() if self.with_checksum else ""

    def release(self) -> None:
        """Waits until nobody writes into the buffers any more, and lets go of them and the file."""
        if self.file is None:
            return
        wait(self.counts)
        for piece in self.pieces:
            piece.target.release()
        for view in self._views:
            view.release()
        self.file = None

    def __del__(self) -> None:
        self.release()  # whoever began it may have given up


class BlockReader:
    """Reads blocks with threads of its own; :meth:`close` ends them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="bank")

    def begin(self, places: Sequence[Place], with_checksum: Sequence[bool]) -> list[Reading]:
        """Begins to read all blocks."""
        steps = [(at / p.nbytes, p, at) for p in places for at in range(0, p.nbytes, PIECE)]
        for _, place, at in sorted(steps, key=lambda step: step[0]):
            advise(place.file, place.offset + at, min(PIECE, place.nbytes - at))
        readings = [Reading(*pair) for pair in zip(places, with_checksum, strict=True)]
        alone = sum(place.nbytes for place in places) <= PIECE
        submit = _at_once if alone else self._pool.submit
        jobs = [(piece.start / r.nbytes, r, piece) for r in readings for piece in r.pieces]
        # A stable sort: the pieces of a block keep their order.
        for _, reading, piece in sorted(jobs, key=lambda job: job[0]):
            assert reading.file is not None
            handle = reading.file.fileno()
            reading.counts.append(submit(_read_into, handle, piece.target, piece.offset))
        return readings

    def close(self) -> None:
        self._pool.shutdown()


def pieces_read(place: Place) -> Iterator[int]:
    """Reads a block for the system to keep, with no MLX; yields the bytes of each piece."""
    nbytes = place.nbytes
    target = memoryview(bytearray(min(PIECE, nbytes)))
    for at in range(0, nbytes, PIECE):
        yield _read_into(place.file.fileno(), target[: nbytes - at], place.offset + at)


def advise(file: BinaryIO, offset: int, length: int) -> None:
    """Tells the system that these bytes will be read soon."""
    with suppress(OSError):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)
        elif sys.platform == "darwin":
            fcntl.fcntl(file, F_RDADVISE, struct.pack("@qi", offset, length))


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
