"""Matrices of which several numbers lie in each int32: AWQ, GPTQ, compressed-tensors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mlx_hmem.errors import UserError, foreign

from ..torch_files.tensors import LazyTensor
from .rounding import UNQUANTISED, UNUSED, Rounding, Tensors, check, computed, wrong
from .weights import FLOATS

PART = 1 << 21  # numbers that are unpacked at once
AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of eight numbers, where in their int32 each lies


class Layout(NamedTuple):
    """How a method packs matrices: the ends of the names of numbers, zero points, scales and
    groups; whether numbers are packed along outputs; by what stored zero points are less than they
    are; whether each tensor lies the other way round, (outputs, …)."""

    ends: tuple[str, str, str, str] = ("qweight", "qzeros", "scales", "g_idx")
    along_outputs: bool = False
    more: int = 0
    turned: bool = False


COMPRESSED = Layout(
    ("weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"), turned=True
)


def packed(tensors: Tensors, how: dict[str, Any], rounding: Rounding) -> dict[str, LazyTensor]:
    awq, bits = rounding.method == "awq", how.get("bits")
    form = how.get("version", "gemm") if awq else how.get("checkpoint_format", "gptq")
    if bits not in ((4,) if awq else (2, 4, 8)) or type(bits) is not int:
        what = f"{rounding.method} is read of {'4' if awq else '2, 4 and 8'} bits"
        raise UserError(what, f"bits {bits!r}"[:80], UNQUANTISED)
    if form not in (("gemm", "GEMM") if awq else ("gptq", "gptq_v2")):
        what = f"{rounding.method} is read as {'gemm' if awq else 'gptq and gptq_v2'} lays it out"
        raise UserError(what, repr(form)[:80], UNQUANTISED)
    layout = Layout(along_outputs=awq, more=int(form == "gptq"))

    def matrix(base: str, weight: LazyTensor) -> _Matrix:
        size = how.get("group_size")
        if type(size) is not int or size < -1 or size == 0:
            raise UserError("group_size is no number of inputs", repr(size)[:80], "restore it")
        inputs = weight.shape[0] * (1 if awq else 32 // bits)
        return _Matrix(base, tensors, layout, bits, inputs, inputs if size == -1 else size)

    return _each(tensors, layout, matrix, rounding)


def pack_quantized(
    tensors: Tensors, how: dict[str, Any], rounding: Rounding
) -> dict[str, LazyTensor]:
    """compressed-tensors of few bits: zero points stand as they are, or lie in the middle."""
    groups: Any = how.get("config_groups")
    with foreign("config_groups name no number of bits", UNQUANTISED):
        bits = {int(each["weights"]["num_bits"]) for each in groups.values()}
    if len(bits) != 1 or not bits <= {2, 4, 8}:
        what = "compressed-tensors are read of one number of bits, 2, 4 or 8"
        raise UserError(what, f"num_bits {sorted(bits)}"[:80], UNQUANTISED)
    own = bits.pop()

    def matrix(base: str, weight: LazyTensor) -> _Matrix:
        shape, scale = (tensors.get(f"{base}.{end}") for end in ("weight_shape", "weight_scale"))
        if shape is None or shape.shape != (2,) or shape.dtype not in ("I64", "I32"):
            raise wrong(f"{base}.weight_shape", "it is missing, or no two whole numbers")
        inputs = int(shape.read().view(f"<i{shape.nbytes // 2}")[1])
        count = scale.shape[1] if scale is not None and len(scale.shape) == 2 else 1
        if inputs < 1 or not count or inputs % count:
            raise wrong(f"{base}.weight_scale", f"{count} scales for {inputs} inputs")
        return _Matrix(base, tensors, COMPRESSED, own, inputs, inputs // count)

    return _each(tensors, COMPRESSED, matrix, rounding)


def _each(
    tensors: Tensors, layout: Layout, matrix: Callable[[str, LazyTensor], "_Matrix"],
    rounding: Rounding,
) -> dict[str, LazyTensor]:  # fmt: skip
    """All tensors, packed ones as matrices."""
    result, made = dict[str, LazyTensor](), dict[str, LazyTensor]()
    for name, tensor in tensors.items():
        base, _, end = name.rpartition(".")
        if end == layout.ends[0]:
            if len(tensor.shape) != 2 or not all(tensor.shape) or tensor.dtype != "I32":
                raise wrong(base, f"its {end} is {tensor.dtype} {tensor.shape}")
            found, weight = matrix(base, tensor), f"{base}.weight"
            made[weight] = computed(weight, tensor, found.shape, found.rows, rounding)
        elif end not in layout.ends and not end.endswith(UNUSED):
            result[name] = tensor
    return result | made


class _Matrix:
    """One packed matrix, (outputs, inputs), checked for its parts."""

    def __init__(
        self, base: str, tensors: Tensors, layout: Layout, bits: int, inputs: int, size: int
    ):
        names = [f"{base}.{end}" for end in layout.ends]
        weight, zeros, scales, groups = (tensors.get(name) for name in names)
        if scales is None or (zeros is None and not layout.turned):
            raise wrong(base, f"it has no {layout.ends[2 if scales is None else 1]}")
        assert weight is not None
        if layout.turned:
            weight, scales, zeros = weight.T, scales.T, None if zeros is None else zeros.T
        self.weight, self.zeros, self.scales, self.layout = weight, zeros, scales, layout
        self.pack, self.mask = 32 // bits, (1 << bits) - 1
        places = AWQ_PLACES if layout.along_outputs else range(self.pack)
        self.shifts = np.array([bits * place for place in places], "<u4")
        outputs = weight.shape[1] * (self.pack if layout.along_outputs else 1)
        self.shape, count = (outputs, inputs), -(-inputs // size)
        if not layout.along_outputs:
            check(names[0], weight, (-(-inputs // self.pack), outputs), ("I32",))
        if zeros is not None:
            check(names[1], zeros, (count, -(-outputs // self.pack)), ("I32",))
        check(names[2], scales, (count, outputs), FLOATS)
        self.group = np.arange(inputs) // size
        if groups is not None:
            check(names[3], groups, (inputs,), ("I32",))
            found = groups.read().view("<i4")
            if layout.turned and (found == -1).all():  # inputs in their own order
                return
            self.group = found
            if not 0 <= self.group.min() <= self.group.max() < count:
                raise wrong(names[3], f"it names groups beyond the {count} that there are")

    def rows(self, first: int, count: int) -> np.ndarray:
        """Outputs ``first`` … ``first + count``, in float32."""
        scales = self.scales.T.rows(first, count).numbers().astype("<f4")  # (count, groups)
        zeros = np.full(scales.shape, (self.mask + 1) // 2, "<f4")
        if self.zeros is not None:
            stored = self._columns(self.zeros, first, count)
            zeros = (stored + self.layout.more & self.mask).astype("<f4")
        if self.layout.along_outputs:
            numbers = self._columns(self.weight, first, count)
        else:
            numbers = self.weight.T.rows(first, count).read()  # (count, inputs / pack)
        result = np.empty((count, self.shape[1]), "<f4")
        step = max(1, PART // max(1, self.shape[1]))
        for at in range(0, count, step):
            part, own = slice(at, at + step), numbers[at : at + step]
            if not self.layout.along_outputs:
                own = (own[:, :, None] >> self.shifts & self.mask).reshape(len(own), -1)
            result[part] = own[:, : self.shape[1]]
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
