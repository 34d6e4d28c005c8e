"""A bank of blocks that are given level by level."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.bank import Manifest, Quantization, rewrite_bank
from mlx_hmem.config import MemoryConfig


def write_bank(
    folder: str | Path,
    config: MemoryConfig,
    levels: Sequence[Iterable[Any] | None],
    generic: Any,
    *,
    dtype: str = "float16",
    anchor_hash: str,
    tree_hash: str,
    quantization: Sequence[Quantization] | None = None,
    **options: Any,
) -> Manifest:
    """``levels``: the blocks of each, in order of cluster; None where r is 0."""
    chosen = tuple(sorted(quantization or (), key=lambda q: q.level)) or None
    planned = Manifest.planned(config, dtype, chosen, anchor_hash, tree_hash)
    sources = [iter(blocks if blocks is not None else ()) for blocks in ([generic], *levels)]
    return rewrite_bank(folder, planned, lambda level, _: next(sources[level]), **options)
