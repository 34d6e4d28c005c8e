"""A memory bank out of PyTorch's tensors and back, streamed shard by shard.

A shard of our bank is one buffer: the tensors' rows are read into it block after block, checked and
written without another copy. Files appear whole or not at all, so a conversion that was stopped
goes on behind those that exist; the checksums of a kept shard are computed from its bytes.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from tqdm import tqdm

from mlx_hmem.bank import Bank, Manifest
from mlx_hmem.bank.format import (
    GENERIC,
    PAGE,
    STORED_TYPES,
    Level,
    RowType,
    Shard,
    num_blocks,
    row_type,
    shard_header,
    shard_name,
    stored_r,
)
from mlx_hmem.bank.writer import (
    SHARD_BYTES,
    Cut,
    shard_cuts,
    shard_metadata,
    write_manifest,
    write_shard,
)
from mlx_hmem.config import MemoryConfig
from mlx_hmem.files import atomic_file, open_regular, read_exactly

from ..torch_files.tensors import bits_of, safetensors_header
from ..torch_files.writer import bytes_of
from .tensors import (
    LevelTensors,
    bits_type,
    common_dtype,
    matrices,
    table_name,
)

PIECE = 64 << 20  # bytes of blocks read at once on the way to PyTorch


def write_tensors_as_bank(
    folder: Path,
    config: MemoryConfig,
    levels: Mapping[int, LevelTensors | None],
    *,
    dtype: str | None,
    anchor_hash: str,
    tree_hash: str,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Writes the bank in ``folder``, going on behind the shards that an earlier call has left.

    Args:
        levels: those of :func:`convert.memory.tensors.find_levels`.
        dtype: the bank's; None keeps that of the tensors, which must then be one.

    Raises:
        UserError: a number is not finite, or the tensors have no common dtype.
    """
    dtype = common_dtype(levels, dtype)
    done = {}
    layouts = {number: Level.layout(config, number, dtype, None) for number in levels}
    total = sum(num_blocks(config, n) * layout.block_bytes for n, layout in layouts.items())
    with tqdm(total=total, desc="memory bank", unit="B", unit_scale=True, delay=2) as bar:
        for number, tensors in levels.items():
            layout, metadata = layouts[number], shard_metadata(number, anchor_hash)
            row = row_type(layout, dtype, None)
            cuts = shard_cuts(layout, num_blocks(config, number), shard_bytes)
            blocks = _blocks_of(tensors, layout, dtype, cuts, bar)
            shards = []
            for cut, source in zip(cuts, blocks, strict=True):
                shard = kept_shard(folder, layout, row, cut, metadata)
                if shard is None:
                    shard = write_shard(folder, layout, row, cut, source, metadata)
                    _forget(folder / shard.file)
                else:
                    bar.update(cut.num_clusters * layout.block_bytes)
                shards.append(shard)
            done[number] = replace(layout, shards=tuple(shards))
    return write_manifest(folder, config, done, dtype, None, anchor_hash, tree_hash)


def _blocks_of(
    tensors: LevelTensors | None, layout: Level, dtype: str, cuts: list[Cut], bar: tqdm
) -> Iterator[Iterator[list[memoryview] | None]]:
    """For each shard its blocks, which are read when the first of them is asked for."""
    most = max(cut.num_clusters for cut in cuts)
    values = layout.block_bytes // STORED_TYPES[dtype].dtype.size
    buffer = np.empty(most * values if tensors else 0, bits_type(dtype))

    def blocks(cut: Cut, following: Cut | None) -> Iterator[list[memoryview] | None]:
        if tensors is None:
            yield from [None] * cut.num_clusters
            return
        tag = STORED_TYPES[dtype].tag
        read = tensors.read(cut.first_cluster, cut.num_clusters, tag, buffer)
        _advise(tensors, cut, "POSIX_FADV_DONTNEED")
        if following is not None:
            _advise(tensors, following, "POSIX_FADV_WILLNEED")
        for block in read:
            bar.update(block.nbytes)
            yield [block.data.cast("B")]

    for cut, following in zip(cuts, [*cuts[1:], None], strict=True):
        yield blocks(cut, following)


def _advise(tensors: LevelTensors, cut: Cut, advice: str) -> None:
    """Tells the kernel of the rows of a shard: to read them ahead, or to forget them."""
    if not hasattr(os, advice):
        return
    with contextlib.ExitStack() as files:
        handles: dict[Path, int] = {}
        for tensor, start, length in tensors.spans(cut.first_cluster, cut.num_clusters):
            if tensor.path not in handles:
                handles[tensor.path] = files.enter_context(open_regular(tensor.path)).fileno()
            with contextlib.suppress(OSError):
                os.posix_fadvise(handles[tensor.path], start, length, getattr(os, advice))


def _forget(path: Path) -> None:
    """Gives the pages of a written file back. Streaming gigabytes through the page cache of a
    virtual machine cost twice the system time: each page had to be had from its host first."""
    if hasattr(os, "posix_fadvise"):
        with open_regular(path) as file, contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def kept_shard(
    folder: Path, layout: Level, row: RowType, cut: Cut, metadata: dict[str, str]
) -> Shard | None:
    """The shard that an earlier call wrote whole, its checksums computed again; None without it."""
    name, (_, first, count) = shard_name(layout.level, cut.shard), cut
    header = shard_header(layout, row, count, {**metadata, "first_cluster": str(first)})
    size = PAGE + count * layout.block_stride
    path = folder / name
    if not path.exists():
        return None
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size != size or file.read(PAGE) != header:
            return None
        sums = []
        for _ in range(count):
            block = memoryview(read_exactly(file, layout.block_stride, path))
            sums.append(xxhash.xxh3_64_hexdigest(block[: layout.block_bytes]))
    return Shard(name, first, count, size, "".join(sums))


def bank_bytes(config: MemoryConfig, dtype: str) -> int:
    """Bytes of a bank's files that is not quantised, without its manifest."""
    total = 0
    for number in stored_r(config):
        layout, count = Level.layout(config, number, dtype, None), num_blocks(config, number)
        cuts = shard_cuts(layout, count)
        total += count * layout.block_stride + len(cuts) * PAGE
    return total


def tables_file(level: int) -> str:
    return "memory-generic.safetensors" if level == GENERIC else f"memory-level-{level}.safetensors"


def write_bank_as_tables(folder: Path, bank: Bank, dtype: str) -> list[str]:
    """Writes one file of tables for each level of the bank; returns their names.

    A file that exists is whole and stays. Blocks are verified, dequantised where they are
    quantised, and rounded if ``dtype`` is not the bank's. Raises UserError for a damaged block.
    """
    config, names = bank.config, []
    total = sum(num_blocks(config, number) for number in stored_r(config))
    with tqdm(total=total, desc="memory tables", unit="block", delay=2) as bar:
        for number in stored_r(config):
            names.append(tables_file(number))
            if (folder / names[-1]).exists():
                bar.update(num_blocks(config, number))
                continue
            with atomic_file(folder / names[-1]) as file:
                _write_tables(file, bank, number, dtype, bar)
            _forget(folder / names[-1])
    return names


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
        at = base
        for layer in range(layers):
            for matrix in own:
                rows = blocks[:, layer, matrix.start : matrix.stop]
                file.seek(at + first * rows[0].nbytes)
                file.write(bytes_of(rows))
                at += count * rows[0].nbytes
        bar.update(len(keys))
