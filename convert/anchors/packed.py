"""Matrices of which several numbers lie in each int32: AWQ, GPTQ, compressed-tensors."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlx_hmem.errors import UserError

from ..torch_files.tensors import LazyTensor
from .rounding import UNQUANTISED, Rounding, Tensors, check, computed, wrong
from .weights import FLOATS

PART = 1 << 21  # numbers that are unpacked at once
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight numbers, where in their int32 each lies


def packed(tensors: Tensors, how: dict[str, Any], rounding: Rounding) -> dict[str, LazyTensor]:
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
            made[weight] = computed(weight, tensor, matrix.shape, matrix.rows, rounding)
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
            raise wrong(base, f"it has no {'scales' if scales is None else 'qzeros'}")
        if len(weight.shape) != 2 or not all(weight.shape) or weight.dtype != "I32":
            raise wrong(base, f"its qweight is {weight.dtype} {weight.shape}")
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
        check(f"{base}.qzeros", zeros, (count, -(-outputs // self.pack)), ("I32",))
        check(f"{base}.scales", scales, (count, outputs), FLOATS)
        self.group = np.arange(inputs) // size
        if groups is not None:
            check(f"{base}.g_idx", groups, (inputs,), ("I32",))
            self.group = groups.read().view("<i4")
            if not 0 <= self.group.min() <= self.group.max() < count:
                raise wrong(f"{base}.g_idx", f"it names groups beyond the {count} that there are")

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
