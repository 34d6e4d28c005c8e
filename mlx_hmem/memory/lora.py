"""LoRA memory: a rank-r patch on an anchor's projections.

A patched projection W adds α · B (A x) (paper, section 3): A is r × inputs, B, kept transposed, r ×
outputs. Blocks of several levels join along r: their patches add up.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory.layer import (
    AnchorLayer,
    LayerMemory,
    MemoryKind,
    Projection,
    extend,
    product,
    with_product,
)
from mlx_hmem.memory.packed import Piece, Rows, cast, each, pieces

ALPHA = 2.0
ATTENTION = ("query", "key", "value", "output")


class Row(NamedTuple):
    """Where a matrix lies in the rows of a layer."""

    group: int
    place: int


def lora(config: MemoryConfig) -> MemoryKind:
    """The patches of the projections that ``config`` names."""
    groups = enumerate(config.matrices.values())
    rows = {name: Row(g, place) for g, names in groups for place, name in enumerate(names)}
    part_of = {name: "attention" if name in ATTENTION else "ffn" for name in config.patched}

    def initial(shapes: Sequence[tuple[int, ...]], rng: np.random.Generator) -> list[np.ndarray]:
        # A uniform within ± inputs^-1/2 (Kaiming with a = √5, as LoRA starts), B zero.
        groups = [np.zeros(shape, np.float32) for shape in shapes]
        for name in config.patched:
            group, place = rows[f"{name}_a"]
            layers, _, r, width = shapes[group]
            draws = rng.uniform(-1, 1, (layers, r, width)).astype(np.float32)
            groups[group][:, place] = draws * width**-0.5
        return groups

    def attach(layer: AnchorLayer, memory: LayerMemory) -> None:
        for name, part in part_of.items():
            projection = getattr(getattr(layer, part), name)
            _patch(projection, memory, rows[f"{name}_a"], rows[f"{name}_b"])

    return MemoryKind(tuple(dict.fromkeys(part_of.values())), initial, attach)


def _patch(projection: Projection, memory: LayerMemory, a: Row, b: Row) -> None:
    def call(before: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        output = before(x)
        rows = memory(output)
        if rows is None:
            return output
        after = output.shape[-1] - projection.start - projection.size
        sides: Any = [(0, 0)] * (x.ndim - 1) + [(projection.start, after)]
        for down, up in zip(_matrices(rows, a, x.dtype), _matrices(rows, b, x.dtype), strict=True):
            inner = product(x, down)
            if not projection.start and not after:
                output = with_product(output, inner, up, ALPHA)
            else:  # one matrix serves several projections
                output = output + mx.pad(product(ALPHA * inner, up, transpose=False), sides)
        return output

    extend(projection.module, call)


def _matrices(rows: Rows, row: Row, dtype: mx.Dtype) -> tuple[Piece, ...]:
    """A matrix (..., R, width), in pieces where levels are quantised in different ways."""
    return pieces(each(lambda a: a[..., row.place, :, :], cast(rows[row.group], dtype)))
