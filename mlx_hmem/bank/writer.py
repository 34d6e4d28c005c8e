"""Writes a memory bank, block by block, in memory bounded by one block.

:func:`rewrite_bank` is the one place where a bank is written, out of whatever there is: arrays, the
blocks of other banks, bytes. Every file is written beside its place, synced and renamed, and
``bank.json`` comes last: a killed run leaves shards but no bank. A block of zeros given as None
becomes a hole in the file and costs neither time nor, on most file systems, disk space.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

import mlx.core as mx
import numpy as np
import xxhash
from tqdm import tqdm

from mlx_hmem.bank.format import (
    MANIFEST,
    PAGE,
    STORED_TYPES,
    Level,
    Manifest,
    Shard,
    num_blocks,
    shard_name,
)
from mlx_hmem.bank.header import shard_header
from mlx_hmem.bank.quantization import Part, all_finite, quantize_block
from mlx_hmem.bank.read.reader import Bank
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, link_or_copy, write_atomic

# The unit in which a bank is copied or downloaded: of the paper's 9.2 GB for OpenLM-160M one route
# needs 184 MB in shards of 64 MiB, 5.9 GB in shards of 4 GiB (docs/bank_format.md).
SHARD_BYTES = 64 << 20
Stored = list[memoryview]  # the bytes of the parts of a block
Given = np.ndarray | mx.array | Stored | Literal["keep"] | None


def rewrite_bank(
    folder: str | Path,
    planned: Manifest,
    block_of: Callable[[int, int], Given],
    old: Path | None = None,
    *,
    found: Callable[[int, Shard], Shard | None] = lambda level, shard: None,
    made: Callable[[int, Shard], object] = lambda level, shard: None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Writes a bank into ``folder``; its manifest, which comes last.

    Args:
        planned: what the bank is to be (:meth:`Manifest.planned`).
        block_of: gives the block of (level, cluster), asked in order, the generic memory first: an
            array, to be stored as ``planned`` says; its bytes in that form; None for zeros; "keep"
            for what the bank ``old`` has there. With ``old`` it may be asked twice for a block.
        old: the folder of a bank of the same form and anchor. A level that has no fewer clusters
            than there is cut into files as there, and what is new follows in files of its own; a
            file of which all is kept is a hard link, or a copy where the file system has none.
        found: asked, with its level, of each shard that is to be written; one that is there already
            comes back with its checksums.
        made: told of each shard that was written, and its level.
        shard_bytes: a file is cut, between blocks, before it grows beyond this.

    Raises:
        UserError: an array has another shape, is not finite in the dtype or is lost in the
            quantisation.
    """
    folder = Path(folder)
    counts = {level.level: num_blocks(planned.memory, level.level) for level in planned.all_levels}
    levels, done = list[Level](), 0
    with (
        tqdm(total=sum(counts.values()), desc="writing bank", unit="block", delay=2) as bar,
        nullcontext() if old is None else Bank.open(old, cache_bytes=0) as bank,
    ):
        before = {} if bank is None else {n.level: n.shards for n in bank.manifest.all_levels}
        for level in planned.all_levels:
            number, shards = level.level, list[Shard]()
            for cut in shard_cuts(level, counts[number], shard_bytes, before.get(number, ())):
                clusters = range(cut.first_cluster, cut.first_cluster + cut.num_clusters)
                if cut.xxh3 and all(isinstance(block_of(number, c), str) for c in clusters):
                    link_or_copy(Path(old or "") / cut.file, folder / cut.file)
                    shard = cut
                elif (kept := found(number, cut)) is not None:
                    shard = kept
                else:
                    blocks = (
                        _stored(block_of(number, c), planned, bank, number, c) for c in clusters
                    )
                    shard = write_shard(folder, planned, level, cut, blocks, bar)
                    made(number, shard)
                shards.append(shard)
                done += len(clusters)
                bar.update(done - bar.n)
            levels.append(replace(level, shards=tuple(shards)))
    manifest = replace(planned, generic=levels[0], levels=tuple(levels[1:]))
    write_atomic(folder / MANIFEST, manifest.to_json())
    return manifest


def stored_bytes(bank: Bank, level: int, cluster: int) -> Stored | None:
    """A block of an open bank as it lies there, for :func:`rewrite_bank`; zeros are not read.

    Raises UserError where it is damaged or not finite.
    """
    if bank.manifest.is_zeros(level, cluster):
        return None
    buffers = bank.whole(level, cluster).buffers
    return [memoryview(buffer).cast("B") for buffer in buffers]  # type: ignore[arg-type]


def _stored(
    block: Given, planned: Manifest, bank: Bank | None, level: int, cluster: int
) -> Stored | None:
    """What :func:`rewrite_bank` was given as bytes; arrays are rounded to nearest, ties to even."""
    if isinstance(block, str):
        assert bank is not None, "nothing can be kept without an old bank"
        return stored_bytes(bank, level, cluster)
    if block is None or isinstance(block, list):
        return block
    shape = planned.memory.block_shape(level)
    where = f"block {cluster} on level {level}"
    if tuple(block.shape) != shape:
        raise UserError(f"wrong shape of {where}", tuple(block.shape), f"the config needs {shape}")
    how = planned.quantization_of(level)
    try:
        array = stored_block(block, planned.dtype)
        arrays = [array] if how is None else quantize_block(array, planned.memory, how)
    except ValueError as error:
        raise UserError(
            f"{where} cannot be stored",
            error,
            "use bfloat16 or float32, another quantisation, or mend the training run",
        ) from None
    return bytes_of_parts(arrays, planned.parts(level))


def stored_block(block: np.ndarray | mx.array, dtype: str) -> mx.array:
    """The block in the bank's dtype; ValueError if it is not finite in it."""
    array = mx.array(block) if isinstance(block, np.ndarray) else block
    array = array.astype(STORED_TYPES[dtype].dtype)
    if not all_finite(array):
        raise ValueError(f"not finite in {dtype}")
    return array


def bytes_of_parts(arrays: Sequence[mx.array], parts: Sequence[Part]) -> Stored:
    return [
        memoryview(mx.contiguous(array).view(part.bits).reshape(-1)).cast("B")  # type: ignore[arg-type]
        for array, part in zip(arrays, parts, strict=True)
    ]


def shard_cuts(
    level: Level, total: int, shard_bytes: int = SHARD_BYTES, before: Sequence[Shard] = ()
) -> list[Shard]:
    """How the ``total`` blocks of a level are cut into shards of at most ``shard_bytes``, which
    have no checksums yet. Those of ``before`` come first, unless they hold more blocks than that.
    """
    cuts = list(before) if sum(shard.num_clusters for shard in before) <= total else []
    most = _blocks_of_shard(level, shard_bytes)
    for first in range(sum(shard.num_clusters for shard in cuts), total, most):
        count = min(most, total - first)
        name = shard_name(level.level, len(cuts))
        cuts.append(Shard(name, first, count, PAGE + count * level.block_stride, ""))
    return cuts


def _blocks_of_shard(level: Level, shard_bytes: int) -> int:
    return max(1, (shard_bytes - PAGE) // level.block_stride)


def planned_bytes(planned: Manifest) -> int:
    """Bytes of the files of a bank that is to be written, without its manifest."""
    return sum(level_bytes(planned.memory, level) for level in planned.all_levels)


def level_bytes(memory: MemoryConfig, level: Level) -> int:
    """Bytes of the files of a level that is to be written."""
    blocks = num_blocks(memory, level.level)
    shards = -(-blocks // _blocks_of_shard(level, SHARD_BYTES))  # listed they may be millions
    return shards * PAGE + blocks * level.block_stride


def write_shard(
    folder: Path,
    planned: Manifest,
    level: Level,
    cut: Shard,
    blocks: Iterator[Stored | None],
    bar: tqdm,
) -> Shard:
    """Writes one shard whole or not at all; it comes back with its checksums."""
    with atomic_file(folder / cut.file) as file:
        file.write(shard_header(planned, level.level, cut))
        sums = [_write_block(file, next(blocks), level, bar) for _ in range(cut.num_clusters)]
        file.truncate(cut.bytes)
    return replace(cut, xxh3="".join(sums))


def _write_block(file: BinaryIO, block: Stored | None, level: Level, bar: tqdm) -> str:
    """Writes one block, or leaves a hole, and moves to the next; returns its checksum in hex."""
    start, digest = file.tell(), xxhash.xxh3_64()
    for part in block or ():
        file.write(part)
        digest.update(part)
    file.seek(start + level.block_stride)
    bar.update()
    return level.zeros if block is None else digest.hexdigest()
