"""What memory needs to know of an anchor's layer, and the way it joins it.

A module's class is replaced by a subclass that adds the memory's part, so the anchor's parameter
names, and with them its files, stay as they are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hmem.memory.packed import Packed, Piece, Rows

# The rows of one layer at the moment of the call, (rows, R, width) or (batch, rows, R, width) for
# each group; None for the anchor alone. Given what the layer has computed so far: while the rows
# are still on their way from the disk, that is evaluated.
LayerMemory = Callable[[mx.array], Rows | None]
Activation = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Projection:
    """A linear module, or ``size`` outputs from ``start`` on of one that serves several."""

    module: nn.Module
    start: int
    size: int


@dataclass(frozen=True)
class FFNLayer:
    """The feed-forward network of a layer; ``gate`` is None where it has none."""

    module: nn.Module
    activation: Activation
    gate: Projection | None
    up: Projection
    down: Projection


@dataclass(frozen=True)
class AttentionLayer:
    """``query_norm`` is applied to queries before RoPE, to each head or to all of them at once."""

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    num_heads: int
    scale: float
    query_norm: nn.Module | None


@dataclass(frozen=True)
class AnchorLayer:
    """One layer of an anchor; a part that memory cannot join is a text that says what it is."""

    index: int
    ffn: FFNLayer | str
    attention: AttentionLayer | str


@dataclass(frozen=True)
class MemoryKind:
    """A kind of memory. ``joins``: the parts of the layer that it changes, attention, ffn or both.

    ``initial`` gives starting values without effect for shapes (layers, rows, r, width), one a
    group, as float32 arrays; ``attach`` makes a layer use a memory from its next call on.
    """

    joins: tuple[str, ...]
    initial: Callable[[Sequence[tuple[int, ...]], np.random.Generator], list[np.ndarray]]
    attach: Callable[[AnchorLayer, LayerMemory], None]


def extend(module: nn.Module, call: Callable[..., mx.array]) -> None:
    """Makes ``module(x, ...)`` return ``call(before, x, ...)``, ``before`` being what it did."""
    base: Any = type(module)

    def extended(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        return call(lambda *a, **k: base.__call__(self, *a, **k), *args, **kwargs)

    module.__class__ = type(base.__name__, (base,), {"__call__": extended, "has_memory": True})


def product(x: mx.array, matrix: Piece, transpose: bool = True) -> mx.array:
    """``x`` times the transpose of a matrix (R, width) or (batch, R, width), packed or not:
    (batch, time, width) to (batch, time, R); without ``transpose`` the other way."""
    if isinstance(matrix, Packed):
        return matrix.product(x, transpose)
    return x @ (matrix.swapaxes(-1, -2) if transpose else matrix)


def with_product(output: mx.array, inner: mx.array, matrix: Piece, alpha: float = 1.0) -> mx.array:
    """``output + alpha · inner @ matrix``, in one launch where that is not packed. ``output``
    (batch, time, width), ``inner`` (batch, time, R), ``matrix`` (R, width), or (batch, R, width).
    """
    if isinstance(matrix, Packed):
        inner = inner if alpha == 1 else alpha * inner
        return output + product(inner, matrix, transpose=False)
    if matrix.ndim > 2 or output.ndim < 3 or len(output) == 1:
        return mx.addmm(output, inner, matrix, alpha)
    # Else MLX takes one matrix for each row of the batch, and so many for its gradient.
    flat = mx.addmm(output.flatten(0, -2), inner.flatten(0, -2), matrix, alpha)
    return flat.reshape(output.shape)


def truncated_normal(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Normal at σ = width^-1/2, drawn again beyond 3σ; the width is the last axis."""
    draws = rng.standard_normal(shape, np.float32)
    while (outside := np.abs(draws) > 3).any():
        draws[outside] = rng.standard_normal(int(outside.sum()), np.float32)
    return draws * shape[-1] ** -0.5


def random_but_the_last(
    shapes: Sequence[tuple[int, ...]], rng: np.random.Generator
) -> list[np.ndarray]:
    """Starting values of one group: truncated normal, of each unit the last row zero."""
    ((layers, count, r, width),) = shapes
    block = np.zeros((layers, count, r, width), np.float32)
    block[:, :-1] = truncated_normal((layers, count - 1, r, width), rng)
    return [block]
