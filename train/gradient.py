"""The loss of a batch and its gradient: in parts of ``micro_batch_size`` sequences, over all ranks.

The loss is the mean over all counted tokens of the batch, so the parts and the ranks add up to what
the whole batch would give in one piece. Every rank knows the order of the data: it takes its slice
of the batch, and gradients are summed over the ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_hmem.anchors.attach import MemorySlot
from mlx_hmem.anchors.openlm import document_mask
from mlx_hmem.errors import UserError
from mlx_hmem.memory import join_blocks
from train.recipe import TrainerConfig

# What is trained: "anchor", its weights by name, and "blocks", the unique blocks of each level.
Weights = dict[str, Any]


def masked_loss(logits: mx.array, tokens: mx.array, eot: int) -> mx.array:
    """Mean next-token cross-entropy in nats of ``tokens`` (batch, time + 1).

    Padding, an EOT that follows an EOT, does not count.
    """
    counted = (tokens[:, :-1] != eot) | (tokens[:, 1:] != eot)
    return summed_loss(logits, tokens, eot) / mx.maximum(counted.sum(), 1)


def summed_loss(logits: mx.array, tokens: mx.array, eot: int) -> mx.array:
    """:func:`masked_loss` summed over the tokens that count."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    counted = ((inputs != eot) | (targets != eot)).astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    losses = mx.logsumexp(logits, axis=-1) - picked
    return (losses * counted).sum()


def packed_mask(inputs: mx.array, eot: int) -> mx.array:
    """Attention mask (batch, 1, time, time) of packed documents, each of which begins with EOT."""
    return document_mask(mx.cumsum((inputs == eot).astype(mx.int32), axis=1))


def num_counted(tokens: np.ndarray, eot: int) -> int:
    return int(np.sum((tokens[:, :-1] != eot) | (tokens[:, 1:] != eot)))


class BatchGradient:
    """Computes loss and gradient of ``anchor`` with the memory in ``slot``, if there is one."""

    def __init__(
        self,
        anchor: nn.Module,
        slot: MemorySlot | None,
        eot: int,
        training: TrainerConfig,
        group: mx.distributed.Group | None = None,
    ):
        self.training, self.eot = training, eot
        self.group = group or mx.distributed.init()
        self.exchanged_bytes = 0
        self._check_sizes()
        call: Callable[..., mx.array] = anchor

        def logits(inputs: mx.array) -> mx.array:
            if not training.document_mask:
                return call(inputs)
            return call(inputs, mask=packed_mask(inputs, eot))

        def loss(
            weights: Weights, indices: list[mx.array], batch: mx.array, scale: mx.array
        ) -> mx.array:
            if weights["anchor"]:
                anchor.update(tree_unflatten(list(weights["anchor"].items())))
            if slot is None:
                return scale * summed_loss(logits(batch[:, :-1]), batch, eot)
            # One memory per sequence.
            blocks = [b[i] for b, i in zip(weights["blocks"], indices, strict=True)]
            with slot.using(join_blocks(blocks, slot.config)):
                return scale * summed_loss(logits(batch[:, :-1]), batch, eot)

        self._part = mx.compile(mx.value_and_grad(loss))

    def _check_sizes(self) -> None:
        size, ranks = self.training.batch_size, self.group.size()
        part = self.training.micro_batch_size or size // ranks
        if size % ranks or (size // ranks) % part:
            raise UserError(
                "batch_size does not divide into equal parts",
                f"{size} sequences, {ranks} ranks, micro_batch_size {part}",
                f"use a multiple of {ranks * part}",
            )
        self.num_parts = size // ranks // part

    def __call__(
        self, weights: Weights, tokens: np.ndarray, indices: Sequence[np.ndarray] = ()
    ) -> tuple[float, float, Weights]:
        """Mean loss in nats per token, norm of the gradient before clipping, clipped gradient.

        Args:
            tokens: the whole batch, (sequences, context + 1).
            indices: for each level with memory the place of each sequence's block among the unique
                ones in ``weights["blocks"]``, (sequences,).
        """
        scale = mx.array(1 / max(1, num_counted(tokens, self.eot)), mx.float32)
        share = len(tokens) // self.group.size()
        first, part_size = self.group.rank() * share, share // self.num_parts
        value, gradient = mx.array(0.0), None
        for start in range(first, first + share, part_size):
            rows = slice(start, start + part_size)
            batch = mx.array(tokens[rows].astype(np.int32))
            places = [mx.array(index[rows].astype(np.int32)) for index in indices]
            loss, part = self._part(weights, places, batch, scale)
            value = value + loss
            gradient = part if gradient is None else tree_map(mx.add, gradient, part)
            if self.num_parts > 1:
                mx.eval(value, gradient)  # else all parts would wait in memory
        assert gradient is not None
        if self.group.size() > 1:
            value, gradient = self._sum_over_ranks(value, gradient)
        gradient, norm = optim.clip_grad_norm(gradient, self.training.grad_clip)
        mx.eval(value, norm, gradient)
        return value.item(), norm.item(), gradient  # type: ignore[return-value]

    def _sum_over_ranks(self, value: mx.array, gradient: Weights) -> tuple[mx.array, Weights]:
        """One message for everything: many small ones cost a round trip each."""
        leaves: Any = tree_flatten(gradient)
        mx.eval(value, gradient)
        flat = mx.concatenate([value.reshape(1), *(array.reshape(-1) for _, array in leaves)])
        flat = mx.distributed.all_sum(flat, group=self.group)
        self.exchanged_bytes += flat.nbytes
        ends = np.cumsum([1, *(array.size for _, array in leaves)]).tolist()
        parts = iter(mx.split(flat, ends[:-1]))
        value = next(parts).squeeze(0)
        return value, tree_map(lambda array: next(parts).reshape(array.shape), gradient)


def is_finite(loss: float, norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(norm)
