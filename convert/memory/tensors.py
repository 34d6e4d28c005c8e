"""The tensors of a memory in PyTorch's layout (docs/pytorch_layout.md): names, shapes, reading.

A level is stored as *tables*, one tensor of all clusters for each layer and matrix, or as *blocks*,
one tensor of all layers for each cluster and matrix. Either way a range of clusters is read into
blocks as our bank stores them. Bits are moved, never numbers, unless another dtype is asked for;
that they are finite is checked as they pass, while they are in the processor's cache.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_hmem.anchors.openlm import PREFIXES
from mlx_hmem.bank.format import GENERIC, STORED_TYPES, num_blocks, stored_r
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError

from ..anchors.keys import Problems, strip
from ..torch_files.tensors import INFINITY, LazyTensor, all_finite, bits_of, numbers_of

DTYPES = {stored.tag: name for name, stored in STORED_TYPES.items()}
MEMORY_NAME = re.compile(r"(layers\.\d+\.)?memory\.")


class Matrix(NamedTuple):
    """A matrix of a block: the rows of one layer lie from ``start`` on, r · width values."""

    name: str
    width: int
    start: int
    stop: int


def matrices(config: MemoryConfig, r: int) -> list[Matrix]:
    """The matrices of one layer of a block with multiplier ``r``, in their order there."""
    result, start = [], 0
    for size, names in config.matrices.items():
        width = getattr(config, size)
        for name in names:
            result.append(Matrix(name, width, start, start + r * width))
            start += r * width
    return result


def short_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors by their names without the prefixes of wrappers and without nn.Embedding's end."""
    return strip(tensors, PREFIXES, is_memory)


def is_memory(name: str) -> bool:
    """Whether a name without prefixes is that of a memory's tensor."""
    return MEMORY_NAME.match(name) is not None


def table_name(layer: int, level: int, matrix: str) -> str:
    where = "generic" if level == GENERIC else f"levels.{level}"
    return f"layers.{layer}.memory.{where}.{matrix}"


@dataclass(frozen=True)
class LevelTensors:
    """The tensors of one level; level 0 is the generic memory.

    ``tensors[i][m]`` is matrix m of the layer at place i, (clusters, ...), or, where ``by_block``,
    of cluster i, (layers, ...).
    """

    level: int
    config: MemoryConfig
    matrices: list[Matrix]
    by_block: bool
    tensors: list[list[LazyTensor]]

    @property
    def dtypes(self) -> set[str]:
        return {tensor.dtype for row in self.tensors for tensor in row}

    def block_size(self) -> int:
        """Values of a block."""
        return self.config.num_memory_layers * self.matrices[-1].stop

    def read(self, first: int, count: int, tag: str, out: np.ndarray) -> np.ndarray:
        """Blocks ``first`` … as bits of dtype ``tag``: (count, values of a block), in ``out``.

        Raises UserError where a number is not finite.
        """
        blocks = out[: count * self.block_size()].reshape(
            count, self.config.num_memory_layers, self.matrices[-1].stop
        )
        clusters = range(first, first + count)
        for place in clusters if self.by_block else range(len(self.tensors)):
            for matrix, tensor in zip(self.matrices, self.tensors[place], strict=True):
                bits = tensor.read() if self.by_block else tensor.read(first, count)
                bits = finite_bits(bits, tensor.dtype, tag, self.name(place, matrix))
                target = blocks[place - first] if self.by_block else blocks[:, place]
                target[:, matrix.start : matrix.stop] = bits.reshape(len(bits), -1)
        return blocks.reshape(count, -1)

    def spans(self, first: int, count: int) -> Iterator[tuple[Path, int, int]]:
        """(file, first byte, bytes) of what :meth:`read` will read, as far as it is known."""
        for row in self.tensors[first : first + count] if self.by_block else self.tensors:
            for tensor in row:
                size = tensor.nbytes if self.by_block else tensor.nbytes // tensor.shape[0]
                start, length = (0, size) if self.by_block else (first * size, count * size)
                if tensor.strides is None:
                    yield tensor.path, tensor.offset + start, length

    def name(self, place: int, matrix: Matrix) -> str:
        if self.by_block:
            where = "generic" if self.level == GENERIC else f"levels.{self.level}.blocks.{place}"
            return f"memory.{where}.{matrix.name}"
        return table_name(self.config.memory_layers[place], self.level, matrix.name)


def finite_bits(bits: np.ndarray, dtype: str, wanted: str, name: str) -> np.ndarray:
    """The bits in dtype ``wanted``, rounded to nearest if that is another one; all finite."""
    if dtype != wanted:
        bits = bits_of(numbers_of(bits, dtype).astype(STORED_TYPES[DTYPES[wanted]].dtype))
    if not all_finite(bits, wanted):
        raise UserError(
            f"{name} has numbers that are not finite in {DTYPES[wanted]}",
            f"stored as {dtype}",
            "use --dtype bfloat16 or float32, or mend the checkpoint",
        )
    return bits


def find_levels(
    tensors: Mapping[str, LazyTensor], config: MemoryConfig
) -> dict[int, LevelTensors | None]:
    """The stored levels by number, 0 being the generic memory, which may be left out: None.

    ``tensors``: those of the memory alone, by :func:`short_names`. Raises UserError with lists of
    what is missing, of a wrong shape or left over.
    """
    problems, used, levels = Problems(), set[str](), dict[int, LevelTensors | None]()
    for level, r in stored_r(config).items():
        inside = r"generic\." if level == GENERIC else rf"levels\.{level}\."
        present = [name for name in tensors if re.search(rf"(^|\.)memory\.{inside}", name)]
        if level == GENERIC and not present:
            levels[level] = None
            continue
        by_block = any(name.startswith("memory.") for name in present)
        levels[level] = _find_level(tensors, config, level, r, by_block, problems, used)
    problems.lists["left over"] = [name for name in tensors if name not in used]
    problems.check(
        "the tensors of the memory do not fit its config",
        "correct the config or the names (docs/pytorch_layout.md)",
    )
    return levels


def _find_level(
    tensors: Mapping[str, LazyTensor],
    config: MemoryConfig,
    level: int,
    r: int,
    by_block: bool,
    problems: Problems,
    used: set[str],
) -> LevelTensors:
    result = LevelTensors(level, config, matrices(config, r), by_block, [])
    clusters, layers = num_blocks(config, level), config.num_memory_layers
    places, count = (clusters, layers) if by_block else (layers, clusters)
    for place in range(places):
        row = []
        for matrix in result.matrices:
            used.add(name := result.name(place, matrix))
            shape = (count, r, matrix.width)
            if name not in tensors:
                problems.lists["missing"].append(name)
            elif (tensor := fitted(tensors[name], shape)) is None:
                found = tensors[name]
                problems.lists["wrong shape"].append(
                    f"{name} is {found.dtype} {found.shape}, not {shape}"
                )
            else:
                row.append(tensor)
        result.tensors.append(row)
    return result


def fitted(tensor: LazyTensor, shape: tuple[int, int, int]) -> LazyTensor | None:
    """The tensor as (count, r · width) values if it is of that shape, or None.

    The last two axes may be one, as in an nn.Embedding; a count of 1 may be left out.
    """
    count, r, width = shape
    shapes = [shape, (count, r * width)] + ([(r, width)] if count == 1 else [])
    if tensor.dtype not in INFINITY or tensor.shape not in shapes:
        return None
    if count == 1 and tensor.shape == (r, width):
        strides = None if tensor.strides is None else (r * width, *tensor.strides)
        return replace(tensor, shape=shape, strides=strides)
    return tensor


def common_dtype(levels: Mapping[int, LevelTensors | None], dtype: str | None) -> str:
    """The bank's dtype: ``dtype`` if given, else the one that all tensors have."""
    if dtype is not None:
        return dtype
    found = sorted(set().union(*(level.dtypes for level in levels.values() if level)))
    if len(found) != 1 or found[0] not in DTYPES:
        raise UserError(
            "the memory has no dtype that a bank can have",
            ", ".join(found),
            f"choose one with --dtype: {', '.join(STORED_TYPES)}",
        )
    return DTYPES[found[0]]
