"""FFN memory: r more inner units in every FFN (paper, section 3), the kind the paper settles on.

A block holds, for each layer, gate, up and the *transposed* down matrix, each r × hidden, so that
blocks join by concatenation along r and a slice of a joined memory allocates nothing. Adding the
output of this small FFN equals widening the anchor's own FFN by the fetched rows. An FFN without a
gate gets units without one: up and down alone.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_hmem.memory.layer import (
    Activation,
    AnchorLayer,
    FFNLayer,
    LayerMemory,
    MemoryKind,
    extend,
    product,
    random_but_the_last,
    with_product,
)
from mlx_hmem.memory.packed import Piece, cast, each, pieces, shape_of


def add_ffn_memory(output: mx.array, x: mx.array, rows: Piece, activation: Activation) -> mx.array:
    """``output`` of a layer's FFN with that of its memory added.

    Args:
        x: the FFN's input, (batch, time, hidden).
        rows: (3, R, hidden), one memory for all rows of the batch, or (batch, 3, R, hidden);
            2 in place of 3 for an FFN without a gate.
        activation: the anchor's own, SiLU for SwiGLU.
    """
    if shape_of(rows)[-3] == 2:
        inner = activation(product(x, _matrix(rows, 0)))
    else:
        # Gate and up in one matrix product, activation and product in one kernel, the sum in the
        # last product: three launches a layer, where decoding is little but launches.
        gate_up = each(lambda a: a[..., :2, :, :].flatten(-3, -2), rows)
        inner = _gated(activation)(*mx.split(product(x, gate_up), 2, axis=-1))
    return with_product(output, inner, _matrix(rows, -1))


def _matrix(rows: Piece, place: int) -> Piece:
    return each(lambda a: a[..., place, :, :], rows)


@cache
def _gated(activation: Activation) -> Callable[[mx.array, mx.array], mx.array]:
    """The inner units of a gated FFN, of gate and up."""

    def inner(gate: mx.array, up: mx.array) -> mx.array:
        return activation(gate) * up

    compiled: Any = mx.compile(inner, shapeless=True)
    return compiled


def _attach(layer: AnchorLayer, memory: LayerMemory) -> None:
    assert isinstance(layer.ffn, FFNLayer)
    activation = layer.ffn.activation

    def call(before: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        output = before(x)
        rows = memory(output)
        if rows is None:
            return output
        for piece in pieces(cast(rows[0], x.dtype)):
            output = add_ffn_memory(output, x, piece, activation)
        return output

    extend(layer.ffn.module, call)


FFN = MemoryKind(("ffn",), random_but_the_last, _attach)  # down is the last
