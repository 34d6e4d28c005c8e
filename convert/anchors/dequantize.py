"""Weights that others have quantised, dequantised row by row while a conversion streams.

What is read, with where its layout is written down:

* 8 bits under scales, ``weight`` and ``weight_scale`` or ``weight_scale_inv``: floats (E4M3, E5M2)
  and whole numbers, a scale for each tensor, row, or block (transformers: finegrained_fp8,
  fbgemm_fp8; compressed-tensors);
* AutoAWQ's gemm, 4 bits: ``qweight`` (inputs, outputs / 8), ``qzeros`` and ``scales`` (groups, …),
  the eight numbers of an int32 in an order of their own;
* GPTQ, 2, 4 or 8 bits: ``qweight`` (inputs / pack, outputs), the lowest bits first; ``g_idx`` says
  each input's group. Version 1 stores a zero point less by one, version 2 as it is.

A weight is computed in float32, (number - zero point) * scale, and rounded once to what is stored.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hmem.errors import UserError

from ..torch_files.tensors import ComputedTensor, LazyTensor, bits_of
from .weights import DTYPES, FLOATS, rounded

PART = 1 << 21  # numbers that are unpacked at once
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight numbers, where in their int32 each lies
BLOCK = (128, 128)
SCALES = ("weight_scale_inv", "weight_scale")
# Of activations, which MLX does not quantise, and of keys and values.
UNUSED = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "input_zero_point",
          "k_scale", "v_scale", "q_scale", "weight_shape")  # fmt: skip
CODES = np.arange(256, dtype=np.uint8)
FORMATS = ("float-quantized", "naive-quantized", "int-quantized")  # of compressed-tensors
KNOWN = "awq, gptq, fp8, fbgemm_fp8 and compressed-tensors of 8 bits"
UNQUANTISED = (
    "take the model that it was made of, or save what model.dequantize() of transformers gives, "
    "where that runs"
)


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
Tensors = Mapping[str, LazyTensor]
Rows = Callable[[int, int], np.ndarray]  # float32, (count, inputs), from first and count


@dataclass
class Rounding:
    """What rounding changed so far of the matrices that were dequantised as ``dtype``."""

    method: str
    dtype: str
    count: int = 0  # of all matrices
    seen: set[str] = field(default_factory=set)
    error: float = 0.0
    where: str = ""

    def keep(self, name: str, wide: mx.array, stored: mx.array) -> None:
        self.seen.add(name)
        error = float(np.array(mx.abs(stored.astype(mx.float32) - wide).max()))
        if error > self.error:
            self.error, self.where = error, name

    def line(self) -> str:
        """What was dequantised, and the largest difference between a weight and its product."""
        dtype = next(name for name, own in DTYPES.items() if own == self.dtype)
        line = f"dequantised {self.count} matrices ({self.method}) to {dtype}"
        if len(self.seen) < self.count:
            line += f", {len(self.seen)} of them now"
        if not self.error:
            return f"{line}; every weight is its product in float32"
        most = f"{self.error:.3g}, in {self.where}"
        return f"{line}; the most by which rounding changed a product in float32: {most}"


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


def _computed(
    name: str, path: LazyTensor, shape: tuple[int, int], rows: Rows, rounding: Rounding
) -> ComputedTensor:
    """The matrix ``name`` in the dtype of ``rounding``, whose numbers ``rows`` gives."""
    rounding.count += 1

    def compute(first: int, count: int) -> np.ndarray:
        with np.errstate(all="ignore"):  # what is not finite is found where it is written
            wide = mx.array(rows(first, count))
        stored = rounded(wide, rounding.dtype, name)
        rounding.keep(name, wide, stored)
        return bits_of(stored)

    return ComputedTensor(path.path, 0, rounding.dtype, shape, compute=compute)


def _wrong(name: str, what: str) -> UserError:
    return UserError(f"{name} cannot be dequantised", what, "fetch the model again, all of it")


def _check(name: str, tensor: LazyTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        found = f"{tensor.dtype} {tensor.shape}"
        raise _wrong(name, f"it is {found}, its matrix makes it {' or '.join(dtypes)} {shape}")


# 8 bits under scales


def _scaled(tensors: Tensors, how: dict[str, Any], rounding: Rounding) -> dict[str, LazyTensor]:
    layout, sparse = how.get("format"), how.get("sparsity_config")
    dense = not sparse or (isinstance(sparse, dict) and sparse.get("format", "dense") == "dense")
    if rounding.method == "compressed-tensors" and (layout not in FORMATS or not dense):
        what = "compressed-tensors are read of 8 bits, without sparsity"
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
            raise _wrong(name, f"it has no scale: neither {' nor '.join(SCALES)}")
        zero = tensors.get(f"{base}weight_zero_point")
        sizes = _block_of(name, tensor, tensors[scale], tuple(block))
        if zero is not None:
            _check(f"{base}weight_zero_point", zero, tensors[scale].shape, ("I8",))
        rows = partial(_scaled_rows, tensor, tensors[scale], zero, sizes)
        shape = (tensor.shape[0], tensor.shape[1])
        result[name] = _computed(name, tensor, shape, rows, rounding)
        used |= {scale, f"{base}weight_zero_point"}
    for name, tensor in tensors.items():
        if name not in result and name not in used and not name.endswith(UNUSED):
            if name.endswith(SCALES):
                raise _wrong(name, "there is no weight of 8 bits for this scale")
            result[name] = tensor
    return result


def _block_of(
    name: str, weight: LazyTensor, scale: LazyTensor, block: tuple[int, ...]
) -> tuple[int, int]:
    """Over how many rows and columns one scale counts."""
    shape = scale.shape
    if len(weight.shape) == 2 and all(weight.shape) and scale.dtype in FLOATS and len(block) == 2:
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
    raise _wrong(name, f"{what}: none for each tensor, row or block of {block}")


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
    wide *= spread(scale.numbers().astype("<f4"))
    return wide


# AWQ and GPTQ: several numbers in each int32


def _packed(tensors: Tensors, how: dict[str, Any], rounding: Rounding) -> dict[str, LazyTensor]:
    awq, bits = rounding.method == "awq", how.get("bits")
    form = how.get("version", "gemm") if awq else how.get("checkpoint_format", "gptq")
    if bits not in ((4,) if awq else (2, 4, 8)) or type(bits) is not int:
        what = f"{rounding.method} is read of {'4' if awq else '2, 4 and 8'} bits"
        raise UserError(what, f"bits {bits!r}"[:80], UNQUANTISED)
    if form not in (("gemm", "GEMM") if awq else ("gptq", "gptq_v2")):
        what = f"{rounding.method} is read as {'gemm' if awq else 'gptq and gptq_v2'} lays it out"
        raise UserError(what, repr(form)[:80], UNQUANTISED)
    result, made = dict[str, LazyTensor](), dict[str, LazyTensor]()
    for name, tensor in tensors.items():
        base, _, end = name.rpartition(".")
        if end == "qweight":
            parts = {key: tensors.get(f"{base}.{key}") for key in ("qzeros", "scales", "g_idx")}
            matrix = _Matrix(base, tensor, parts, bits, awq, form == "gptq_v2", how)
            weight = f"{base}.weight"
            made[weight] = _computed(weight, tensor, matrix.shape, matrix.rows, rounding)
        elif end not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor
    return result | made


class _Matrix:
    """One matrix of AWQ or GPTQ, (outputs, inputs), checked for its parts."""

    def __init__(
        self, base: str, weight: LazyTensor, parts: Mapping[str, LazyTensor | None],
        bits: int, awq: bool, as_it_is: bool, how: dict[str, Any],
    ):  # fmt: skip
        zeros, scales, groups = (parts[key] for key in ("qzeros", "scales", "g_idx"))
        if zeros is None or scales is None:
            raise _wrong(base, f"it has no {'scales' if scales is None else 'qzeros'}")
        if len(weight.shape) != 2 or not all(weight.shape) or weight.dtype != "I32":
            raise _wrong(base, f"its qweight is {weight.dtype} {weight.shape}")
        self.weight, self.zeros, self.scales, self.awq = weight, zeros, scales, awq
        self.pack, self.mask, self.more = 32 // bits, (1 << bits) - 1, int(not awq and not as_it_is)
        places = AWQ_PLACES if awq else range(self.pack)
        self.shifts = np.array([bits * place for place in places], "<u4")
        inputs, outputs = weight.shape
        if awq:
            outputs *= self.pack
        else:
            inputs *= self.pack
        self.shape, size = (outputs, inputs), how.get("group_size")
        if type(size) is not int or size < -1 or size == 0:
            raise UserError("group_size is no number of inputs", repr(size)[:80], "restore it")
        size = inputs if size == -1 else size
        count = -(-inputs // size)
        _check(f"{base}.qzeros", zeros, (count, -(-outputs // self.pack)), ("I32",))
        _check(f"{base}.scales", scales, (count, outputs), FLOATS)
        self.group = np.arange(inputs) // size
        if groups is not None:
            _check(f"{base}.g_idx", groups, (inputs,), ("I32",))
            self.group = groups.read().view("<i4")
            if not 0 <= self.group.min() <= self.group.max() < count:
                raise _wrong(f"{base}.g_idx", f"it names groups beyond the {count} that there are")

    def rows(self, first: int, count: int) -> np.ndarray:
        """Outputs ``first`` … ``first + count``, in float32."""
        scales = self.scales.T.rows(first, count).numbers().astype("<f4")  # (count, groups)
        zeros = ((self._columns(self.zeros, first, count) + self.more) & self.mask).astype("<f4")
        if self.awq:
            numbers = self._columns(self.weight, first, count)
        else:
            numbers = self.weight.T.rows(first, count).read()  # (count, inputs / pack)
        result = np.empty((count, self.shape[1]), "<f4")
        step = max(1, PART // max(1, self.shape[1]))
        for at in range(0, count, step):
            part, own = slice(at, at + step), numbers[at : at + step]
            if not self.awq:
                own = (own[:, :, None] >> self.shifts & self.mask).reshape(len(own), -1)
            result[part] = own
            result[part] -= zeros[part][:, self.group]
            result[part] *= scales[part][:, self.group]
        return result

    def _columns(self, packed: LazyTensor, first: int, count: int) -> np.ndarray:
        """Columns of what is packed along axis 1, as rows."""
        start, end = first // self.pack, -(-(first + count) // self.pack)
        words = packed.T.rows(start, end - start).read()
        numbers = words[:, None, :] >> self.shifts[:, None] & self.mask
        skipped = first - start * self.pack
        return numbers.reshape(-1, words.shape[1])[skipped : skipped + count]


READERS: dict[Any, Callable[..., dict[str, LazyTensor]]] = {
    "fp8": _scaled, "fbgemm_fp8": _scaled, "compressed-tensors": _scaled,
    "awq": _packed, "gptq": _packed,
}  # fmt: skip
