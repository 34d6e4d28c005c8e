"""The loss of a batch and its gradient: in parts of ``micro_batch_size`` sequences, over all ranks.

The loss is the mean over all counted tokens of the batch, so the parts and the ranks add up to what
the whole batch would give in one piece. Every rank knows the order of the data: it takes its slice
of the batch, and gradients are summed over the ranks.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_hmem.anchors.architectures import head_of
from mlx_hmem.anchors.attach import MemorySlot
from mlx_hmem.anchors.load import float_dtype, num_embedded
from mlx_hmem.anchors.openlm import document_mask
from mlx_hmem.budget.resident import limit_buffers
from mlx_hmem.errors import UserError
from mlx_hmem.memory import join_blocks
from mlx_hmem.memory.layer import extend

from ..padding import counted
from ..ranks import Ranks
from ..recipe.recipe import TrainerConfig
from .candidates import Counting, Drawn, counted_loss, counting_of
from .loss import chunk_size, summed_loss
from .sums import blocks_of, sum_embeddings_in_order

# What is trained: "anchor", its weights by name, and "blocks", the unique blocks of each level.
Weights = dict[str, Any]
ALIKE = 0.75  # of a part's length, at least, is each of its sequences
SHAPES = 8  # lengths of sequences are multiples of this: a compiled step wants few shapes


class Ragged(NamedTuple):
    """Sequences of different lengths, padded to that of the longest, which comes first.

    ``lengths``: tokens of each, of which the first ``given`` are no targets; ``at_once``: tokens
    that may be worked on at a time, padding included.
    """

    given: np.ndarray
    lengths: np.ndarray
    at_once: int


def check_tokens(tokens: np.ndarray, num_embedded: int) -> None:
    """Raises UserError for a token that the anchor does not know: MLX would read beyond its
    embeddings, which is other numbers or the end of the process."""
    least, most = int(tokens.min(initial=0)), int(tokens.max(initial=0))
    if least < 0 or most >= num_embedded:
        remedy = "restore the run's tokens, or make them anew in another --out"
        what = f"a sequence has a token beyond the anchor's {num_embedded}"
        raise UserError(what, most if least >= 0 else least, remedy)


def packed_mask(inputs: mx.array, eot: int) -> mx.array:
    """Attention mask (batch, 1, time, time) of packed documents, each of which begins with EOT."""
    return document_mask(mx.cumsum((inputs == eot).astype(mx.int32), axis=1))


class BatchGradient:
    """Computes loss and gradient of ``anchor`` with the memory in ``slot``, if there is one."""

    def __init__(
        self,
        anchor: nn.Module,
        slot: MemorySlot | None,
        eot: int,
        training: TrainerConfig,
        ranks: Ranks,
    ):
        self.training, self.eot, self.ranks = training, eot, ranks
        limit_buffers()
        sum_embeddings_in_order(anchor)
        if training.gradient_checkpointing:
            recompute_layers(anchor, slot)
        self.exchanged_bytes = 0  # of one rank, since the beginning
        self._check_sizes()
        self.num_embedded = num_embedded(anchor)
        self.chunk = chunk_size(self.num_embedded)
        trunk, dtype = anchor.model, float_dtype(anchor)

        def summed(
            batch: mx.array, counting: Counting, frozen: bool
        ) -> tuple[mx.array, mx.array | None]:
            inputs = batch[:, :-1]
            mask = {"mask": packed_mask(inputs, eot)} if training.document_mask else {}
            hidden = trunk(inputs, **mask)
            if not frozen:
                return summed_loss(head_of(anchor)(hidden), batch, eot), None
            return counted_loss(anchor, hidden, counting, self.chunk)

        def loss(
            weights: Weights, indices: list[mx.array], batch: mx.array, counting: Counting
        ) -> tuple[mx.array, mx.array | None]:
            if weights["anchor"]:
                anchor.update(tree_unflatten(list(weights["anchor"].items())))
            given = (batch, counting, not weights["anchor"])
            if slot is None:
                return summed(*given)
            # One memory per sequence, or one for all of them.
            pairs = zip(weights["blocks"], indices, strict=True)
            blocks: list[Any] = [blocks_of(b, i) if i.ndim else b[i] for b, i in pairs]
            rows = tuple(rows.astype(dtype) for rows in join_blocks(blocks, slot.config))
            with slot.using(rows):
                return summed(*given)

        whole = mx.value_and_grad(loss)

        def part(
            weights: Weights,
            indices: list[mx.array],
            batch: mx.array,
            counting: Counting,
            scale: mx.array,
        ) -> tuple[tuple[mx.array, mx.array | None], Weights]:
            (total, right), found = whole(weights, indices, batch, counting)
            # Not before: a share of 1 / tokens is too small a number for a float16 anchor.
            return (scale * total, right), tree_map(lambda array: scale * array, found)

        self._part = mx.compile(part)

    def _check_sizes(self) -> None:
        size, ranks = self.training.batch_size, self.ranks.size
        part = self.training.micro_batch_size or size // ranks
        if size % ranks or (size // ranks) % part:
            raise UserError(
                "batch_size does not divide into equal parts",
                f"{size} sequences, {ranks} ranks, micro_batch_size {part}",
                f"use a multiple of {ranks * part}",
            )
        self.num_parts = size // ranks // part

    def __call__(
        self,
        weights: Weights,
        tokens: np.ndarray,
        indices: Sequence[np.ndarray] = (),
        num_unique: Sequence[int] = (),
        ragged: Ragged | None = None,
        drawn: Drawn | None = None,
    ) -> tuple[float, float, Weights]:
        """Mean loss in nats per token, norm of the gradient before clipping, clipped gradient.

        Args:
            tokens: the whole batch, (sequences, context + 1).
            indices: for each level with memory the place of each sequence's block among the unique
                ones in ``weights["blocks"]``, (sequences,).
            num_unique: how many of these there are; what follows them is padding.
            drawn: tokens that stand for the whole vocabulary, all targets among them.
            ragged: where not all sequences are of one length. Then ``likeliest``, (sequences,
                context) bool, says afterwards which targets were the likeliest tokens.
        """
        check_tokens(tokens, self.num_embedded)
        if ragged is None:
            counts, parts = counted(tokens, self.eot), self._equal_parts(tokens)
        else:
            places = np.arange(1, tokens.shape[1])
            counts = (places >= ragged.given[:, None]) & (places < ragged.lengths[:, None])
            parts = fitting_parts(ragged.lengths, ragged.at_once)
            self.likeliest = np.zeros_like(counts)
        scale = mx.array(1 / max(1, int(counts.sum())), mx.float32)
        value, gradient = mx.array(0.0), None
        for rows, length in parts:
            batch = tokens[rows, : length + 1].astype(np.int32)
            own = _together([index[rows] for index in indices])
            counting = counting_of(batch, counts[rows, :length], self.chunk, drawn)
            given = (own, mx.array(batch), counting, scale)
            (loss, right), part = self._part(weights, *given)
            value = value + loss
            gradient = part if gradient is None else tree_map(mx.add, gradient, part)
            del part  # so that sums and clipping write in place
            if len(parts) > 1:
                mx.eval(value, gradient)  # else all parts would wait in memory
            if ragged is not None:
                at = counts[rows, :length]
                self.likeliest[rows, :length][at] = np.array(right)[: int(at.sum())]
        assert gradient is not None
        if self.ranks.size > 1:
            value, gradient = self._sum_over_ranks(value, gradient, num_unique)
        gradient, norm = optim.clip_grad_norm(gradient, self.training.grad_clip)
        mx.eval(value, norm, gradient)
        return value.item(), norm.item(), gradient  # type: ignore[return-value]

    def _equal_parts(self, tokens: np.ndarray) -> list[tuple[slice, int]]:
        """The sequences that this rank works on at a time, and their length."""
        share = len(tokens) // self.ranks.size
        first, size = self.ranks.rank * share, share // self.num_parts
        starts = range(first, first + share, size)
        return [(slice(start, start + size), tokens.shape[1] - 1) for start in starts]

    def _sum_over_ranks(
        self, value: mx.array, gradient: Weights, num_unique: Sequence[int]
    ) -> tuple[mx.array, Weights]:
        """One message for everything: many small ones cost a round trip each."""
        sizes = [len(blocks) for blocks in gradient["blocks"]]
        touched = [b[:n] for b, n in zip(gradient["blocks"], num_unique, strict=True)]
        gradient = {"anchor": gradient["anchor"], "blocks": touched}
        leaves: Any = tree_flatten(gradient)
        flat = mx.concatenate([value.reshape(1), *(array.reshape(-1) for _, array in leaves)])
        mx.eval(flat)  # its memory is let go of before the answer comes
        flat = self.ranks.sum(flat)
        self.exchanged_bytes += flat.nbytes
        ends = np.cumsum([1, *(array.size for _, array in leaves)]).tolist()
        parts = iter(mx.split(flat, ends[:-1]))
        value = next(parts).squeeze(0)
        gradient = tree_map(lambda array: next(parts).reshape(array.shape), gradient)
        gradient["blocks"] = [
            mx.pad(blocks, [(0, size - len(blocks)), *[(0, 0)] * (blocks.ndim - 1)])
            for blocks, size in zip(gradient["blocks"], sizes, strict=True)
        ]
        return value, gradient


def _together(indices: list[np.ndarray]) -> list[mx.array]:
    """The places of the blocks of some sequences, (sequences,) for each level, or () where all have
    the same memory: it is read once then, and its gradient is no sum."""
    if all((index == index[0]).all() for index in indices):
        indices = [index[0] for index in indices]
    return [mx.array(np.asarray(index, np.int32)) for index in indices]


def fitting_parts(lengths: np.ndarray, at_once: int) -> list[tuple[slice, int]]:
    """Sequences, the longest first, in parts of ``at_once`` tokens at most, or of one sequence, and
    of nearly one length, for padding is work; and the length of each part."""
    parts, start = [], 0
    while start < len(lengths):
        length = -(-(int(lengths[start]) - 1) // SHAPES) * SHAPES
        shortest = min(ALIKE * length, lengths[start])  # of 11 tokens are 16 with padding
        alike = start + int((lengths[start:] >= shortest).sum())
        end = max(start + 1, min(alike, start + at_once // length))
        parts.append((slice(start, end), length))
        start = end
    return parts


def recompute_layers(anchor: nn.Module, slot: MemorySlot | None) -> None:
    """Makes the layers of ``anchor`` keep their input only and compute the rest again when the
    gradient wants it."""
    places = {} if slot is None else {i: p for p, i in enumerate(slot.config.memory_layers)}
    for index, layer in enumerate(anchor.layers):
        extend(layer, partial(_recomputed, layer, slot, places.get(index)))


def _recomputed(
    layer: nn.Module,
    slot: MemorySlot | None,
    place: int | None,
    before: Callable[..., mx.array],
    x: mx.array,
    *arguments: Any,
    **options: Any,
) -> mx.array:
    # What a gradient is wanted for must be an argument of the function that is computed again.
    rows = None if slot is None or place is None else slot.of_layer(place, None)
    leaves: Any = tree_flatten(layer.trainable_parameters())
    names, weights = [name for name, _ in leaves], [array for _, array in leaves]

    def call(x: mx.array, *arrays: mx.array) -> mx.array:
        layer.update(tree_unflatten(list(zip(names, arrays, strict=False))))
        if slot is None or rows is None:
            return before(x, *arguments, **options)
        with slot.using([arrays[len(names) :]] * slot.config.num_memory_layers):
            return before(x, *arguments, **options)

    return _computed_again(call)(x, *weights, *(rows or ()))


def _computed_again(call: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """``mx.checkpoint``, but the layer before waits until all gradients of this one are there. Left
    to itself MLX may first go down all layers for the gradient of the input and keep what it has
    computed again in each of them."""
    function = mx.custom_function(call)

    @function.vjp
    def gradient(primals: Any, cotangent: mx.array, output: mx.array) -> list[mx.array]:
        arrays = mx.depends(list(primals), [cotangent])
        _, gradients = mx.vjp(call, arrays, [cotangent])
        if len(gradients) > 1:
            gradients[:1] = mx.depends(gradients[:1], gradients[1:])
        return gradients

    result: Any = function
    return result


def is_finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)
