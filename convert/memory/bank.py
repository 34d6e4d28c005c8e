"""A memory bank out of PyTorch's tensors and back, streamed shard by shard.

A shard of our bank is one buffer: the tensors' rows are read into it block after block, checked and
written without another copy. Files appear whole or not at all, so a conversion that was stopped
goes on behind those that exist; the checksums of a kept shard are computed from its bytes.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from tqdm import tqdm

from mlx_hmem.bank import Bank, Manifest
from mlx_hmem.bank.format import GENERIC, PAGE, STORED_TYPES, Shard, num_blocks, stored_r
from mlx_hmem.bank.header import shard_header
from mlx_hmem.bank.writer import SHARD_BYTES, Stored, rewrite_bank
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file
from mlx_hmem.reading import open_regular, read_exactly

from ..torch_files.tensors import BITS, ITEM_SIZES, all_finite, bits_of, safetensors_header
from ..torch_files.writer import bytes_of
from .tensors import LevelTensors, matrices, table_name

PIECE = 64 << 20  # bytes of blocks read at once on the way to PyTorch


def write_tensors_as_bank(
    folder: Path,
    config: MemoryConfig,
    levels: Mapping[int, LevelTensors | None],
    *,
    dtype: str,
    anchor_hash: str,
    tree_hash: str,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Writes the bank in ``folder``, going on behind the shards that an earlier call has left.

    Args:
        levels: those of :func:`convert.memory.tensors.find_levels`.
        dtype: the bank's.

    Raises:
        UserError: a number is not finite.
    """
    planned = Manifest.planned(config, dtype, None, anchor_hash, tree_hash)
    source = _Source(folder, planned, levels)
    return rewrite_bank(
        folder,
        planned,
        source.block,
        found=source.found,
        made=lambda level, shard: _forget(folder / shard.file),
        shard_bytes=shard_bytes,
    )


class _Source:
    """The blocks of tensors: a shard is read when the first of its blocks is asked for."""

    def __init__(
        self, folder: Path, planned: Manifest, levels: Mapping[int, LevelTensors | None]
    ) -> None:
        self.folder, self.planned, self.levels = folder, planned, levels
        self.tag = STORED_TYPES[planned.dtype].tag
        self.buffer = np.empty(0, BITS[ITEM_SIZES[self.tag]])

    def found(self, level: int, shard: Shard) -> Shard | None:
        """A shard that an earlier call wrote whole, its checksums computed again."""
        self.shard = shard
        path, layout = self.folder / shard.file, self.planned.level(level)
        if not path.exists():
            return None
        with open_regular(path) as file:
            whole = os.fstat(file.fileno()).st_size == shard.bytes
            if not whole or file.read(PAGE) != shard_header(self.planned, level, shard):
                return None
            sums = []
            for _ in range(shard.num_clusters):
                block = memoryview(read_exactly(file, layout.block_stride, path))
                sums.append(xxhash.xxh3_64_hexdigest(block[: layout.block_bytes]))
        return replace(shard, xxh3="".join(sums))

    def block(self, level: int, cluster: int) -> Stored | None:
        if (tensors := self.levels[level]) is None:
            return None
        first, count = self.shard.first_cluster, self.shard.num_clusters
        if cluster == first:
            if self.buffer.size < (size := count * tensors.block_size()):
                self.buffer = np.empty(size, self.buffer.dtype)
            self.blocks = tensors.read(first, count, self.tag, self.buffer)
            _advise(tensors.spans(first, count), "POSIX_FADV_DONTNEED")
            if left := num_blocks(self.planned.memory, level) - (first + count):
                _advise(tensors.spans(first + count, min(count, left)), "POSIX_FADV_WILLNEED")
        return [self.blocks[cluster - first].data.cast("B")]


def _advise(spans: Iterable[tuple[Path, int, int]], advice: str) -> None:
    """Tells the kernel of (file, first byte, bytes): to read them ahead, or to forget them."""
    if not hasattr(os, advice):
        return
    with contextlib.ExitStack() as files:
        handles: dict[Path, int] = {}
        for path, start, length in spans:
            if path not in handles:
                handles[path] = files.enter_context(open_regular(path)).fileno()
            with contextlib.suppress(OSError):
                os.posix_fadvise(handles[path], start, length, getattr(os, advice))


def _forget(path: Path) -> None:
    """Gives the pages of a written file back. Streaming gigabytes through the page cache of a
    virtual machine cost twice the system time: each page had to be had from its host first."""
    _advise([(path, 0, 0)], "POSIX_FADV_DONTNEED")


def tables_file(level: int) -> str:
    return "memory-generic.safetensors" if level == GENERIC else f"memory-level-{level}.safetensors"


def write_bank_as_tables(folder: Path, bank: Bank, dtype: str) -> None:
    """Writes one file of tables for each level of the bank.

    A file that exists is whole and stays. Blocks are verified, dequantised where they are
    quantised, and rounded if ``dtype`` is not the bank's. Raises UserError for a damaged block.
    """
    config = bank.config
    total = sum(num_blocks(config, number) for number in stored_r(config))
    with tqdm(total=total, desc="memory tables", unit="block", delay=2, disable=None) as bar:
        for number in stored_r(config):
            if (path := folder / tables_file(number)).exists():
                bar.update(num_blocks(config, number))
                continue
            with atomic_file(path) as file:
                _write_tables(file, bank, number, dtype, bar)
            _forget(path)


def _write_tables(file: BinaryIO, bank: Bank, level: int, dtype: str, bar: tqdm) -> None:
    """Writes the tables of a level: blocks are read in order, their rows put where they belong."""
    config, stored = bank.config, STORED_TYPES[dtype]
    r, count = stored_r(config)[level], num_blocks(config, level)
    own, layers = matrices(config, r), config.num_memory_layers
    tables = (
        (table_name(layer, level, matrix.name), stored.tag, (count, r, matrix.width))
        for layer in config.memory_layers
        for matrix in own
    )
    file.write(safetensors_header(tables, {"format": "pt"}))
    base = file.tell()
    step = max(1, PIECE // (layers * own[-1].stop * stored.dtype.size))
    for first in range(0, count, step):
        keys = [(level, cluster) for cluster in range(first, min(first + step, count))]
        arrays = (block.astype(stored.dtype) for block in bank.blocks(keys))
        blocks = np.stack([bits_of(array).reshape(layers, -1) for array in arrays])
        if not all_finite(blocks, stored.tag):
            raise UserError(
                f"level {level} has numbers that are not finite in {dtype}",
                f"clusters {keys[0][1]} to {keys[-1][1]}",
                "choose --dtype bfloat16 or float32, or train these blocks anew",
            )
        at = base
        for layer in range(layers):
            for matrix in own:
                rows = blocks[:, layer, matrix.start : matrix.stop]
                file.seek(at + first * rows[0].nbytes)
                file.write(bytes_of(rows))
                at += count * rows[0].nbytes
        bar.update(len(keys))
