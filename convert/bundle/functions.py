"""The functions of a bundle: an anchor with its memory as pure functions, recorded for MLX.

Weights, memory and KV cache are inputs and the new cache is an output, so that a file holds
operations only (15 KB a layer) and one copy of the weights serves all of them. Shapes are fixed: a
prompt is processed in pieces of a few lengths, and the cache has room for the whole context from
the start. A mask made from the offset hides what lies behind it, so a piece may be padded at its
end. While little of the cache is in use, shorter functions look at its first slots alone. Traces
record the device that they were made on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem.anchors.load import float_dtype, named_parameters
from mlx_hmem.bank import Manifest
from mlx_hmem.bank.format import GENERIC, STORED_TYPES, stored_r
from mlx_hmem.bank.quantization import Part, packed_block
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file
from mlx_hmem.memory import Block, Rows, group_shapes, join_blocks
from mlx_hmem.memory.packed import cast, floats
from mlx_hmem.model.model import MemoryModel

from .attention import single_operations
from .record import record

Arrays = Sequence[mx.array]
Traced = Callable[..., list[mx.array]]


class TracedCache:
    """What mlx-lm asks of a layer's KV cache, for arrays (1, heads, context, head_dim) of which
    the first ``offset``, an array itself, are in use; the first ``kv_length`` are looked at."""

    def __init__(self, keys: mx.array, values: mx.array, offset: mx.array, kv_length: int):
        self.keys, self.values, self.offset, self.kv_length = keys, values, offset, kv_length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = mx.slice_update(self.keys, keys, self.offset, axes=(2,))
        self.values = mx.slice_update(self.values, values, self.offset, axes=(2,))
        return self.keys[:, :, : self.kv_length], self.values[:, :, : self.kv_length]

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """(N, kv_length): true where the token may look."""
        columns = mx.arange(self.kv_length)[None]
        rows = (self.offset + mx.arange(N))[:, None]
        mask = columns <= rows
        return mask if window_size is None else mask & (columns > rows - window_size)


class TracedRows:
    """The rows of each layer, sliced by operations that can be recorded (``ArrivingRows``)."""

    def __init__(self, rows: Arrays):
        self.rows = rows

    def is_here(self, place: int) -> bool:
        return True

    def __getitem__(self, place: int) -> Rows:
        return tuple(group[place] for group in self.rows)


@dataclass(frozen=True)
class Function:
    """One function to record: its file, what the manifest says of it, and example inputs."""

    file: str
    about: dict[str, Any]
    traced: Traced
    inputs: list[mx.array]
    remedy: str = "MLX cannot export this anchor; quantise it in mode affine, or choose another"

    def write(self, folder: Path) -> None:
        """Records it, unless it is there; the file is whole or not there."""
        path = folder / self.file
        if path.exists():
            return
        try:
            with atomic_file(path) as part:
                record(part.name, self.traced, self.inputs)
        except UserError:
            raise
        except Exception as error:  # whatever an architecture or MLX's serialiser raises
            reason = f"{type(error).__name__}: {error}"[:300]
            raise UserError(f"{self.file} cannot be recorded", reason, self.remedy) from None


class Functions:
    """All functions of a model's bundle, for a cache of ``context`` tokens and prompts in pieces of
    ``prefill`` tokens; the same for each of ``kv_lengths``, in ascending order."""

    def __init__(
        self,
        model: MemoryModel,
        context: int,
        prefill: Sequence[int],
        kv_lengths: Sequence[int] = (),
    ):
        self.kv_lengths = tuple(kv_lengths)
        self.model, self.anchor, self.bank = model, model.anchor, model.require_bank()
        self.config, self.context, self.prefill = self.bank.config, context, tuple(prefill)
        self.weights = named_parameters(self.anchor)
        self.dtype = float_dtype(self.anchor)

    @cached_property
    def cache(self) -> list[mx.array]:
        """An empty cache: the keys of all layers, then the values of all layers."""
        layers = make_prompt_cache(self.anchor)
        self.anchor(mx.array([[0]]), cache=layers)  # only a call shows what a layer keeps
        for index, layer in enumerate(layers):
            if getattr(getattr(layer, "keys", None), "ndim", 0) != 4:
                raise UserError(
                    "this anchor keeps something else than keys and values",
                    f"{type(layer).__name__} in layer {index}",
                    "bundles are for anchors whose layers are attention",
                )
        return [
            mx.zeros((1, a.shape[1], self.context, a.shape[3]), a.dtype)
            for a in [layer.keys for layer in layers] + [layer.values for layer in layers]
        ]

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Levels that have memory as far down as a path may be followed, from none to all."""
        levels = [level for level in stored_r(self.config) if level != GENERIC]
        return [tuple(levels[:count]) for count in range(len(levels) + 1)]

    def num_rows(self, levels: Sequence[int]) -> int:
        """R of a memory joined from these levels; of the generic one it is the sum of all."""
        return sum(stored_r(self.config)[level] for level in levels)

    def all(self) -> list[Function]:
        memories = [levels for levels in (*self.prefixes, (GENERIC,)) if levels]
        result = [self.memory(levels) for levels in memories]
        for num_rows in map(self.num_rows, self.prefixes):
            result.append(self.step("decode", 1, num_rows))
            result += [self.step("prefill", length, num_rows) for length in self.prefill]
        return result

    def short(self) -> list[Function]:
        """Those that look at the first slots of the cache alone, the shortest first."""
        steps = [("decode", 1), *(("prefill", length) for length in self.prefill)]
        return [
            self.step(kind, length, num_rows, kv_length)
            for kv_length in self.kv_lengths
            for num_rows in map(self.num_rows, self.prefixes)
            for kind, length in steps
            if length <= kv_length
        ]

    def memory(self, levels: tuple[int, ...]) -> Function:
        """Blocks as they are stored, level by level, to the rows of all of them in the anchor's
        dtype."""
        manifest, parts = self.bank.manifest, [self.bank.manifest.parts(n) for n in levels]

        def traced(*arrays: mx.array) -> list[mx.array]:
            blocks, rest = [], list(arrays)
            for level, each in zip(levels, parts, strict=True):
                stored, rest = rest[: len(each)], rest[len(each) :]
                blocks.append(_block(manifest, level, stored))
            return [floats(cast(group, self.dtype)) for group in join_blocks(blocks, self.config)]

        flat = [part for each in parts for part in each]
        about = {
            "kind": "memory",
            "levels": list(levels),
            "num_rows": self.num_rows(levels),
            "inputs": [dtype_and_shape(part) for part in flat],
        }
        name = f"functions/memory-{'-'.join(map(str, levels))}.mlxfn"
        inputs = [mx.zeros(part.shape, part.dtype) for part in flat]
        return Function(name, about, traced, inputs, "quantise the bank in mode affine or mxfp4")

    def step(self, kind: str, length: int, num_rows: int, kv_length: int | None = None) -> Function:
        """``length`` tokens: log-probabilities of the next (1, vocabulary), and the cache. Of a
        "prefill" the cache alone: what the head computes is not recorded. Only the first
        ``kv_length`` slots of the cache may be in use, these tokens among them."""

        def traced(*arrays: mx.array) -> list[mx.array]:
            logits, cache = self._call(arrays, num_rows, kv_length or self.context)
            if kind == "prefill":
                return cache
            logits = logits[:, -1]
            return [logits - mx.logsumexp(logits, keepdims=True), *cache]  # as mlx-lm has them

        about = {"kind": kind, "num_tokens": length, "num_rows": num_rows}
        rows = self.empty_rows(num_rows)
        ids, offset = mx.zeros((1, length), mx.int32), mx.array(0, mx.int32)
        name = f"functions/{kind}-{length}-r{num_rows}"
        if kv_length is not None:
            about["kv_length"], name = kv_length, f"{name}-kv{kv_length}"
        inputs = [ids, offset, *self.cache, *rows, *self.weights.values()]
        return Function(f"{name}.mlxfn", about, traced, inputs)

    def empty_rows(self, num_rows: int) -> list[mx.array]:
        shapes = group_shapes(self.config, num_rows) if num_rows else []
        return [mx.zeros(shape, self.dtype) for shape in shapes]

    def _call(
        self, arrays: Arrays, num_rows: int, kv_length: int
    ) -> tuple[mx.array, list[mx.array]]:
        """The anchor's logits and the cache after it, of traced inputs."""
        ids, offset, *rest = arrays
        count, groups = len(self.cache) // 2, len(self.config.groups) if num_rows else 0
        keys, values = rest[:count], rest[count : 2 * count]
        rows, weights = rest[2 * count : 2 * count + groups], rest[2 * count + groups :]
        pairs = zip(keys, values, strict=True)
        caches = [TracedCache(*pair, offset, kv_length) for pair in pairs]
        memory: Any = TracedRows(rows) if rows else None
        self.anchor.update(tree_unflatten(list(zip(self.weights, weights, strict=True))))
        try:
            with single_operations():
                logits = self.model.with_rows(memory)(ids, cache=caches)
        finally:  # traced weights must not stay behind in the anchor
            self.anchor.update(tree_unflatten(list(self.weights.items())))
        return logits, [c.keys for c in caches] + [c.values for c in caches]


def _block(manifest: Manifest, level: int, stored: Arrays) -> Block:
    dtype = STORED_TYPES[manifest.dtype].dtype
    return packed_block(stored, manifest.memory, dtype, manifest.quantization_of(level))


def dtype_and_shape(part: Part | mx.array) -> dict[str, Any]:
    """As the manifest of a bundle has them: ``{"dtype": "float32", "shape": [1, 8]}``."""
    return {"dtype": str(part.dtype).rpartition(".")[2], "shape": list(part.shape)}
