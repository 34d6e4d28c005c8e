"""Trains memory on a frozen anchor: the blocks of a bank, or the generic memory beside it.

Every sequence brings its cluster path. A step gathers the *unique* blocks of the batch, so the
gradient of a block sums over the sequences that share it. The number of gathered blocks is padded
to the batch size: a compiled step wants fixed shapes, and the padding gets no gradient and is not
put back.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import join_blocks
from train.blocks import BlockTable, adamw
from train.loop import masked_loss, packed_mask
from train.recipe import TrainerConfig


class MemoryTrainee:
    """The blocks of ``config``'s levels, trained on the frozen ``anchor``.

    Args:
        tokens: sequences, (n, context + 1).
        paths: their cluster paths, (n, levels).
    """

    def __init__(
        self,
        anchor: nn.Module,
        config: MemoryConfig,
        tokens: np.ndarray,
        paths: np.ndarray,
        eot: int,
        training: TrainerConfig,
        seed: int,
    ):
        anchor.freeze()
        self.tokens, self.paths = tokens, paths
        self.levels = [level for level in range(1, config.num_levels + 1) if config.r[level - 1]]
        self.tables = [BlockTable(config, level, seed) for level in self.levels]
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

    def step(self, rows: np.ndarray, learning_rate: float) -> tuple[float, float]:
        batch = mx.array(self.tokens[rows].astype(np.int32))
        unique, indices, states = [], [], []
        for level, table in zip(self.levels, self.tables, strict=True):
            clusters, index = np.unique(self.paths[rows, level - 1], return_inverse=True)
            padded = np.concatenate([clusters, np.repeat(clusters[:1], len(rows) - len(clusters))])
            unique.append(clusters)
            indices.append(mx.array(index.astype(np.int32)))
            states.append(table.gather(padded))
        value, norm, updated = self._step(states, indices, batch, mx.array(learning_rate))
        mx.eval(value, norm, updated)
        for table, clusters, blocks in zip(self.tables, unique, updated, strict=True):
            table.scatter(clusters, blocks)
        return float(value), float(norm)

    def state(self) -> dict[str, mx.array]:
        return {
            f"level-{level}.{name}": array
            for level, table in zip(self.levels, self.tables, strict=True)
            for name, array in table.state().items()
        }

    def load_state(self, state: dict[str, mx.array]) -> None:
        for level, table in zip(self.levels, self.tables, strict=True):
            prefix = f"level-{level}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            table.load_state(own)


def generic_config(config: MemoryConfig) -> MemoryConfig:
    """The generic memory as a bank of one level in which cluster 0 is always chosen."""
    return replace(config, r=(sum(config.r),), branching=(2,))
