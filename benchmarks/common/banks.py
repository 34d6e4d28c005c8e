"""Random memory banks of the paper's shapes, made on the spot.

A bank of 4.6 to 21.1 billion parameters holds real values only in the blocks that will be read; all
others are holes in sparse files, so that 42 GB take the disk the few hundred megabytes of those
blocks. What is measured does not notice: a read of one block touches no other.
"""

import math
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from mlx_hmem.anchors.openlm import PRESETS
from mlx_hmem.bank import Manifest, Quantization, stored_levels, write_bank
from mlx_hmem.config import ClusterPath, MemoryConfig

BRANCHING = (16, 16, 16, 16)
Anchor = Literal["openlm-160m", "openlm-410m", "openlm-1b"]
Bits = Literal[16, 8, 4]
# r of each level (paper, section 6): 4.6, 12.7 and 21.1 billion parameters.
R: dict[str, tuple[int, ...]] = {
    "openlm-160m": (256, 64, 16, 0),
    "openlm-410m": (512, 128, 32, 0),
    "openlm-1b": (768, 256, 16, 0),
}
ANCHORS: tuple[Anchor, ...] = get_args(Anchor)
BITS: tuple[Bits, ...] = get_args(Bits)
GROUP = 64  # values that share a scale and a bias

Key = tuple[int, int]  # (level, cluster)


def paper_config(anchor: str, branching: tuple[int, ...] = BRANCHING) -> MemoryConfig:
    args = PRESETS[anchor]
    return MemoryConfig(args.hidden_size, args.num_hidden_layers, R[anchor], branching)


def spread_paths(config: MemoryConfig, count: int) -> list[ClusterPath]:
    """Paths spread over the bank; as far as there are so many, each in another level-1 cluster."""
    last = config.num_clusters[-1]
    return [config.path_to(config.num_levels, last * i // count + i) for i in range(count)]


def sibling(config: MemoryConfig, path: ClusterPath, level: int) -> ClusterPath:
    """A path that differs from ``path`` on ``level`` and all deeper levels, and on none above."""
    below = math.prod(config.branching[level:])
    first = (path[level - 2] if level > 1 else 0) * config.branching[level - 1]
    cluster = first + (path[level - 1] - first + 1) % config.branching[level - 1]
    return config.path_to(config.num_levels, cluster * below)


def keys_of(config: MemoryConfig, paths: Iterable[ClusterPath]) -> set[Key]:
    """The blocks of some paths."""
    return {(n, i) for path in paths for n, i in enumerate(path, 1) if config.r[n - 1]}


def make_bank(
    folder: Path,
    config: MemoryConfig,
    filled: Collection[Key],
    bits: int = 16,
    anchor_hash: str = "none",
    tree_hash: str = "none",
    shard_bytes: int = 64 << 20,
) -> Manifest:
    """A bank with normal values in the blocks of ``filled`` and holes for all others; ``bits``: in
    mode affine on all levels, or 16 for bfloat16 as it is."""
    rng = np.random.default_rng(0)

    def blocks(level: int) -> Iterator[np.ndarray | None]:
        shape = config.block_shape(level)
        for cluster in range(config.num_clusters[level - 1]):
            wanted = (level, cluster) in filled
            yield rng.standard_normal(shape, np.float32) if wanted else None

    levels = [blocks(level) if r else None for level, r in enumerate(config.r, 1)]
    how = None
    if bits < 16:
        how = [Quantization(level, "affine", bits, GROUP) for level in stored_levels(config)]
    return write_bank(
        folder,
        config,
        levels,
        None,
        dtype="bfloat16",
        anchor_hash=anchor_hash,
        tree_hash=tree_hash,
        quantization=how,
        shard_bytes=shard_bytes,
    )


class FilePart(NamedTuple):
    """Where a block lies."""

    file: Path
    offset: int
    nbytes: int


def file_parts(folder: Path, manifest: Manifest, keys: Iterable[Key]) -> list[FilePart]:
    """Where blocks lie, worked out from the manifest alone."""
    levels = {level.level: level for level in manifest.levels}
    parts = []
    for number, cluster in keys:
        level = levels[number]
        shard = level.shards[level.shard_of(cluster)]
        offset = manifest.page_size + (cluster - shard.first_cluster) * level.block_stride
        parts.append(FilePart(folder / shard.file, offset, level.block_bytes))
    return parts
