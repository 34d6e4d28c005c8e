"""Tensors in files, read when asked for: what every source of a conversion is made of.

Bits are read, never numbers: a bfloat16 passes as uint16, so nothing is rounded on the way and no
library has to know the type. Bytes go from the file straight into the result's buffer, so a read
takes the memory of what was asked for; a transposed or cut-out tensor takes one buffer of 16 MiB
more, and is read in the order in which it lies in the file.
"""

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.lib.stride_tricks import as_strided

from mlx_hmem import files
from mlx_hmem.bank.quantization import finite_bits
from mlx_hmem.errors import UserError

# Bytes per element. Beyond MLX's types those that PyTorch knows and a conversion may meet.
ITEM_SIZES = files.ITEM_SIZES | {"F64": 8, "F8_E5M2": 1}
BITS: dict[int, np.dtype] = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}
MLX_TYPES = {
    "BOOL": mx.bool_, "U8": mx.uint8, "I8": mx.int8, "U16": mx.uint16, "I16": mx.int16,
    "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "I32": mx.int32, "F32": mx.float32,
    "U64": mx.uint64, "I64": mx.int64, "C64": mx.complex64,
    # As MLX itself loads them: it has no such types, only operations that take their bits.
    "F8_E4M3": mx.uint8, "F8_E8M0": mx.uint8,
}  # fmt: skip
# Bits whose number, without its sign, is not finite from there on.
INFINITY = {"F64": 0x7FF << 52, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
BITS_OF_MLX = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
PIECE = 1 << 24  # bytes read at once where a tensor does not lie row by row
GAP = 1 << 16  # bytes between two runs from which on skipping is cheaper than reading
MAX_READ = 1 << 30  # one system call: macOS refuses 2 GiB and more


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, not yet read.

    ``offset`` is where its first element lies in the file, in bytes; ``dtype`` has a safetensors
    name; ``strides`` count elements, None where the tensor lies row by row without gaps. Whoever
    makes one has checked that it lies inside its file.
    """

    path: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, whether or not some of them share their place in the file."""
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    @property
    def T(self) -> "LazyTensor":  # noqa: N802  (as of an array)
        """Transposed, still in the file."""
        strides = self.strides or row_major(self.shape)
        return replace(self, shape=self.shape[::-1], strides=strides[::-1])

    def rows(self, first: int, count: int) -> "LazyTensor":
        """``self[first : first + count]``, still in the file."""
        step = (self.strides or row_major(self.shape))[0] * ITEM_SIZES[self.dtype]
        return replace(self, offset=self.offset + first * step, shape=(count, *self.shape[1:]))

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        """Rows ``first`` … ``first + count`` of axis 0 as bits; all of them by default.

        Returns a contiguous array of unsigned integers of the dtype's width, (count, *shape[1:]),
        and of no dimension for a scalar. Raises :class:`UserError` if the file has become shorter.
        """
        rows = self.shape[0] if self.shape else 1
        count = rows - first if count is None else count
        if not 0 <= first <= first + count <= rows:
            raise IndexError(f"rows {first} to {first + count} of {rows}")
        item = ITEM_SIZES[self.dtype]
        shape = (count, *self.shape[1:]) if self.shape else ()
        result: np.ndarray = np.empty(shape, BITS[item])
        if not result.size:
            return result
        strides = self.strides or row_major(self.shape)
        start = self.offset + (first * strides[0] * item if strides else 0)
        with files.open_regular(self.path) as file:
            handle = file.fileno()
            if self.strides is None:
                _read_into(handle, result.reshape(-1), start, self.path)
            else:
                # In the order of the file: the longest strides outermost.
                axes = sorted(range(result.ndim), key=lambda axis: -strides[axis])
                ordered = [strides[axis] for axis in axes]
                _read_strided(handle, result.transpose(axes), start, ordered, self.path)
        return result

    def numbers(self) -> np.ndarray:
        """All of it as numbers of NumPy; bfloat16 becomes float32, and so does float64."""
        array = numbers_of(self.read(), self.dtype)
        return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


@dataclass(frozen=True)
class ComputedTensor(LazyTensor):
    """A tensor whose rows are computed from what lies in ``path``: dequantised, put into another
    order.

    ``compute(first, count)`` gives bits as :meth:`LazyTensor.read` does; the rows of this tensor
    begin at ``first`` of those that it knows. ``offset`` says nothing, ``strides`` are None.
    """

    compute: Callable[[int, int], np.ndarray] = field(kw_only=True)
    first: int = 0

    @property
    def T(self) -> "ComputedTensor":  # noqa: N802  (as of an array)
        """Transposed; whatever is read of it, the whole is computed."""

        def compute(first: int, count: int) -> np.ndarray:
            return np.ascontiguousarray(self.read().T[first : first + count])

        return replace(self, shape=self.shape[::-1], compute=compute, first=0)

    def rows(self, first: int, count: int) -> "ComputedTensor":
        return replace(self, first=self.first + first, shape=(count, *self.shape[1:]))

    def read(self, first: int = 0, count: int | None = None) -> np.ndarray:
        count = self.shape[0] - first if count is None else count
        if not 0 <= first <= first + count <= self.shape[0]:
            raise IndexError(f"rows {first} to {first + count} of {self.shape[0]}")
        return self.compute(self.first + first, count)


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds.

    tensors: by name, in the order of the file or files.
    values: what else it holds, as plain values: str, int, float, bool, None, list, tuple, dict.
    left_out: names of entries that are neither: an optimiser's tensors, values that are not plain.
    """

    tensors: dict[str, LazyTensor]
    values: dict[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


def open_safetensors(paths: Sequence[Path]) -> Checkpoint:
    """The tensors of safetensors files, whose headers alone are read; metadata become values.

    Raises :class:`UserError` for a wrong header and for a name that two files have.
    """
    parts = []
    for path in paths:
        header, metadata = files.read_safetensors_header(path, ITEM_SIZES)
        tensors = {
            name: LazyTensor(Path(path), info.start, info.dtype, info.shape)
            for name, info in header.items()
        }
        parts.append(Checkpoint(tensors, dict(metadata)))
    return join(parts)


def join(parts: Sequence[Checkpoint]) -> Checkpoint:
    """One checkpoint of several files: of values that several have, the first file's stay."""
    tensors: dict[str, LazyTensor] = {}
    values: dict[str, Any] = {}
    left_out: dict[str, None] = {}
    for part in parts:
        for name, tensor in part.tensors.items():
            if name in tensors:
                both = f"{name[:80]!r} in {tensors[name].path} and {tensor.path}"
                raise UserError("a tensor occurs twice", both, "give the files of one checkpoint")
            tensors[name] = tensor
        values = part.values | values
        left_out |= dict.fromkeys(part.left_out)
    return Checkpoint(tensors, values, tuple(left_out))


def safetensors_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: dict[str, str]
) -> bytes:
    """What a safetensors file begins with whose tensors (name, dtype, shape) lie in this order; its
    length is a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a tensor that lies row by row without gaps."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_bits(bits: np.ndarray, dtype: str) -> mx.array:
    """Bits, as :meth:`LazyTensor.read` gives them, as an array of ``dtype``, in the same shape."""
    if dtype not in MLX_TYPES:
        remedy = "convert the tensor to float32 in the source first"
        raise UserError("MLX has no such type", dtype, remedy)
    if dtype == "BOOL":  # a byte of a foreign file may be neither 0 nor 1
        return mx.array(bits).astype(mx.bool_)
    return mx.array(bits).view(MLX_TYPES[dtype])


def numbers_of(bits: np.ndarray, dtype: str) -> mx.array:
    """As :func:`read_bits`; float64, which MLX computes with nowhere but on the CPU, is rounded."""
    if dtype != "F64":
        return read_bits(bits, dtype)
    with np.errstate(over="ignore"):
        return mx.array(bits.view("<f8").astype("<f4"))


def bits_of(array: mx.array) -> np.ndarray:
    """The array's bits as unsigned integers of its width, contiguous, in the same shape."""
    return np.array(array.view(BITS_OF_MLX[array.itemsize]), copy=None, order="C")


def all_finite(bits: np.ndarray, dtype: str) -> bool:
    """Whether bits, as :meth:`LazyTensor.read` gives them, are finite numbers."""
    return finite_bits(bits, INFINITY[dtype])


def _read_into(handle: int, result: np.ndarray, start: int, path: Path) -> None:
    """Fills a flat, contiguous array with the bytes at ``start``."""
    view = result.data.cast("B")
    done = 0
    while done < len(view):
        read = os.preadv(handle, [view[done : done + MAX_READ]], start + done)
        if not read:
            missing = f"{len(view) - done} bytes are missing"
            raise UserError(f"{path} ends too early", missing, files.RESTORE)
        done += read


def _read_strided(
    handle: int, result: np.ndarray, start: int, strides: Sequence[int], path: Path
) -> None:
    """Fills an array whose axes are in order of falling strides in the file.

    Reads the span that as many of its rows cover as fit a piece, or, where a row is longer than a
    piece or the gap to the next one is long, each row for itself.
    """
    item = result.itemsize
    if not result.ndim:
        _read_into(handle, result.reshape(-1), start, path)
        return
    lengths = zip(result.shape[1:], strides[1:], strict=True)
    row = 1 + sum((n - 1) * stride for n, stride in lengths)
    stride = strides[0]
    if row * item > PIECE or (stride - row) * item > GAP:
        for index in range(len(result)):
            _read_strided(
                handle, result[index, ...], start + index * stride * item, strides[1:], path
            )
        return
    step = len(result) if not stride else max(1, 1 + (PIECE // item - row) // stride)
    buffer = np.empty(row + (min(step, len(result)) - 1) * stride, result.dtype)
    steps = [stride * item for stride in strides]
    for index in range(0, len(result), step):
        part = result[index : index + step]
        span = buffer[: row + (len(part) - 1) * stride]
        _read_into(handle, span, start + index * stride * item, path)
        part[...] = as_strided(span, part.shape, steps)
