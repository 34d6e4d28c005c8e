"""Rows that stay quantised from the bank's file to the matrix product.

``mx.quantize`` has its groups run along a row. So packed values, scales and biases of rows join,
stack and are cut array by array, as the rows themselves would be.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx


class Packing(NamedTuple):
    """How values are quantised, as ``mx.quantize`` is told: ``group_size`` values of a row share a
    scale, in mode ``affine`` a bias too."""

    mode: str
    bits: int
    group_size: int


class Packed(NamedTuple):
    """Quantised rows (..., R, width), ``dtype`` being that of the numbers they stand for.

    ``arrays``: packed values (..., R, width · bits / 32), uint32; scales (..., R, width /
    group_size); in mode ``affine`` biases like them, both in ``dtype``.
    """

    arrays: tuple[mx.array, ...]
    packing: Packing
    dtype: mx.Dtype

    def floats(self) -> mx.array:
        """The numbers, (..., R, width)."""
        how: Any = self.packing._asdict()
        return mx.dequantize(*self._parts(), **how, dtype=self.dtype)

    def product(self, x: mx.array, transpose: bool) -> mx.array:
        """``x`` (..., n, width) times the transpose of the rows, or (..., n, R) times the rows."""
        how: Any = self.packing._asdict()
        return mx.quantized_matmul(x, *self._parts(), transpose, **how)

    def _parts(self) -> tuple[mx.array, mx.array, mx.array | None]:
        values, scales, *biases = self.arrays
        return values, scales, biases[0] if biases else None


Piece = mx.array | Packed


class Mixed(NamedTuple):
    """Rows side by side along R that are quantised in different ways, or some of them not at all:
    ``pieces``, one for each way."""

    pieces: tuple[Piece, ...]


# Rows of one width, (layers, rows, R, width) or some part of that.
Group = Piece | Mixed
G = TypeVar("G", bound=Group)
Rows = tuple[Group, ...]


def stays_packed() -> bool:
    """Whether rows are multiplied as they are packed on the device at hand, or made floats once.

    On a GPU packed: MLX has kernels of its own for it, and a token there waits for the bytes of its
    weights. On a CPU floats, whatever the shape: of MLX's products there, in ns for each value of
    the rows and row of x (x86, one core, 336 rows of 640 to 2,048 numbers),

        rows of x             1     8     128
        float32            0.45  0.07    0.03
        4 or 8 bits        0.85  0.85    0.85
        bfloat16            1.2   0.5     0.5
        the same, packed    6.5   6.2     6.3

    and making them floats takes 4, once (docs/quantizing.md).
    """
    return bool(mx.default_device().type == mx.gpu)


def pieces(group: Group | None) -> tuple[Piece, ...]:
    """The pieces of a group, itself where it is one; none of None."""
    return group.pieces if isinstance(group, Mixed) else () if group is None else (group,)


def each(change: Callable[..., mx.array], *groups: G) -> G:
    """A group whose arrays are ``change`` of those of ``groups``, which are packed alike. It must
    leave the last axis alone."""
    first: Any = groups[0]
    if isinstance(first, mx.array):
        changed: Any = change(*groups)
        return changed
    parts = zip(*(group[0] for group in groups), strict=True)  # arrays, or pieces
    change = partial(each, change) if isinstance(first, Mixed) else change
    return first._make((tuple(change(*some) for some in parts), *first[1:]))


def arrays_of(groups: Group | Rows) -> list[mx.array]:
    """All arrays that rows consist of."""
    if isinstance(groups, mx.array):
        return [groups]
    parts = groups.arrays if isinstance(groups, Packed) else groups
    return [array for part in parts for array in arrays_of(part)]


def shape_of(group: Group) -> tuple[int, ...]:
    """(..., R, width) in numbers, however they are stored."""
    if isinstance(group, Mixed):
        shapes = [shape_of(piece) for piece in group.pieces]
        return (*shapes[0][:-2], sum(shape[-2] for shape in shapes), shapes[0][-1])
    if isinstance(group, Packed):
        *rows, count = group.arrays[1].shape
        return (*rows, count * group.packing.group_size)
    return group.shape


def joined(groups: Sequence[Group]) -> Group:
    """Groups side by side along R; those that are packed alike become one piece."""
    found = [each(_concatenated, *some) for some in _alike(groups).values()]
    return found[0] if len(found) == 1 else Mixed(tuple(found))


def stacked(groups: Sequence[Group | None]) -> Group:
    """Groups with a batch axis in front. Where one has fewer rows than another, or is None, there
    are zeros."""
    found = []
    for packing, some in _alike(groups).items():
        own = [_alike([group]).get(packing, [each(_none, some[0])])[0] for group in groups]
        most = max(shape_of(piece)[-2] for piece in own)
        found.append(each(partial(_stacked, most), *own))
    return found[0] if len(found) == 1 else Mixed(tuple(found))


def replaced_end(group: Group, end: Group) -> Group:
    """``group``, with its last rows those of ``end``: of each way to be packed so many as are
    there. MLX writes into the arrays themselves where nobody else holds them."""
    last = _alike([end])
    found = [
        each(_written_at_the_end, piece, *last.get(packing, []))
        for packing, (piece,) in _alike([group]).items()
    ]
    return found[0] if len(found) == 1 else Mixed(tuple(found))


def cast(group: Group, dtype: mx.Dtype) -> Group:
    """The same rows as numbers of ``dtype``."""
    if isinstance(group, mx.array):
        return group.astype(dtype)
    if isinstance(group, Mixed):
        again: Any = (cast(piece, dtype) for piece in group.pieces)
        return Mixed(tuple(again))
    # Packed values are integers, and so are the scales of all modes but affine.
    arrays = (a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a for a in group.arrays)
    return Packed(tuple(arrays), group.packing, dtype)


def floats(group: Group) -> mx.array:
    """The rows as floats, those of a mixed group joined."""
    if isinstance(group, Mixed):
        return mx.concatenate([floats(piece) for piece in group.pieces], axis=-2)
    if isinstance(group, Packed):
        return group.floats()
    return group


def ready(rows: Rows, dtype: mx.Dtype) -> Rows:
    """A memory, or one layer of it, for use in ``dtype``: what is packed stays so or, where that is
    the faster (:func:`stays_packed`), is made floats now."""
    made = cast if stays_packed() else _floats_now
    return tuple(made(group, dtype) for group in rows)


def _floats_now(group: Group, dtype: mx.Dtype) -> mx.array:
    if isinstance(group, mx.array):
        return group.astype(dtype)
    # Part by part, each waited for: MLX's CPU runs ahead and takes new memory for all steps of what
    # it is given at once (18M values: 63 ms so, 188 at once).
    whole = mx.zeros(shape_of(group), dtype)
    for place in range(len(whole)):
        whole[place] = floats(cast(each(lambda a, place=place: a[place, ...], group), dtype))
        mx.eval(whole)
    return whole


def _alike(groups: Sequence[Group | None]) -> dict[Packing | None, list[Piece]]:
    """The pieces of all groups by the way they are packed; None: not at all."""
    found: dict[Packing | None, list[Piece]] = {}
    for piece in chain.from_iterable(map(pieces, groups)):
        found.setdefault(piece.packing if isinstance(piece, Packed) else None, []).append(piece)
    return found


def _concatenated(*arrays: mx.array) -> mx.array:
    return mx.concatenate(list(arrays), axis=-2)


def _none(rows: mx.array) -> mx.array:
    return rows[..., :0, :]


def _stacked(most: int, *arrays: mx.array) -> mx.array:
    """With zeros up to R = ``most``; in every mode they are zeros when packed, too."""
    sides = [(0, 0)] * (arrays[0].ndim - 2)
    return mx.stack([mx.pad(a, [*sides, (0, most - a.shape[-2]), (0, 0)]) for a in arrays])


def _written_at_the_end(rows: mx.array, end: mx.array | None = None) -> mx.array:
    if end is None:
        return rows
    start = mx.array([rows.shape[-2] - end.shape[-2]])
    return mx.slice_update(rows, end, start, axes=[rows.ndim - 2])
