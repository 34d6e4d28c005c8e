"""FFN memory: r more inner units in every FFN (paper, section 3), the kind the paper settles on.

A block holds, for each layer, gate, up and the *transposed* down matrix, each r × hidden, so that
blocks join by concatenation along r and a slice of a joined memory allocates nothing. Adding the
output of this small FFN equals widening the anchor's own FFN by the fetched rows. An FFN without a
gate gets units without one: up and down alone.
"""

from collections.abc import Callable

import mlx.core as mx

from mlx_hmem.memory.layer import (
    Activation,
    AnchorLayer,
    FFNLayer,
    LayerMemory,
    MemoryKind,
    extend,
    random_but_the_last,
)


def ffn_memory(x: mx.array, rows: mx.array, activation: Activation) -> mx.array:
    """Output of one layer's memory, to be added to the output of its FFN.

    Args:
        x: the FFN's input, (batch, time, hidden).
        rows: (3, R, hidden), one memory for all rows of the batch, or (batch, 3, R, hidden);
            2 in place of 3 for an FFN without a gate.
        activation: the anchor's own, SiLU for SwiGLU.
    """
    count, num_rows, hidden = rows.shape[-3:]
    if count == 2:
        return activation(x @ rows[..., 0, :, :].swapaxes(-1, -2)) @ rows[..., 1, :, :]
    # Gate and up in one matrix product: two small ones cost twice the launches.
    gate_up = rows[..., :2, :, :].reshape(*rows.shape[:-3], 2 * num_rows, hidden)
    gate, up = mx.split(x @ gate_up.swapaxes(-1, -2), 2, axis=-1)
    return (activation(gate) * up) @ rows[..., 2, :, :]


def _attach(layer: AnchorLayer, memory: LayerMemory) -> None:
    assert isinstance(layer.ffn, FFNLayer)
    activation = layer.ffn.activation

    def call(before: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        output = before(x)
        rows = memory(output)
        if rows is None:
            return output
        return output + ffn_memory(x, rows[0].astype(x.dtype), activation)

    extend(layer.ffn.module, call)


FFN = MemoryKind(("ffn",), random_but_the_last, _attach)  # down is the last
