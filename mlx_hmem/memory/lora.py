"""LoRA memory: a rank-r patch on the FFN's matrices, on query and key, or on value and output.

A patched projection W adds α · B (A x) (paper, section 3): A is r × inputs, B, kept transposed, r ×
outputs. Blocks of several levels join along r: their patches add up.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hmem.memory.layer import AnchorLayer, LayerMemory, MemoryKind, Projection, extend

ALPHA = 2.0


class Row(NamedTuple):
    """Where a matrix lies in the rows of a layer; a negative place counts from the end, as FFNs
    without a gate have one row less in front."""

    group: int
    place: int


def _lora(joins: str, patches: dict[str, tuple[Row, Row]]) -> MemoryKind:
    """``patches``: the projections by their names in the layer, each with its A and its B."""

    def initial(shapes: Sequence[tuple[int, ...]], rng: np.random.Generator) -> list[np.ndarray]:
        # A uniform within ± inputs^-1/2 (Kaiming with a = √5, as LoRA starts), B zero.
        groups = [np.zeros(shape, np.float32) for shape in shapes]
        for (group, place), _ in patches.values():
            if place < -groups[group].shape[1]:
                continue  # the gate of an FFN that has none
            layers, _, r, width = groups[group].shape
            draws = rng.uniform(-1, 1, (layers, r, width)).astype(np.float32)
            groups[group][:, place] = draws * width**-0.5
        return groups

    def attach(layer: AnchorLayer, memory: LayerMemory) -> None:
        part = getattr(layer, joins)
        for name, (a, b) in patches.items():
            projection = getattr(part, name)
            if projection is not None:
                _patch(projection, memory, a, b)

    return MemoryKind(joins, initial, attach)


def _patch(projection: Projection, memory: LayerMemory, a: Row, b: Row) -> None:
    def call(before: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        output = before(x)
        rows = memory(output)
        if rows is None:
            return output
        down = rows[a.group][..., a.place, :, :].astype(x.dtype)
        up = rows[b.group][..., b.place, :, :].astype(x.dtype)
        patch = ALPHA * (x @ down.swapaxes(-1, -2)) @ up
        after = output.shape[-1] - projection.start - projection.size
        if projection.start or after:  # one matrix serves several projections
            sides: Any = [(0, 0)] * (x.ndim - 1) + [(projection.start, after)]
            patch = mx.pad(patch, sides)
        return output + patch

    extend(projection.module, call)


# Groups: rows as wide as the hidden size first, then those of the other sizes.
LORA_FFN = _lora(
    "ffn",
    {
        "gate": (Row(0, -3), Row(1, -3)),
        "up": (Row(0, -2), Row(1, -2)),
        "down": (Row(1, -1), Row(0, -1)),
    },
)
LORA_QK = _lora("attention", {"query": (Row(0, 0), Row(1, 0)), "key": (Row(0, 1), Row(2, 0))})
LORA_VO = _lora("attention", {"value": (Row(0, 0), Row(2, 0)), "output": (Row(1, 0), Row(0, 1))})
