"""Weights that others have quantised, dequantised row by row while a conversion streams.

What is read, with where its layout is written down:

* 8 bits under scales, ``weight`` and ``weight_scale`` or ``weight_scale_inv``: floats (E4M3, E5M2)
  and whole numbers, a scale (a float, or E8M0) for each tensor, row, or block (transformers:
  finegrained_fp8, fbgemm_fp8; compressed-tensors);
* AutoAWQ's gemm, 4 bits: ``qweight`` (inputs, outputs / 8), ``qzeros`` and ``scales`` (groups, …),
  the eight numbers of an int32 in an order of their own;
* GPTQ, 2, 4 or 8 bits: ``qweight`` (inputs / pack, outputs), the lowest bits first; ``g_idx`` says
  each input's group. Version 1 stores a zero point less by one, version 2 as it is;
* compressed-tensors' pack-quantized, 2, 4 or 8 bits: ``weight_packed`` (outputs, inputs / pack).

A weight is computed in float32, (number - zero point) * scale, and rounded once to what is stored.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from mlx_hmem.errors import UserError

from ..torch_files.tensors import ComputedTensor, LazyTensor
from .packed import pack_quantized, packed
from .rounding import UNQUANTISED, UNUSED, Rounding, Tensors, check, computed, wrong
from .weights import DTYPES, FLOATS

BLOCK = (128, 128)
SCALES = ("weight_scale_inv", "weight_scale")
CODES = np.arange(256, dtype=np.uint8)
FORMATS = ("float-quantized", "naive-quantized", "int-quantized")  # of compressed-tensors
KNOWN = "awq, gptq, fp8, fbgemm_fp8 and compressed-tensors of whole numbers or 8 bits"


def _e4m3() -> np.ndarray:
    """float8_e4m3fn: fields as those of a float16, with a bias less by 8 and no infinities."""
    wide = CODES.astype("<u2")
    table = ((wide & 0x80) << 8 | (wide & 0x7F) << 7).view("<f2").astype("<f4") * 256
    table[[0x7F, 0xFF]] = np.nan
    return table


NUMBERS = {
    "F8_E4M3": _e4m3(),
    "F8_E5M2": (CODES.astype("<u2") << 8).view("<f2").astype("<f4"),  # the upper half of a float16
    "I8": CODES.view("i1").astype("<f4"),
}


E8M0 = "F8_E8M0"  # scales that are powers of two, as of MX formats
POWERS = np.append(np.ldexp(np.float32(1), CODES[:-1].astype(int) - 127), np.float32(np.nan))


def dequantised(
    tensors: Tensors, config: dict[str, Any], dtype: str | None
) -> tuple[dict[str, LazyTensor], dict[str, Any], Rounding | None]:
    """Tensors by the names that the unquantised model has, its config, and what rounding does.

    ``dtype``: of the result, as MLX calls it; by default the config's, or bfloat16. What is not
    quantised stays as it is, and all of it without a ``quantization_config``.

    Raises UserError: the source is quantised in another way, or parts of a matrix are missing or of
    the wrong shape.
    """
    how = config.get("quantization_config")
    if config.get("quantization"):
        raise UserError(
            "the source is quantised: a model of MLX", "quantization", "use it as it is"
        )
    if not how:
        return dict(tensors), config, None
    method = how.get("quant_method") if isinstance(how, dict) else None
    if not isinstance(method, str) or method not in READERS:
        what = "the source is quantised in a way that is not read"
        raise UserError(what, f"{str(method)[:80]!r} ({KNOWN} are)", UNQUANTISED)
    stored = dtype or str(config.get("dtype") or config.get("torch_dtype"))
    rounding = Rounding(method, DTYPES.get(stored, "BF16"))
    found = READERS[method](tensors, how, rounding)
    rest = {key: value for key, value in config.items() if key != "quantization_config"}
    return found, rest, rounding


def without_zero_biases(tensors: Tensors, wanted: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """AutoGPTQ gives every matrix a bias, of zeros where the model has none."""

    def is_empty(name: str, bias: LazyTensor) -> bool:
        weight = tensors.get(f"{name.removesuffix('bias')}weight")
        made = name.endswith(".bias") and name not in wanted and type(weight) is ComputedTensor
        return made and not bias.read().any()

    return {name: tensor for name, tensor in tensors.items() if not is_empty(name, tensor)}


def _scaled(tensors: Tensors, how: dict[str, Any], rounding: Rounding) -> dict[str, LazyTensor]:
    layout, sparse = how.get("format"), how.get("sparsity_config")
    dense = not sparse or (isinstance(sparse, dict) and sparse.get("format", "dense") == "dense")
    if rounding.method == "compressed-tensors" and layout == "pack-quantized" and dense:
        return pack_quantized(tensors, how, rounding)
    if rounding.method == "compressed-tensors" and (layout not in FORMATS or not dense):
        what = f"compressed-tensors are read as {', '.join(FORMATS)}, pack-quantized, not sparse"
        raise UserError(what, f"format {layout!r}"[:100], UNQUANTISED)
    block, result, used = how.get("weight_block_size") or BLOCK, dict[str, LazyTensor](), set[str]()
    if not isinstance(block, list | tuple) or not all(type(n) is int and n > 0 for n in block):
        raise UserError("weight_block_size is no pair of numbers", repr(block)[:80], "restore it")
    for name, tensor in tensors.items():
        if tensor.dtype not in NUMBERS or not name.endswith(".weight"):
            continue
        base = name.removesuffix("weight")
        scale = next((s for s in (f"{base}{end}" for end in SCALES) if s in tensors), None)
        if scale is None:
            raise wrong(name, f"it has no scale: neither {' nor '.join(SCALES)}")
        zero = tensors.get(f"{base}weight_zero_point")
        sizes = _block_of(name, tensor, tensors[scale], tuple(block))
        if zero is not None:
            check(f"{base}weight_zero_point", zero, tensors[scale].shape, ("I8",))
        rows = partial(_scaled_rows, tensor, tensors[scale], zero, sizes)
        shape = (tensor.shape[0], tensor.shape[1])
        result[name] = computed(name, tensor, shape, rows, rounding)
        used |= {scale, f"{base}weight_zero_point"}
    for name, tensor in tensors.items():
        if name not in result and name not in used and not name.endswith(UNUSED):
            if name.endswith(SCALES):
                raise wrong(name, "there is no weight of 8 bits for this scale")
            result[name] = tensor
    return result


def _block_of(
    name: str, weight: LazyTensor, scale: LazyTensor, block: tuple[int, ...]
) -> tuple[int, int]:
    """Over how many rows and columns one scale counts."""
    shape = scale.shape
    if (
        len(weight.shape) == 2
        and all(weight.shape)
        and scale.dtype in (*FLOATS, E8M0)
        and len(block) == 2
    ):
        rows, columns = weight.shape
        if shape in ((), (1,), (1, 1)):
            return rows, columns
        if shape in ((rows,), (rows, 1)):
            return 1, columns
        if shape == (-(-rows // block[0]), -(-columns // block[1])):
            return block[0], block[1]
        if len(shape) == 2 and shape[0] == rows and shape[1] and columns % shape[1] == 0:
            return 1, columns // shape[1]
    what = f"its scale is {scale.dtype} {shape}, the weight {weight.shape}"
    raise wrong(name, f"{what}: none for each tensor, row or block of {block}")


def _scaled_rows(
    weight: LazyTensor, scale: LazyTensor, zero: LazyTensor | None, block: tuple[int, int],
    first: int, count: int,
) -> np.ndarray:  # fmt: skip
    columns = weight.shape[1]
    over = (-(-weight.shape[0] // block[0]), -(-columns // block[1]))
    which = np.arange(first, first + count) // block[0]

    def spread(numbers: np.ndarray) -> np.ndarray:
        return np.repeat(numbers.reshape(over)[which], block[1], axis=1)[:, :columns]

    wide = NUMBERS[weight.dtype][weight.read(first, count)]
    if zero is not None:
        wide -= spread(NUMBERS["I8"][zero.read()])
    powers = scale.dtype == E8M0
    wide *= spread(POWERS[scale.read()] if powers else scale.numbers().astype("<f4"))
    return wide


READERS: dict[Any, Callable[..., dict[str, LazyTensor]]] = {
    "fp8": _scaled, "fbgemm_fp8": _scaled, "compressed-tensors": _scaled,
    "awq": packed, "gptq": packed,
}  # fmt: skip
