"""Matrices that are dequantised as they are read, and what rounding their numbers changes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_hmem.errors import UserError

from ..torch_files.tensors import ComputedTensor, LazyTensor, bits_of
from .weights import DTYPES, rounded

UNQUANTISED = (
    "take the model that it was made of, or save what model.dequantize() of transformers gives, "
    "where that runs"
)
# Of activations, which MLX does not quantise, and of keys and values.
UNUSED = ("input_scale", "input_scale_ub", "activation_scale", "output_scale", "input_zero_point",
          "k_scale", "v_scale", "q_scale", "weight_shape")  # fmt: skip
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


def computed(
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


def wrong(name: str, what: str) -> UserError:
    return UserError(f"{name} cannot be dequantised", what, "fetch the model again, all of it")


def check(name: str, tensor: LazyTensor, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        found = f"{tensor.dtype} {tensor.shape}"
        raise wrong(name, f"it is {found}, its matrix makes it {' or '.join(dtypes)} {shape}")
