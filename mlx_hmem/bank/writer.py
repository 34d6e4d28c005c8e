"""Writes a memory bank, block by block, in memory bounded by one block.

Every file is written beside its place, synced and renamed, and ``bank.json`` comes last: a killed
run leaves shards but no bank. A block of zeros given as None becomes a hole in the file and costs
neither time nor, on most file systems, disk space.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

import mlx.core as mx
import numpy as np
import xxhash
from tqdm import tqdm

from mlx_hmem.bank.format import (
    FORMAT_VERSION,
    GENERIC,
    MANIFEST,
    PAGE,
    STORED_TYPES,
    Level,
    Manifest,
    RowType,
    Shard,
    block_parts,
    block_shape,
    num_blocks,
    row_type,
    shard_header,
    shard_name,
    stored_levels,
    stored_r,
)
from mlx_hmem.bank.quantization import Part, Quantization, check_quantization, quantize_block
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, write_atomic

# The unit in which a bank is copied or downloaded: of the paper's 9.2 GB for OpenLM-160M one route
# needs 184 MB in shards of 64 MiB, 5.9 GB in shards of 4 GiB (docs/bank_format.md).
SHARD_BYTES = 64 << 20
Block = np.ndarray | mx.array | None


def write_bank(
    folder: str | Path,
    config: MemoryConfig,
    levels: Sequence[Iterable[Block] | None],
    generic: Block,
    *,
    dtype: str = "float16",
    anchor_hash: str,
    tree_hash: str,
    quantization: Sequence[Quantization] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Writes a whole bank into ``folder``, which must not hold one yet.

    Args:
        levels: one entry per level, coarsest first: its blocks in order of cluster, each of
            ``config.block_shape(level)`` in any float type, or None for a block of zeros. The
            entry of a level with r = 0 is not looked at.
        generic: a block of ``config.shape_of(sum(config.r))``, or None for zeros.
        dtype: ``float32``, ``float16`` or ``bfloat16``; blocks are rounded to it,
            and quantised ones come back in it.
        anchor_hash: fingerprint of the anchor's weights; tree_hash: of the tree's file.
        quantization: the levels that are stored quantised, and how; level 0 is the generic memory.
        shard_bytes: a file is cut, between blocks, before it grows beyond this.

    Raises:
        UserError: a bank is there already; a block has another shape or is not finite in
            ``dtype`` or is lost in the quantisation; a level has too few or too many blocks; rows
            cannot be cut into groups of ``group_size``.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise UserError("a bank is already there", folder, "choose another folder or delete it")
    if dtype not in STORED_TYPES:
        raise UserError("unknown bank dtype", dtype, f"use one of {', '.join(STORED_TYPES)}")
    if len(levels) != config.num_levels:
        raise UserError(
            "the bank needs the blocks of each level", len(levels), f"give {config.num_levels}"
        )
    by_level = {q.level: q for q in quantization or ()}
    chosen = tuple(sorted(quantization or (), key=lambda q: q.level)) or None
    check_quantization(chosen, config, stored_r(config))
    total = sum(num_blocks(config, level) for level in stored_levels(config))
    done = {}
    with tqdm(total=total, desc="writing bank", unit="block", delay=2) as progress:
        for number in stored_levels(config):
            source = [generic] if number == GENERIC else levels[number - 1]
            how = by_level.get(number)
            blocks = _encoded(source, config, number, dtype, how, progress)
            layout = Level.layout(config, number, dtype, how)
            row = row_type(layout, dtype, how)
            meta = shard_metadata(number, anchor_hash)
            done[number] = _write_level(folder, config, layout, row, blocks, meta, shard_bytes)
    return write_manifest(folder, config, done, dtype, chosen, anchor_hash, tree_hash)


def write_manifest(
    folder: Path,
    config: MemoryConfig,
    levels: Mapping[int, Level],
    dtype: str,
    quantization: tuple[Quantization, ...] | None,
    anchor_hash: str,
    tree_hash: str,
) -> Manifest:
    """Writes ``bank.json`` when all shards are there; ``levels`` by number, GENERIC among them."""
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        memory=config,
        dtype=dtype,
        quantization=quantization,
        byte_order="little",
        page_size=PAGE,
        anchor_hash=anchor_hash,
        tree_hash=tree_hash,
        levels=tuple(level for number, level in levels.items() if number != GENERIC),
        generic=levels[GENERIC],
    )
    write_atomic(folder / MANIFEST, manifest.to_json())
    return manifest


def shard_metadata(level: int, anchor_hash: str) -> dict[str, str]:
    """What a shard's header says for people; cut so that it always fits its page."""
    return {"format": "mlx_hmem bank", "level": str(level), "anchor_hash": anchor_hash[:100]}


def encode_block(
    block: np.ndarray | mx.array,
    config: MemoryConfig,
    level: int,
    dtype: str,
    quantization: Quantization | None,
) -> list[memoryview]:
    """The bytes of a block's parts as the bank stores them, rounded to nearest, ties to even.

    Raises ValueError: it is not finite in ``dtype``, or lost in the quantisation.
    """
    array = stored_block(block, dtype)
    arrays = [array] if quantization is None else quantize_block(array, config, quantization)
    return bytes_of_parts(arrays, block_parts(config, level, dtype, quantization))


def stored_block(block: np.ndarray | mx.array, dtype: str) -> mx.array:
    """The block in the bank's dtype; ValueError if it is not finite in it."""
    array = mx.array(block) if isinstance(block, np.ndarray) else block
    array = array.astype(STORED_TYPES[dtype].dtype)
    if not mx.all(mx.isfinite(array)).item():
        raise ValueError(f"not finite in {dtype}")
    return array


def bytes_of_parts(arrays: Sequence[mx.array], parts: Sequence[Part]) -> list[memoryview]:
    return [
        memoryview(mx.contiguous(array).view(part.bits).reshape(-1)).cast("B")  # type: ignore[arg-type]
        for array, part in zip(arrays, parts, strict=True)
    ]


def _encoded(
    source: Iterable[Block] | None,
    config: MemoryConfig,
    level: int,
    dtype: str,
    quantization: Quantization | None,
    progress: tqdm,
) -> Iterator[list[memoryview] | None]:
    """Checks and converts the blocks of one level; counts that there are neither more nor fewer."""
    shape, count = block_shape(config, level), 0
    expected = num_blocks(config, level)
    for cluster, block in enumerate(source if source is not None else ()):
        if cluster == expected:
            raise UserError(f"too many blocks on level {level}", f"over {expected}", "check r")
        if block is not None and tuple(block.shape) != shape:
            raise UserError(
                f"wrong shape of block {cluster} on level {level}",
                tuple(block.shape),
                f"the config needs {shape}",
            )
        try:
            data = (
                None if block is None else encode_block(block, config, level, dtype, quantization)
            )
        except ValueError as error:
            raise UserError(
                f"block {cluster} on level {level} cannot be stored",
                error,
                "use bfloat16 or float32, another quantisation, or mend the training run",
            ) from None
        yield data
        progress.update()
        count += 1
    if count < expected:
        raise UserError(f"too few blocks on level {level}", count, f"give {expected}")


def _write_level(
    folder: Path,
    config: MemoryConfig,
    layout: Level,
    row: RowType,
    blocks: Iterator[list[memoryview] | None],
    metadata: dict[str, str],
    shard_bytes: int,
) -> Level:
    shards = tuple(
        write_shard(folder, layout, row, cut, blocks, metadata)
        for cut in shard_cuts(layout, num_blocks(config, layout.level), shard_bytes)
    )
    next(blocks, None)  # an iterator that still has blocks is refused
    return replace(layout, shards=shards)


class Cut(NamedTuple):
    """The blocks of one shard, which is number ``shard`` of its level."""

    shard: int
    first_cluster: int
    num_clusters: int


def shard_cuts(layout: Level, total: int, shard_bytes: int = SHARD_BYTES) -> list[Cut]:
    """How the ``total`` blocks of a level are cut into shards of at most ``shard_bytes``."""
    most = max(1, (shard_bytes - PAGE) // layout.block_stride)
    starts = range(0, total, most)
    return [Cut(shard, first, min(most, total - first)) for shard, first in enumerate(starts)]


@lru_cache
def checksum_of_zeros(num_bytes: int) -> str:
    """The checksum of a block that is a hole."""
    return xxhash.xxh3_64_hexdigest(bytes(num_bytes))


def write_shard(
    folder: Path,
    layout: Level,
    row: RowType,
    cut: Cut,
    blocks: Iterator[list[memoryview] | None],
    metadata: dict[str, str],
) -> Shard:
    """Writes one shard whole or not at all; takes its blocks, and no more, from ``blocks``.

    A block is the bytes of its parts (:func:`encode_block`), or None for zeros.
    """
    zeros = checksum_of_zeros(layout.block_bytes)
    name, (_, first, count) = shard_name(layout.level, cut.shard), cut
    size = PAGE + count * layout.block_stride
    header = shard_header(layout, row, count, {**metadata, "first_cluster": str(first)})
    with atomic_file(folder / name) as file:
        file.write(header)
        sums = [_write_block(file, next(blocks), layout, zeros) for _ in range(count)]
        file.truncate(size)
    return Shard(name, first, count, size, "".join(sums))


def _write_block(file: BinaryIO, data: list[memoryview] | None, layout: Level, zeros: str) -> str:
    """Writes one block, or leaves a hole, and moves to the next; returns its checksum in hex."""
    start, digest = file.tell(), xxhash.xxh3_64()
    for part in data or ():
        file.write(part)
        digest.update(part)
    file.seek(start + layout.block_stride)
    return zeros if data is None else digest.hexdigest()
