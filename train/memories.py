"""Trains memory on a frozen anchor: the blocks of a bank, or the generic memory beside it.

Every sequence brings its cluster path. A step gathers the *unique* blocks of the batch, so the
gradient of a block sums over the sequences that share it. The number of gathered blocks is padded
to the batch size: a compiled step wants fixed shapes, and the padding gets no gradient and is not
put back. The blocks themselves lie in a :class:`train.store.BlockStore`.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import join_blocks
from train.blocks import adamw
from train.checkpoint import Progress, check_identity
from train.loop import masked_loss, num_steps_of, packed_mask
from train.recipe import TrainerConfig
from train.store import BlockStore


class MemoryTrainee:
    """The blocks of ``store``, trained on the frozen ``anchor``.

    Args:
        tokens: sequences, (n, context + 1).
        paths: their cluster paths, (n, levels).
    """

    def __init__(
        self,
        anchor: nn.Module,
        store: BlockStore,
        tokens: np.ndarray,
        paths: np.ndarray,
        eot: int,
        training: TrainerConfig,
    ):
        anchor.freeze()
        self.store, self.tokens, self.paths, self.training = store, tokens, paths, training
        config = store.config
        self.levels = [level for level in range(1, config.num_levels + 1) if config.r[level - 1]]
        slot = attach_memory(anchor, config)
        betas = (training.beta1, training.beta2)

        def loss(blocks: list[mx.array], indices: list[mx.array], batch: mx.array) -> mx.array:
            # One memory per sequence.
            rows = join_blocks([b[i] for b, i in zip(blocks, indices, strict=True)], config)
            inputs = batch[:, :-1]
            with slot.using(rows):
                return masked_loss(anchor(inputs, mask=packed_mask(inputs, eot)), batch, eot)

        def step(
            states: list[list[mx.array]], indices: list[mx.array], batch: mx.array, rate: mx.array
        ) -> tuple[mx.array, mx.array, list[list[mx.array]]]:
            weights = [state[0] for state in states]
            value, gradients = mx.value_and_grad(loss)(weights, indices, batch)
            gradients, norm = optim.clip_grad_norm(gradients, training.grad_clip)
            updated = [
                adamw(state, gradient, rate, betas, training.weight_decay)
                for state, gradient in zip(states, gradients, strict=True)
            ]
            return value, norm, updated

        self._step = mx.compile(step)

    @property
    def sizes(self) -> dict[str, Any]:
        return self.store.config.to_dict()

    def step(
        self, rows: np.ndarray, learning_rate: float, next_rows: np.ndarray | None = None
    ) -> tuple[float, float]:
        batch = mx.array(self.tokens[rows].astype(np.int32))
        unique, indices, states = [], [], []
        for level in self.levels:
            clusters, index = np.unique(self.paths[rows, level - 1], return_inverse=True)
            unique.append(clusters)
            indices.append(mx.array(index.astype(np.int32)))
            states.append(self.store.gather(level, clusters, len(rows)))
        value, norm, updated = self._step(states, indices, batch, mx.array(learning_rate))
        if next_rows is not None:
            self.store.prefetch(self._keys(next_rows), keep=self._keys(rows))
        mx.eval(value, norm, updated)
        loss, length = float(value), float(norm)
        if math.isfinite(loss) and math.isfinite(length):
            for level, clusters, blocks in zip(self.levels, unique, updated, strict=True):
                self.store.scatter(level, clusters, blocks)
        return loss, length

    def resume(self, folder: Path, identity: dict[str, Any]) -> Progress:
        progress = self.store.progress() or Progress(identity)
        check_identity(progress.identity, identity, self.store.folder)
        self._check_disk()
        return progress

    def save(self, folder: Path, progress: Progress) -> None:
        self.store.commit(progress)

    def _keys(self, rows: np.ndarray) -> list[tuple[int, int]]:
        """The (level, cluster) of the blocks that the sequences need."""
        paths = self.paths[rows]
        return [(level, int(c)) for level in self.levels for c in np.unique(paths[:, level - 1])]

    def _check_disk(self) -> None:
        most = num_steps_of(len(self.tokens), self.training) * self.training.batch_size
        a_commit = self.training.save_every * self.training.batch_size
        touched = {n: min(most, len(np.unique(self.paths[:, n - 1]))) for n in self.levels}
        self.store.check_disk(touched, {n: min(a_commit, touched[n]) for n in self.levels})


def generic_config(config: MemoryConfig) -> MemoryConfig:
    """The generic memory as a bank of one level in which cluster 0 is always chosen."""
    return replace(config, r=(sum(config.r),), branching=(2,))
