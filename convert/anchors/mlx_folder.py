"""The tensors of a folder as mlx-lm has it, as plain numbers: quantised matrices are dequantised as
they are read."""

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.load import weight_files
from mlx_hmem.bank.quantization import MODES
from mlx_hmem.errors import UserError

from ..torch_files.tensors import (
    MLX_TYPES,
    ComputedTensor,
    LazyTensor,
    bits_of,
    open_safetensors,
    read_bits,
)
from .keys import Shapes
from .weights import FLOATS

QUANTIZED = ("quantization", "quantization_config")  # keys of config.json
DEQUANTIZED = (
    "the anchor is quantised: its matrices are dequantised; mlx_hmem.convert quantize makes the "
    "result small again"
)


def plain_tensors(folder: Path, wanted: Shapes) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors under the names that they have there, and a line where they were quantised.

    Args:
        wanted: names and shapes of the anchor's parameters, as mlx-lm has them.

    Raises UserError for a quantisation that is not MLX's.
    """
    tensors = open_safetensors(weight_files(folder)).tensors
    scaled = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    if not scaled:
        return tensors, []
    dtype = next(
        (t.dtype for t in reversed(tensors.values()) if len(t.shape) == 1 and t.dtype in FLOATS),
        "BF16",
    )
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if module not in scaled or part == "bias":
            found[name] = tensor
        elif part == "weight":
            found[name] = _dequantized(name, tensors, wanted.get(name, ()), dtype)
        elif part not in ("scales", "biases"):
            raise UserError("a part of a quantised matrix that is not known", name, "dequantise it")
    return found, [DEQUANTIZED]


def _dequantized(
    name: str, tensors: Mapping[str, LazyTensor], shape: tuple[int, ...], dtype: str
) -> ComputedTensor:
    module = name.removesuffix("weight")
    packed, scales = tensors[name], tensors[f"{module}scales"]
    biases = tensors.get(f"{module}biases")
    bits, group_size, mode = _how(name, packed, scales, biases, shape)
    dtype = scales.dtype if scales.dtype in FLOATS else dtype

    def compute(first: int, count: int) -> np.ndarray:
        weight, scale, bias = (
            None if part is None else read_bits(part.read(first, count), part.dtype)
            for part in (packed, scales, biases)
        )
        assert weight is not None
        assert scale is not None
        to = MLX_TYPES[dtype]
        return bits_of(mx.dequantize(weight, scale, bias, group_size, bits, mode, dtype=to))

    return ComputedTensor(packed.path, 0, dtype, shape, compute=compute)


def _how(
    name: str,
    packed: LazyTensor,
    scales: LazyTensor,
    biases: LazyTensor | None,
    shape: tuple[int, ...],
) -> tuple[int, int, str]:
    """Bits, group size and mode, as the shapes tell them."""
    rows = {tensor.shape[:-1] for tensor in (packed, scales, biases) if tensor is not None}
    if packed.dtype == "U32" and rows == {shape[:-1]} and 0 not in (*shape, *scales.shape):
        bits, group_size = packed.shape[-1] * 32 // shape[-1], shape[-1] // scales.shape[-1]
        modes = ("affine",) if scales.dtype in FLOATS else ("mxfp4", "mxfp8", "nvfp4")
        for mode in modes if (biases is not None) == (scales.dtype in FLOATS) else ():
            if bits in MODES[mode][0] and group_size in MODES[mode][1]:
                return bits, group_size, mode
    raise UserError(
        "cannot tell how this matrix was quantised",
        f"{name} {packed.shape}, scales {scales.shape}, for {shape}",
        "use the anchor as it was before",
    )
