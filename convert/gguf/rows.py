"""Tensors whose rows come in another order, or whose numbers are others, computed as they stream.

llama.cpp turns neighbouring pairs (RoPE) in some architectures, where transformers and mlx-lm turn
the first half of a head with the second: its converter interleaves the rows of query and key.
"""

import mlx.core as mx
import numpy as np

from mlx_hmem.errors import UserError

from ..torch_files.tensors import ComputedTensor, LazyTensor, bits_of, numbers_of


def halved(tensor: LazyTensor, heads: int) -> ComputedTensor:
    """Rows 0, 2, 4 … of each head, and then 1, 3, 5 …; the inverse of :func:`interleaved`."""
    return _swapped(tensor, heads, (-1, 2))


def interleaved(tensor: LazyTensor, heads: int) -> ComputedTensor:
    """The rows of the first half of each head, each followed by its fellow of the second."""
    return _swapped(tensor, heads, (2, -1))


def _swapped(tensor: LazyTensor, heads: int, split: tuple[int, int]) -> ComputedTensor:
    rows = tensor.shape[0] if tensor.shape else 0
    size = rows // heads
    if size * heads != rows or size % 2:
        what = "the rows of query or key are no pairs for each head"
        raise UserError(what, f"{rows} rows, {heads} heads in {tensor.path}", "check the file")

    def compute(first: int, count: int) -> np.ndarray:
        start, stop = first // size, -(-(first + count) // size)  # whole heads
        part = tensor.read(start * size, (stop - start) * size)
        turned = part.reshape(stop - start, *split, *part.shape[1:]).swapaxes(1, 2)
        return turned.reshape(part.shape)[first - start * size :][:count]

    return ComputedTensor(tensor.path, 0, tensor.dtype, tensor.shape, compute=compute)


def shifted(tensor: LazyTensor, by: float) -> ComputedTensor:
    """The numbers of a tensor plus ``by``, computed in float32 and kept so."""

    def compute(first: int, count: int) -> np.ndarray:
        numbers = numbers_of(tensor.read(first, count), tensor.dtype).astype(mx.float32)
        return bits_of(numbers + by)

    return ComputedTensor(tensor.path, 0, "F32", tensor.shape, compute=compute)
