"""FFN memory: r more inner units in every gated FFN (paper, section 3).

A block holds, for each layer, gate, up and the *transposed* down matrix, each r × hidden, so that
blocks join by concatenation along r and a slice of a joined memory allocates nothing. Adding the
output of this small FFN equals widening the anchor's own FFN by the fetched rows.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

Activation = Callable[[mx.array], mx.array]


def ffn_memory(x: mx.array, rows: mx.array, activation: Activation) -> mx.array:
    """Output of one layer's memory, to be added to the output of its FFN.

    Args:
        x: the FFN's input, (batch, time, hidden).
        rows: (3, R, hidden), one memory for all rows of the batch, or (batch, 3, R, hidden).
        activation: the anchor's own, SiLU for SwiGLU.
    """
    num_rows, hidden = rows.shape[-2:]
    # Gate and up in one matrix product: two small ones cost twice the launches.
    gate_up = rows[..., :2, :, :].reshape(*rows.shape[:-3], 2 * num_rows, hidden)
    gate, up = mx.split(x @ gate_up.swapaxes(-1, -2), 2, axis=-1)
    return (activation(gate) * up) @ rows[..., 2, :, :]


def initial_block(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A block with no effect: gate and up truncated normal at 3σ, σ = hidden^-1/2; down zero.

    Returns float32 of ``shape`` = (layers, 3, r, hidden).
    """
    layers, _, r, hidden = shape
    block = np.zeros(shape, np.float32)
    draws = rng.standard_normal((layers, 2, r, hidden), np.float32)
    while (outside := np.abs(draws) > 3).any():
        draws[outside] = rng.standard_normal(int(outside.sum()), np.float32)
    block[:, :2] = draws * hidden**-0.5
    return block
