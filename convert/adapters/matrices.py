"""What a fetched memory does to the matrices of its anchor: more units, or LoRA patches.

Sums are NumPy's: float32 throughout, on a GPU, too, whose own products may have fewer bits.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.anchors.fused import Joint, joints_of
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.memory.layer import FFNLayer, Projection
from mlx_hmem.memory.lora import ALPHA

from ..anchors.weights import rounded
from ..torch_files.tensors import ComputedTensor, LazyTensor, bits_of, numbers_of

# What becomes of a tensor: of it, and of the dtype of the result, the new one.
Change = Callable[[LazyTensor, str], LazyTensor]


class Patch(NamedTuple):
    """A LoRA patch of one projection: α · B A is added to ``size`` rows, from ``start`` on, of the
    matrix of the module ``module``. ``a`` (R, inputs); ``b`` (R, outputs), B transposed."""

    layer: int
    projection: str
    module: str
    start: int
    size: int
    a: mx.array
    b: mx.array


def module_names(anchor: nn.Module) -> dict[int, str]:
    """The dotted name of each module, by its id."""
    return {id(module): name for name, module in anchor.named_modules()}


def patches_of(anchor: nn.Module, memory: FetchedMemory) -> list[Patch]:
    """The patches of a LoRA memory, layer by layer."""
    config, names, layers = memory.config, module_names(anchor), anchor_layers(anchor)
    assert memory.rows is not None
    groups = zip(memory.rows, config.matrices.values(), strict=True)
    rows = {name: g[:, i] for g, group in groups for i, name in enumerate(group)}
    found = []
    for place, index in enumerate(config.memory_layers):
        for name in config.patched:
            parts = (
                getattr(part, name, None) for part in (layers[index].attention, layers[index].ffn)
            )
            projection = next(part for part in parts if isinstance(part, Projection))
            a, b = rows[f"{name}_a"][place], rows[f"{name}_b"][place]
            module = names[id(projection.module)]
            found.append(Patch(index, name, module, projection.start, projection.size, a, b))
    return found


def merged(patches: Sequence[Patch]) -> dict[str, Change]:
    """The change of each patched matrix: W + α · B A."""
    by_module: dict[str, list[Patch]] = {}
    for patch in patches:
        by_module.setdefault(patch.module, []).append(patch)
    return {f"{name}.weight": _merge(name, own) for name, own in by_module.items()}


def _merge(name: str, patches: Sequence[Patch]) -> Change:
    pairs = [(p.start, p.start + p.size, floats(p.a), floats(p.b)) for p in patches]

    def change(tensor: LazyTensor, dtype: str) -> LazyTensor:
        def numbers(first: int, count: int) -> np.ndarray:
            weight = read_floats(tensor, first, count)
            for start, stop, a, b in pairs:
                low, high = max(first, start), min(first + count, stop)
                if low < high:
                    weight[low - first : high - first] += (
                        ALPHA * b[:, low - start : high - start].T @ a
                    )
            return weight

        return _computed(name, tensor, tensor.shape, dtype, numbers)

    return change


def widened(anchor: nn.Module, memory: FetchedMemory) -> dict[str, Change]:
    """The change of each matrix and bias of an FFN that sum(r) units are added to: in every layer,
    of zeros where there is no memory."""
    config, names = memory.config, module_names(anchor)
    extra, changes = sum(config.r), dict[str, Change]()
    assert memory.rows is not None
    rows = mx.pad(memory.rows[0], [(0, 0), (0, 0), (0, extra - memory.rows[0].shape[2]), (0, 0)])
    places = {index: place for place, index in enumerate(config.memory_layers)}
    for layer in anchor_layers(anchor):
        if not isinstance(layer.ffn, FFNLayer) and layer.index not in places:
            continue  # of a mixture of experts
        block = rows[places[layer.index]] if layer.index in places else mx.zeros_like(rows[0])
        for joint in joints_of(layer, extra):
            name = names[id(joint.module)]
            added = [block[row] for row in joint.rows]
            changes[f"{name}.weight"] = _widen(name, joint, added)
            if "bias" in joint.module and not joint.axis:
                none = [mx.zeros(extra)] * len(added)
                changes[f"{name}.bias"] = _widen(name, joint, none)
    return changes


def _widen(name: str, joint: Joint, added: Sequence[mx.array]) -> Change:
    units = [floats(each) for each in added]

    def change(tensor: LazyTensor, dtype: str) -> LazyTensor:
        shape = tuple(n + joint.extra * (axis == joint.axis) * len(units)
                      for axis, n in enumerate(tensor.shape))  # fmt: skip
        if joint.axis:

            def numbers(first: int, count: int) -> np.ndarray:
                own = read_floats(tensor, first, count)
                return np.concatenate([own, units[0].T[first : first + count]], axis=1)

        else:
            pieces = list(_pieces(tensor, joint.parts, units))

            def numbers(first: int, count: int) -> np.ndarray:
                return _rows(pieces, first, count)

        return _computed(name, tensor, shape, dtype, numbers)

    return change


Piece = tuple[int, Callable[[int, int], np.ndarray]]  # how many rows, and what reads some of them


def _pieces(tensor: LazyTensor, parts: Any, units: Sequence[np.ndarray]) -> Sequence[Piece]:
    """Each part of the tensor's rows, and behind it the units that are added to it."""
    found: list[Piece] = []
    for (start, size), rows in zip(parts, units, strict=True):
        found.append((size, partial(read_floats, tensor.rows(start, size))))
        found.append((len(rows), partial(_cut, rows)))
    return found


def _cut(rows: np.ndarray, first: int, count: int) -> np.ndarray:
    return rows[first : first + count]


def _rows(pieces: Sequence[Piece], first: int, count: int) -> np.ndarray:
    found, at = [], 0
    for size, read in pieces:
        low, high = max(first - at, 0), min(first + count - at, size)
        if low < high:
            found.append(read(low, high - low))
        at += size
    return np.concatenate(found)


def _computed(
    name: str,
    source: LazyTensor,
    shape: tuple[int, ...],
    dtype: str,
    numbers: Callable[[int, int], np.ndarray],
) -> ComputedTensor:
    def compute(first: int, count: int) -> np.ndarray:
        return bits_of(rounded(mx.array(numbers(first, count)), dtype, name))

    return ComputedTensor(source.path, 0, dtype, shape, compute=compute)


def floats(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def read_floats(tensor: LazyTensor, first: int, count: int) -> np.ndarray:
    return floats(numbers_of(tensor.read(first, count), tensor.dtype))
