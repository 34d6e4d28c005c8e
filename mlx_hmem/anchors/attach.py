"""Attaches memory to an anchor: its own architecture's or any gated-FFN model of mlx-lm.

The class of each layer's FFN is replaced by a subclass that adds the memory's output, so the
anchor's parameter names, and with them its files, stay as they are. The memory of the moment lies
in a slot that all layers share. A compiled or differentiated function must set the slot from one
of its own arguments: an array that was there before tracing would be frozen into the graph.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory.ffn import Activation, ffn_memory

# Where each architecture keeps the gated FFN of a layer, and its activation.
FFN_OF_ARCHITECTURE: dict[str, tuple[str, Activation]] = {
    "openlm": ("mlp", nn.silu),
    "llama": ("mlp", nn.silu),
    "mistral": ("mlp", nn.silu),
    "qwen2": ("mlp", nn.silu),
    "qwen3": ("mlp", nn.silu),
    "olmo2": ("mlp", nn.silu),
    "smollm3": ("mlp", nn.silu),
    "gemma3_text": ("mlp", nn.gelu_approx),
}


class MemorySlot:
    """Holds the memory that the attached layers use: rows (layers, 3, R, hidden) for the whole
    batch, (batch, layers, 3, R, hidden) for one memory per row, or None for the anchor alone."""

    def __init__(self, config: MemoryConfig):
        self.config = config
        self.rows: mx.array | None = None

    def set(self, rows: mx.array | None) -> None:
        shape = (self.config.num_hidden_layers, 3, self.config.hidden_size)
        if rows is not None and (
            rows.ndim not in (4, 5) or (*rows.shape[-4:-2], rows.shape[-1]) != shape
        ):
            raise UserError(
                "the memory does not fit the anchor",
                f"memory {rows.shape}, anchor of {shape[0]} layers and hidden size {shape[2]}",
                "fetch it from a bank made for this anchor",
            )
        self.rows = rows

    @contextmanager
    def using(self, rows: mx.array | None) -> Iterator[None]:
        """The memory for the calls inside the ``with`` block; what was there before comes back."""
        before = self.rows
        self.set(rows)
        try:
            yield
        finally:
            self.rows = before

    def of_layer(self, index: int) -> mx.array | None:
        return None if self.rows is None else self.rows[..., index, :, :, :]


def attach_memory(anchor: nn.Module, config: MemoryConfig) -> MemorySlot:
    """Makes every FFN of ``anchor`` add the memory in the returned slot, which starts empty."""
    architecture = getattr(anchor, "model_type", type(anchor).__name__)
    if architecture not in FFN_OF_ARCHITECTURE:
        raise UserError(
            "no memory can be attached to this architecture",
            architecture,
            f"use one of {', '.join(FFN_OF_ARCHITECTURE)}",
        )
    name, activation = FFN_OF_ARCHITECTURE[architecture]
    layers = anchor.layers
    hidden = layers[0][name].down_proj.weight.shape[0]
    if (len(layers), hidden) != (config.num_hidden_layers, config.hidden_size):
        raise UserError(
            "the memory was made for another anchor",
            f"memory: {config.num_hidden_layers} layers, hidden size {config.hidden_size}; "
            f"anchor: {len(layers)} layers, hidden size {hidden}",
            "use the bank that belongs to this anchor",
        )
    slot = MemorySlot(config)
    for index, layer in enumerate(layers):
        _attach_to_ffn(layer[name], slot, index, activation)
    return slot


def _attach_to_ffn(ffn: nn.Module, slot: MemorySlot, index: int, activation: Activation) -> None:
    base = type(ffn)
    if getattr(base, "has_memory", False):
        raise UserError(
            "memory is attached to this anchor already", base.__name__, "load the anchor again"
        )

    def call(self: nn.Module, x: mx.array) -> mx.array:
        output = base.__call__(self, x)
        rows = slot.of_layer(index)
        if rows is None:
            return output
        return output + ffn_memory(x, rows.astype(x.dtype), activation)

    ffn.__class__ = type(base.__name__, (base,), {"__call__": call, "has_memory": True})
