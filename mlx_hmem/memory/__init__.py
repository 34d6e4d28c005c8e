"""What a block is: its parts, its starting values, how it joins a layer.

One module per family of kinds, all behind :class:`mlx_hmem.memory.layer.MemoryKind`. Arrays come in
as arguments: nothing here knows of the bank.

*Rows* is a memory: for each group of equally wide rows (``MemoryConfig.groups``) one array (layers,
rows, R, width), R being the sum of r over the fetched levels, with a batch axis in front where each
row of a batch has its own. Quantised ones may stay packed (:mod:`mlx_hmem.memory.packed`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, overload

import mlx.core as mx
import numpy as np

from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory.ffn import FFN
from mlx_hmem.memory.kv import KV
from mlx_hmem.memory.layer import MemoryKind
from mlx_hmem.memory.lora import lora
from mlx_hmem.memory.packed import Rows, arrays_of, floats, joined, ready, stacked

Source = Literal["disk", "cache", "resident"]
Floats = tuple[mx.array, ...]
Block = mx.array | Rows  # all values in one array; or the groups of rows, of a quantised one packed


def kind_of(config: MemoryConfig) -> MemoryKind:
    """How the memory of a config starts and joins a layer."""
    return lora(config) if config.patched else {"ffn": FFN, "kv": KV}[config.kind]


def group_shapes(config: MemoryConfig, r: int) -> list[tuple[int, ...]]:
    """(layers, rows, r, width) of each group of a block with multiplier ``r``."""
    return [(config.num_memory_layers, rows, r, width) for rows, width in config.groups]


def split_block(block: mx.array, config: MemoryConfig) -> Floats:
    """The groups of a block, each (..., layers, rows, r, width); axes in front stay."""
    if len(config.groups) == 1:
        return (block,)
    r = block.shape[-1] // sum(rows * width for rows, width in config.groups)
    parts, start = [], 0
    for rows, width in config.groups:
        part = block[..., start : start + rows * r * width]
        parts.append(part.reshape(*block.shape[:-1], rows, r, width))
        start += rows * r * width
    return tuple(parts)


def whole_block(groups: Sequence[np.ndarray]) -> np.ndarray:
    """The block that :func:`split_block` splits into ``groups``, each (layers, rows, r, width)."""
    if len(groups) == 1:
        return groups[0]
    return np.concatenate([group.reshape(len(group), -1) for group in groups], axis=1)


def float_block(block: Block) -> mx.array:
    """The values of a block (``MemoryConfig.shape_of``), in the dtype that it stands for."""
    if isinstance(block, mx.array):
        return block
    groups = [floats(group) for group in block]
    if len(groups) == 1:
        return groups[0]
    return mx.concatenate([group.reshape(len(group), -1) for group in groups], axis=1)


@overload
def join_blocks(blocks: Sequence[mx.array], config: MemoryConfig) -> Floats: ...
@overload
def join_blocks(blocks: Sequence[Block], config: MemoryConfig) -> Rows: ...
def join_blocks(blocks: Sequence[Any], config: MemoryConfig) -> Any:
    """The blocks of several levels side by side along r."""
    levels = (b if isinstance(b, tuple) else split_block(b, config) for b in blocks)
    return tuple(joined(groups) for groups in zip(*levels, strict=True))


def stack_rows(memories: Sequence[Rows | None]) -> Rows | None:
    """Several memories with a batch axis in front, one as it is; None where all are.

    Where one has fewer rows than another there are zeros, which add nothing.
    """
    some = [memory for memory in memories if memory is not None]
    if len(memories) == 1 or not some:
        return some[0] if some else None
    nothing = (None,) * len(some[0])
    groups = zip(*(memory or nothing for memory in memories), strict=True)
    return tuple(stacked(group) for group in groups)


def initial_block(config: MemoryConfig, r: int, rng: np.random.Generator) -> np.ndarray:
    """A float32 block of multiplier ``r`` that has no effect on the anchor."""
    return whole_block(kind_of(config).initial(group_shapes(config, r), rng))


@dataclass(frozen=True)
class BlockRead:
    """Where a block of a fetched memory came from; level 0 is the generic memory."""

    level: int
    cluster: int
    bytes: int
    source: Source


@dataclass(frozen=True, repr=False, eq=False)  # told apart by identity
class FetchedMemory:
    """The blocks of one cluster path.

    ``stored[l]`` is the block of level l + 1, or None where the level has no memory or its cluster
    is blocked. The generic memory is one block of sum(r) rows.
    ``reads`` says where each came from, ``damage`` of each that was left out, in one line, why.
    """

    stored: tuple[Block | None, ...]
    config: MemoryConfig
    reads: tuple[BlockRead, ...] = ()
    damage: tuple[str, ...] = ()

    @cached_property
    def blocks(self) -> tuple[mx.array | None, ...]:
        """The blocks as floats, each of its ``config.block_shape``."""
        return tuple(None if block is None else float_block(block) for block in self.stored)

    @cached_property
    def rows(self) -> Floats | None:
        """The blocks joined as floats, one array per group; None if nothing was fetched."""
        present = [block for block in self.blocks if block is not None]
        return join_blocks(present, self.config) if present else None

    def ready(self, dtype: mx.Dtype) -> Rows | None:
        """The blocks joined for use in ``dtype``, packed where the device multiplies them so; None
        if nothing was fetched."""
        present = [block for block in self.stored if block is not None]
        return ready(join_blocks(present, self.config), dtype) if present else None

    def __repr__(self) -> str:
        present = [block for block in self.stored if block is not None]
        arrays = [array for block in present for array in arrays_of(block)]
        where = [
            f"level {r.level} cluster {r.cluster}" if r.level else "generic" for r in self.reads
        ]
        nbytes = sum(array.nbytes for array in arrays)
        dtype = str(arrays[0].dtype).removeprefix("mlx.core.") if present else "nothing"
        return (
            f"FetchedMemory({self.config.kind}, {', '.join(where) or f'{len(present)} blocks'}, "
            f"{nbytes:,} bytes of {dtype})"
        )
