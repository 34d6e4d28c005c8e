"""Fused form of FFN memory, for one stream: fetched rows inside the anchor's own FFN weights.

An FFN widened by the fetched rows computes what attached memory adds to it (paper, section 3), with
not one operation more. Each weight is widened once and then written in place, so that another topic
costs only the rows of the levels that changed, and nothing of the anchor is kept twice.

Trade-offs: all rows of a batch share one memory. The anchor's weights have other shapes meanwhile,
under their old names, so it must not be saved or trained. A quantised matrix is not widened, and no
kind but ffn is a wider anchor: those keep the attached form (:mod:`mlx_hmem.anchors.attach`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from typing import Self

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.anchors.attach import check_sizes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory.layer import AnchorLayer, FFNLayer

REMEDY = "use the attached form (attach_memory)"


@dataclass(frozen=True)
class Joint:
    """A linear module of an FFN with ``extra`` units added to each of its ``parts`` (start, size).

    ``rows`` are the places of the parts in a block. Down, at ``axis`` 1, grows along its inputs.
    """

    module: nn.Linear
    axis: int
    parts: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    extra: int

    def widen(self) -> None:
        """Puts ``extra`` zeros after each part."""
        for name, array in self._arrays(wide=False):
            shape = list(array.shape)
            shape[self.axis] = self.extra
            zeros = mx.zeros(shape, array.dtype)
            pieces = [piece for part in self.parts for piece in (self._cut(array, *part), zeros)]
            self._replace(name, mx.concatenate(pieces, self.axis))

    def narrow(self) -> None:
        """Undoes :meth:`widen`, bit for bit."""
        for name, array in self._arrays(wide=True):
            starts = [start + i * self.extra for i, (start, _) in enumerate(self.parts)]
            pieces = [self._cut(array, s, n) for s, (_, n) in zip(starts, self.parts, strict=True)]
            # A mere slice would keep the whole wide buffer alive.
            self._replace(name, mx.contiguous(mx.concatenate(pieces, self.axis)))

    def write(self, block: mx.array | None, layer: int, start: int, stop: int) -> None:
        """Writes units ``start`` to ``stop`` from the block's rows at ``layer``; None: zeros."""
        weight = self.module.weight
        for i, (begin, size) in enumerate(self.parts):
            # Two indices at once make a view; one alone, block[layer], would copy.
            rows = None if block is None else block[layer, self.rows[i]].astype(weight.dtype)
            first = begin + size + i * self.extra
            # MLX writes into the buffer itself as long as nobody else holds the array.
            if self.axis:
                weight[:, first + start : first + stop] = 0 if rows is None else rows.T
            else:
                weight[first + start : first + stop] = 0 if rows is None else rows

    def _arrays(self, wide: bool) -> Iterator[tuple[str, mx.array]]:
        """The parameters to widen or, if ``wide``, those widened; down's bias stays as it is."""
        width = sum(size for _, size in self.parts) + wide * len(self.parts) * self.extra
        for name in ("weight",) if self.axis else ("weight", "bias"):
            if name in self.module and self.module[name].shape[self.axis] == width:
                yield name, self.module[name]

    def _replace(self, name: str, array: mx.array) -> None:
        mx.eval(array)  # one matrix at a time: the old one is let go before the next is made
        self.module[name] = array

    def _cut(self, array: mx.array, start: int, size: int) -> mx.array:
        stop = start + size
        return array[:, start:stop] if self.axis else array[start:stop]


class FusedMemory:
    """FFN memory inside the weights of ``anchor``, which is then called as it is.

    Nothing happens before the first :meth:`set`; :meth:`clear` ends it, and so does leaving the
    ``with`` block of a context manager.

    Raises:
        UserError: the memory is of another kind or for another anchor, or the anchor is quantised.
    """

    def __init__(self, anchor: nn.Module, config: MemoryConfig):
        _check(anchor, config)
        layers = anchor_layers(anchor)
        self.anchor, self.config = anchor, config
        self._layers = [joints_of(layers[i], sum(config.r)) for i in config.memory_layers]
        self._joints = [joint for joints in self._layers for joint in joints]
        self._written: dict[tuple[int, int], mx.array | None] | None = None

    def set(self, blocks: Sequence[mx.array | None]) -> None:
        """Makes the anchor hold these blocks alone (see :class:`FetchedMemory`).

        A level whose block is the same array as before is not written again; to know it, the blocks
        are kept. One block of sum(r) rows is the generic memory.

        Raises:
            UserError: the blocks do not fit, or another fused memory is in the anchor.
        """
        wanted = self._units(blocks)
        if self._written is None and is_fused(self.anchor):
            raise _fused_already()
        try:
            if self._written is None:
                self._widen()
            self._write(wanted)
        except BaseException:  # Ctrl-C too: never half a memory
            self.clear()
            raise

    def clear(self) -> None:
        """Takes the memory out: the anchor is what it was, bit for bit."""
        if self._written is None:
            return
        for joint in self._joints:
            joint.narrow()
        mx.clear_cache()
        self._written = None
        self.anchor.holds_fused_memory = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()

    def _widen(self) -> None:
        self._written, self.anchor.holds_fused_memory = {}, True
        for joint in self._joints:
            joint.widen()
            mx.clear_cache()  # the narrow matrices fit nothing else
        self._written = dict.fromkeys(self._units([None] * self.config.num_levels))

    def _write(self, wanted: dict[tuple[int, int], mx.array | None]) -> None:
        written = self._written
        assert written is not None
        for (start, stop), block in wanted.items():
            if (start, stop) in written and written[start, stop] is block:
                continue
            for layer, joints in enumerate(self._layers):
                for joint in joints:
                    joint.write(block, layer, start, stop)
        mx.eval([joint.module.weight for joint in self._joints])
        self._written = wanted

    def _units(self, blocks: Sequence[mx.array | None]) -> dict[tuple[int, int], mx.array | None]:
        """The blocks by the units, (start, stop), that they take."""
        r = self.config.r
        if len(blocks) == 1 and blocks[0] is not None:
            r = (sum(r),)
        shapes = [None if block is None else block.shape for block in blocks]
        wanted = [self.config.shape_of(n) for n in r]
        if len(shapes) != len(r) or any(
            shape not in (None, right) for shape, right in zip(shapes, wanted, strict=True)
        ):
            raise UserError(
                "the memory does not fit the anchor",
                f"blocks {shapes}",
                f"fetch blocks of {wanted} from a bank made for this anchor",
            )
        places = pairwise(accumulate(r, initial=0))
        return {(a, b): block for (a, b), block in zip(places, blocks, strict=True) if b > a}


def is_fused(anchor: nn.Module) -> bool:
    """Whether a fused memory is in the anchor's weights at the moment."""
    return getattr(anchor, "holds_fused_memory", False)


def _fused_already() -> UserError:
    return UserError(
        "a fused memory is in this anchor already",
        "one anchor holds one",
        "set blocks in that one, or clear it first",
    )


def _check(anchor: nn.Module, config: MemoryConfig) -> None:
    if config.kind != "ffn":
        raise UserError("only memory of kind ffn can be fused", f"kind {config.kind}", REMEDY)
    if is_fused(anchor):
        raise _fused_already()
    check_sizes(anchor, config)


def joints_of(layer: AnchorLayer, extra: int) -> list[Joint]:
    """The linear modules of a layer's FFN; gate and up may share one."""
    ffn = layer.ffn
    if not isinstance(ffn, FFNLayer):
        raise UserError(
            f"no FFN memory can join layer {layer.index}",
            f"its ffn is {ffn}",
            "use the attached form of a kind that joins attention",
        )
    parts = [part for part in (ffn.gate, ffn.up, ffn.down) if part is not None]
    joints = []
    for _, some in groupby(enumerate(parts), lambda each: id(each[1].module)):
        rows, own = zip(*some, strict=True)
        module = own[0].module
        if not isinstance(module, nn.Linear):
            raise UserError(
                f"ffn memory cannot be fused into layer {layer.index}",
                f"memory: plain floating-point rows; anchor: {type(module).__name__}",
                REMEDY,
            )
        axis = int(own[0] is ffn.down)
        places = ((0, module.weight.shape[1]),) if axis else tuple((p.start, p.size) for p in own)
        joints.append(Joint(module, axis, places, rows, extra))
    return joints
