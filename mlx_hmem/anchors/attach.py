"""Attaches memory to an anchor: our own OpenLM or a model of mlx-lm, which stays as it is.

The memory of the moment lies in a slot that all layers share. A compiled or differentiated function
must set the slot from one of its own arguments: an array that was there before tracing would be
frozen into the graph.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.config import SIZES, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import kind_of
from mlx_hmem.memory.layer import AnchorLayer, AttentionLayer, FFNLayer, Projection
from mlx_hmem.memory.packed import Group, Rows, each, shape_of


class ArrivingRows(Protocol):
    """A memory of which some is still being read; its layers come in order."""

    def is_here(self, place: int) -> bool:
        """Whether the rows of the layer at this place need not be waited for."""
        ...

    def __getitem__(self, place: int) -> Rows:
        """The rows of the layer at this place, waited for."""
        ...


class MemorySlot(threading.local):
    """Holds the memory that the attached layers use, for each thread its own: rows for the whole
    batch, rows with a batch axis in front for one memory per row, those of each layer in a list,
    rows that are still being read, or None for the anchor alone (see mlx_hmem.memory)."""

    def __init__(self, config: MemoryConfig):
        self.config = config
        self.by_layer: list[Rows] | ArrivingRows | None = None

    def set(self, rows: Rows | list[Rows] | ArrivingRows | None) -> None:
        self.by_layer = self.cut(rows) if isinstance(rows, tuple) else rows

    def cut(self, rows: Rows) -> list[Rows]:
        """The rows of each layer: who uses a memory often cuts it once. UserError where they do not
        fit the anchor."""
        layers = self.config.num_memory_layers
        wanted = [(layers, count, width) for count, width in self.config.groups]
        shapes = [shape_of(group) for group in rows]
        if [(*s[-4:-2], s[-1]) for s in shapes] != wanted or not all(
            len(shape) == len(shapes[0]) in (4, 5) for shape in shapes
        ):
            raise UserError(
                "the memory does not fit the anchor",
                f"memory {shapes}; kind {self.config.kind} needs (layers, rows, width) {wanted}",
                "fetch it from a bank made for this anchor",
            )
        return list(zip(*map(_layers, rows), strict=True))

    @contextmanager
    def using(self, rows: Rows | list[Rows] | ArrivingRows | None) -> Iterator[None]:
        """The memory for the calls inside the ``with`` block; what was there before comes back."""
        before = self.by_layer
        self.set(rows)
        try:
            yield
        finally:
            self.by_layer = before

    def of_layer(self, place: int, so_far: mx.array | None) -> Rows | None:
        """The rows of the layer at this place among those that have memory.

        ``so_far``: what the layer has computed; the device works on it while rows are waited for.
        """
        rows = self.by_layer
        if rows is None:
            return None
        if so_far is not None and not isinstance(rows, list) and not rows.is_here(place):
            mx.async_eval(so_far)
        return rows[place]


def _layers(group: Group) -> list[Group]:
    """The rows of each layer, of a group that has them all."""
    if isinstance(group, mx.array):
        layers: Any = _unstack(group)
        return layers
    places = range(shape_of(group)[-4])
    return [each(lambda a, p=place: a[..., p, :, :, :], group) for place in places]


@mx.custom_function
def _unstack(group: mx.array) -> list[mx.array]:
    """The rows of each layer, (..., rows, R, width), of a group (..., layers, rows, R, width)."""
    return [group[..., place, :, :, :] for place in range(group.shape[-4])]


@_unstack.vjp
def _unstack_vjp(primals: Any, cotangents: list[mx.array], outputs: Any) -> mx.array:
    # MLX's own gradient of a slice is as large as what it was cut from: for 35 layers, 35 times the
    # memory (measured: 15 ms and 58 MB with this, 440 ms and 669 MB without).
    return mx.stack(cotangents, axis=-4)


def anchor_sizes(anchor: nn.Module) -> dict[str, Any]:
    """What a :class:`MemoryConfig` must know of the anchor: its sizes, by their names there.

    The size of a part that memory cannot join is left out.
    """
    layers = anchor_layers(anchor)
    result: dict[str, Any] = {"num_hidden_layers": len(layers)}
    for layer in layers:
        if isinstance(layer.attention, AttentionLayer):
            result["hidden_size"] = layer.attention.output.size
            result["query_size"] = layer.attention.query.size
            result["key_value_size"] = layer.attention.key.size
        if isinstance(layer.ffn, FFNLayer):
            result["hidden_size"] = layer.ffn.down.size
            result["intermediate_size"] = layer.ffn.up.size
            result["gated"] = layer.ffn.gate is not None
    return result


def memory_config(
    anchor: nn.Module,
    r: Sequence[int],
    branching: Sequence[int],
    kind: str = "ffn",
    layers: Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
) -> MemoryConfig:
    """The config of a memory for this anchor."""
    return MemoryConfig(
        **anchor_sizes(anchor),
        r=tuple(r),
        branching=tuple(branching),
        kind=kind,
        layers=None if layers is None else tuple(layers),
        targets=None if targets is None else tuple(targets),
    )


def attach_memory(anchor: nn.Module, config: MemoryConfig) -> MemorySlot:
    """Makes the layers of ``anchor`` use the memory in the returned slot, which starts empty."""
    check_sizes(anchor, config)
    layers = anchor_layers(anchor)
    chosen = [layers[index] for index in config.memory_layers]
    kind, slot = kind_of(config), MemorySlot(config)
    for layer in chosen:
        _check(layer, config)
    for place, layer in enumerate(chosen):
        kind.attach(layer, partial(slot.of_layer, place))
    return slot


def check_sizes(anchor: nn.Module, config: MemoryConfig) -> None:
    """Raises UserError unless the memory was made for an anchor of these sizes."""
    sizes = anchor_sizes(anchor)
    needed = ["num_hidden_layers", *(s for s in SIZES if getattr(config, s))]
    needed += ["gated"] if "ffn" in kind_of(config).joins else []
    wrong = [name for name in needed if name in sizes and sizes[name] != getattr(config, name)]
    if wrong:
        raise UserError(
            "the memory was made for another anchor",
            f"memory: {_listed(config.to_dict(), wrong)}; anchor: {_listed(sizes, wrong)}",
            "use the bank that belongs to this anchor",
        )


def _listed(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values[name]}" for name in names)


# What can join a layer by this part of it alone.
FITTING = {
    "attention": "lora_qk or lora_vo or kv or lora on query, key, value, output",
    "ffn": "ffn or lora_ffn or lora on gate, up, down",
}


def _check(layer: AnchorLayer, config: MemoryConfig) -> None:
    """That the layer has what the memory joins, and no memory yet."""
    for name in kind_of(config).joins:
        part = getattr(layer, name)
        if isinstance(part, str):
            other = [FITTING[n] for n in FITTING if not isinstance(getattr(layer, n), str)]
            raise UserError(
                f"memory of kind {config.kind} cannot join layer {layer.index}",
                f"its {name} is {part}",
                f"use kind {' or '.join(other)}" if other else "choose other layers",
            )
        modules = [p.module if isinstance(p, Projection) else p for p in vars(part).values()]
        if any(getattr(type(module), "has_memory", False) for module in modules):
            raise UserError(
                "memory is attached to this anchor already",
                f"layer {layer.index}",
                "load the anchor again",
            )
