"""The tensors of GGUF files, read when asked for; quantised ones are dequantised as they stream.

llama.cpp's own package ``gguf`` says what the bits of a block mean; it never opens a file.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from mlx_hmem.errors import UserError, needed

from ..torch_files.tensors import ITEM_SIZES, ComputedTensor, LazyTensor
from .header import Header, Tensor
from .settings import OTHER

LINE = 1 << 13  # numbers that the package takes 16 times at once: rows alone are too short for it
THREADS = min(4, os.cpu_count() or 1)
Dequantize = Callable[[np.ndarray], np.ndarray]


def open_tensors(header: Header) -> dict[str, LazyTensor]:
    """All tensors by llama.cpp's names. Floating-point numbers keep their bits, quantised ones
    become float32.

    Raises UserError for a type that is not dequantised here, and where the package is missing.
    """
    return {name: open_tensor(name, tensor) for name, tensor in header.tensors.items()}


def open_tensor(name: str, tensor: Tensor) -> LazyTensor:
    """One tensor, as :func:`open_tensors`."""
    kind = tensor.type.name
    if tensor.type.block == 1 and kind in ITEM_SIZES:
        return LazyTensor(tensor.path, tensor.start, kind, tensor.shape)
    package = needed("gguf", f"a GGUF file with {kind}")
    try:
        number = package.GGMLQuantizationType[kind]
        package.quants.dequantize(np.zeros((1, tensor.type.nbytes), np.uint8), number)
    except (KeyError, NotImplementedError) as error:
        what = f"{name[:80]} has a type that is not dequantised"
        newer = "pip install -U gguf, or " if isinstance(error, KeyError) else ""
        raise UserError(what, kind, f"{newer}{OTHER}") from None
    width = tensor.shape[-1] // tensor.type.block * tensor.type.nbytes
    raw = LazyTensor(tensor.path, tensor.start, "U8", (*tensor.shape[:-1], width))
    dequantize = partial(package.quants.dequantize, qtype=number)

    def compute(first: int, count: int) -> np.ndarray:
        bits = raw.read(first, count).reshape(-1, tensor.type.nbytes)
        made = np.empty((len(bits), tensor.type.block), np.float32)
        _dequantize_into(made, bits, dequantize)
        return made.reshape(count, *tensor.shape[1:]).view("<u4")

    return ComputedTensor(tensor.path, 0, "F32", tensor.shape, compute=compute)


def _dequantize_into(made: np.ndarray, blocks: np.ndarray, dequantize: Dequantize) -> None:
    """Blocks, each a row of bytes, as rows of numbers; in several threads, in which MLX is not."""
    line = max(1, LINE // made.shape[1])
    step = -(-len(blocks) // (line * THREADS)) * line

    def part(start: int) -> None:
        some = blocks[start : start + step]
        whole = len(some) // line * line
        with np.errstate(all="ignore"):  # numbers that are not finite are found by their bits
            for first, end, width in ((0, whole, line), (whole, len(some), 1)):
                if first < end:
                    lines = some[first:end].reshape(-1, width * blocks.shape[1])
                    made[start + first : start + end] = dequantize(lines).reshape(-1, made.shape[1])

    if step:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(part, range(0, len(blocks), step)))


def raw_of(tensor: Tensor) -> LazyTensor:
    """The bytes of a tensor as they lie in the file."""
    return LazyTensor(tensor.path, tensor.start, "U8", (tensor.nbytes,))
