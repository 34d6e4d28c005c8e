"""Quantised blocks: which there are, their parts in a file, and the way to them and back.

A block is quantised group of rows by group of rows with ``mx.quantize``, whose groups run along a
row: any r works, and joining quantised blocks is quantising the joined ones. MLX computes the
values on both ways, so that they are those of its own quantised layers; on another device the last
bit may differ.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hmem.config import JsonConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Block, float_block, group_shapes, split_block
from mlx_hmem.memory.packed import Packed, Packing, floats

# The bits and the group sizes of each mode in MLX 0.32. It also has affine in 1 bit, from which a
# normal block comes back further from itself than zeros are.
MODES = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
PACK = 32  # MLX packs so many values of an array at once
MOST_LOST = 0.75  # of the sum of absolute values; 2 bits lose 0.4 of normal rows, zeros all


@dataclass(frozen=True)
class Quantization(JsonConfig):
    """How the blocks of one level are quantised; level 0 is the generic memory.

    ``group_size`` values of a row share a scale, in mode ``affine`` a bias too.
    """

    level: int
    mode: str
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        if type(self.level) is not int or self.level < 0:
            raise UserError("a quantised level has no number", repr(self.level)[:80], "use 0 to 8")
        if not isinstance(self.mode, str) or self.mode not in MODES:
            raise UserError(
                "unknown mode of quantisation", repr(self.mode)[:80], f"use {', '.join(MODES)}"
            )
        for name, known in zip(("bits", "group_size"), MODES[self.mode], strict=True):
            value = getattr(self, name)
            if type(value) is not int or value not in known:
                raise UserError(
                    f"quantisation {self.mode} has no such {name}",
                    repr(value)[:80],
                    f"use {' or '.join(map(str, known))}",
                )

    @property
    def packing(self) -> Packing:
        return Packing(self.mode, self.bits, self.group_size)

    @property
    def options(self) -> dict[str, Any]:
        """What ``mx.quantize`` and ``mx.dequantize`` are told."""
        return self.packing._asdict()


class Part(NamedTuple):
    """One array of a stored block. A block that is not quantised has one part.

    ``bits``: the unsigned integer of the dtype's width, for a memoryview knows no bfloat16.
    """

    dtype: mx.Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.size * math.prod(self.shape)

    @property
    def bits(self) -> mx.Dtype:
        return {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[self.dtype.size]


def check_quantization(quantization: Any, config: MemoryConfig, r: dict[int, int]) -> None:
    """Raises UserError unless ``quantization`` is None or a tuple that fits the bank.

    ``r`` holds the multiplier of each stored level; at most one entry for each of them, rising.
    """
    if quantization is None:
        return
    if not isinstance(quantization, tuple) or not all(
        isinstance(entry, Quantization) for entry in quantization
    ):
        raise UserError(
            "quantization is not a list of objects", repr(quantization)[:80], "or null for none"
        )
    levels = [entry.level for entry in quantization]
    if not levels or levels != sorted(set(levels) & set(r)):
        raise UserError(
            "quantization needs rising levels that have memory, 0 being the generic one",
            levels,
            f"choose from {list(r)}, or null for none",
        )
    for entry in quantization:
        for *rows, width in group_shapes(config, r[entry.level]):
            where = f"width {width}, group_size {entry.group_size}, level {entry.level}"
            remedy = "use another group_size or mode, or leave that level unquantised"
            if width % entry.group_size:
                raise UserError("the width of a row is no multiple of group_size", where, remedy)
            if math.prod(rows) * width % PACK:
                raise UserError(
                    f"MLX packs {PACK} values at once, and the rows are no multiple of that",
                    f"{math.prod(rows)} rows of {where}",
                    remedy,
                )


def quantized_parts(
    shapes: Iterable[tuple[int, ...]], dtype: mx.Dtype, quantization: Quantization
) -> tuple[Part, ...]:
    """For each group of rows packed values and scales, in mode ``affine`` biases too.

    ``shapes``: those of :func:`group_shapes`; ``dtype``: that of the memory, and of affine scales.
    """
    parts = []
    for *rows, width in shapes:
        of_groups = (*rows, width // quantization.group_size)
        parts.append(Part(mx.uint32, (*rows, width * quantization.bits // 32)))
        if quantization.mode == "affine":
            parts += [Part(dtype, of_groups)] * 2
        else:
            parts.append(Part(mx.uint8, of_groups))
    return tuple(parts)


@dataclass
class RoundingErrors:
    """Sums over what was rounded: of its squares, and of the squares of its errors."""

    squares: float = 0.0
    differences: float = 0.0

    def add(self, before: mx.array, after: mx.array) -> None:
        """``before`` and ``after`` the rounding, both float32 and of one shape."""
        # Row by row first: a float32 sum of millions of values is 1 % too small.
        sums: Any = [mx.square(array).sum(-1).sum() for array in (before, after - before)]
        self.squares += sums[0].item()
        self.differences += sums[1].item()

    @property
    def relative(self) -> float:
        """The relative root mean square error; 0 of zeros."""
        return math.sqrt(self.differences / self.squares) if self.squares else 0.0


def quantize_block(
    block: mx.array,
    config: MemoryConfig,
    quantization: Quantization,
    errors: RoundingErrors | None = None,
) -> list[mx.array]:
    """The parts of a float block, which must be of the bank's dtype.

    What it loses is added to ``errors``. Raises ValueError where little is left of it: a value
    becomes infinite, or a matrix of a layer loses ``MOST_LOST``. The scales of nvfp4 span 2**-9 to
    448, so that it loses rows of a standard deviation below 0.003 and clips beyond 2,688; the other
    modes have no such bounds in practice.
    """
    parts: list[mx.array] = []
    for group in split_block(block, config):
        stored = mx.quantize(group, **quantization.options)
        back = floats(Packed(tuple(stored), quantization.packing, block.dtype))
        for layer in range(len(back)):  # each by itself: float32 copies of a block are large
            before, after = (array[layer].astype(mx.float32) for array in (group, back))
            _check_loss(before, after, quantization.mode)
            if errors is not None:
                errors.add(before, after)
        parts += stored
    return parts


def _check_loss(before: mx.array, after: mx.array, mode: str) -> None:
    """``before`` and ``after``: the matrices of one group and layer, (rows, r, width)."""
    size = mx.abs(before).sum((-2, -1))
    lost = mx.abs(after - before).sum((-2, -1))
    if not all_finite(after):
        raise ValueError(f"not finite in {mode}")
    if mx.any((lost > MOST_LOST * size) & (size > 0)).item():
        raise ValueError(f"a matrix is lost in {mode}: too small or too large")


def packed_block(
    parts: Sequence[mx.array],
    config: MemoryConfig,
    dtype: mx.Dtype,
    quantization: Quantization | None,
) -> Block:
    """The block in ``dtype`` that :func:`quantize_block` took apart, or some of its layers where
    ``parts`` are of those; the one part where it is not quantised."""
    if quantization is None:
        return parts[0]
    each, packing = len(parts) // len(config.groups), quantization.packing
    groups = (tuple(parts[first : first + each]) for first in range(0, len(parts), each))
    return tuple(Packed(arrays, packing, dtype) for arrays in groups)


def dequantize_block(
    parts: Sequence[mx.array],
    config: MemoryConfig,
    dtype: mx.Dtype,
    quantization: Quantization | None,
) -> mx.array:
    """The values of a :func:`packed_block`, ``MemoryConfig.shape_of``."""
    return float_block(packed_block(parts, config, dtype, quantization))


def all_finite(array: mx.array) -> bool:
    """Whether all of an array is finite, as integers are. MLX's own test takes 20 to 40 ns a value
    on Linux CPUs, this one 1."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return True
    infinity = {mx.float16: 0x7C00, mx.bfloat16: 0x7F80, mx.float32: 0x7F80_0000}[array.dtype]
    bits = mx.contiguous(array).view(Part(array.dtype, ()).bits)
    return finite_bits(np.array(bits, copy=False), infinity)


def finite_bits(bits: np.ndarray, infinity: int) -> bool:
    """Whether floats, given as unsigned integers, are finite; ``infinity``: the bits of that."""
    # A sign bit makes a negative number the greater one unsigned and the lesser one signed.
    sign, signed = 1 << (8 * bits.itemsize - 1), bits.view(f"<i{bits.itemsize}")
    return not bits.size or bool(bits.max() < infinity | sign and signed.max() < infinity)


def is_finite(
    parts: Sequence[mx.array],
    config: MemoryConfig,
    dtype: mx.Dtype,
    quantization: Quantization | None,
) -> bool:
    """Whether every value of a stored block, given as :func:`dequantize_block`, is finite."""
    if quantization is not None and quantization.mode == "affine":
        # All lie between the least and the greatest of their group: packed values are not looked at
        # where both are finite, which is dozens of times faster.
        pairs = list(zip(parts[1::3], parts[2::3], strict=True))
        ends = [biases + scales * (2**quantization.bits - 1) for scales, biases in pairs]
        if all(map(all_finite, (*ends, *parts[2::3]))):
            return True
    return all_finite(dequantize_block(parts, config, dtype, quantization))
