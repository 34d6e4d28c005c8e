"""The files of a bank and the blocks in them, as bytes: what they mean, the reader knows."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

import mlx.core as mx
import xxhash

from mlx_hmem.bank.format import Level, RowType, Shard, check_shard
from mlx_hmem.bank.quantization import Part
from mlx_hmem.files import open_regular

MOST_AT_ONCE = 1 << 30  # macOS refuses a single read of 2 GiB or more


class OpenShard(NamedTuple):
    shard: Shard
    file: BinaryIO
    verified: bytearray  # one byte per block: 1 once its checksum has been found right


def open_shard(path: Path, level: Level, shard: Shard, row: RowType, files: ExitStack) -> OpenShard:
    check_shard(path, level, shard, row)
    file = files.enter_context(open_regular(path))
    if hasattr(os, "posix_fadvise"):
        # Read-ahead beyond a block read 1.2 times the bytes.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return OpenShard(shard, file, bytearray(shard.num_clusters))


class StoredBlock(NamedTuple):
    """The parts of a block as they lie in the file, each an array of integers."""

    buffers: list[mx.array]

    @classmethod
    def read(cls, file: BinaryIO, offset: int, parts: Sequence[Part]) -> Self | None:
        """Reads the parts that follow one another from ``offset`` on; None if the file ends."""
        buffers = []
        for part in parts:
            buffer = mx.zeros((part.nbytes // part.bits.size,), dtype=part.bits)
            mx.eval(buffer)
            with as_bytes(buffer) as target:
                if _read_into(file, target, offset) < part.nbytes:
                    return None
            offset += part.nbytes
            buffers.append(buffer)
        return cls(buffers)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def checksum(self) -> str:
        """XXH3 of the bytes, 16 hex digits."""
        digest = xxhash.xxh3_64()
        for buffer in self.buffers:
            with as_bytes(buffer) as data:
                digest.update(data)
        return digest.hexdigest()

    def arrays(self, parts: Sequence[Part]) -> list[mx.array]:
        """The parts in their own dtypes and shapes; nothing is copied."""
        return [
            buffer.view(part.dtype).reshape(part.shape)
            for buffer, part in zip(self.buffers, parts, strict=True)
        ]


@contextmanager
def as_bytes(array: mx.array) -> Iterator[memoryview]:
    """The bytes of an evaluated array of integers, for writing too."""
    with memoryview(array) as view, view.cast("B") as data:  # type: ignore[arg-type]
        yield data


def _read_into(file: BinaryIO, target: memoryview, offset: int) -> int:
    """Reads at ``offset`` until ``target`` is full or the file ends; returns the bytes read."""
    done = 0
    while done < len(target):
        part = target[done : done + MOST_AT_ONCE]
        count = os.preadv(file.fileno(), [part], offset + done)
        if count == 0:
            break
        done += count
    return done
