"""The blocks under training: weights, moments and steps of every (level, cluster), in memory.

A step gathers the few blocks of its batch, updates those and scatters them back. AdamW is *lazy*:
a block that no sequence of the batch chose keeps its weights, its moments do not decay, and its
bias correction counts its own steps. Where every block is touched in every step this equals dense
AdamW. Start values follow from (seed, level, cluster) alone.
"""

import mlx.core as mx
import numpy as np

from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import initial_block


class BlockTable:
    """All blocks of one level, float32."""

    def __init__(self, config: MemoryConfig, level: int, seed: int):
        num_clusters, r = config.num_clusters[level - 1], config.r[level - 1]
        self.weights = np.stack(
            [
                initial_block(config, r, np.random.default_rng([seed, level, cluster]))
                for cluster in range(num_clusters)
            ]
        )
        self.first = np.zeros_like(self.weights)
        self.second = np.zeros_like(self.weights)
        self.steps = np.zeros(num_clusters, np.int32)

    def gather(self, clusters: np.ndarray) -> list[mx.array]:
        """Copies of weights, first and second moments and steps of ``clusters``."""
        parts = (self.weights, self.first, self.second, self.steps)
        return [mx.array(part[clusters]) for part in parts]

    def scatter(self, clusters: np.ndarray, updated: list[mx.array]) -> None:
        """Puts back the first ``len(clusters)`` of the updated blocks."""
        parts = (self.weights, self.first, self.second, self.steps)
        for part, values in zip(parts, updated, strict=True):
            part[clusters] = np.array(values[: len(clusters)], copy=False)

    def state(self) -> dict[str, mx.array]:
        return {
            "weights": mx.array(self.weights),
            "first": mx.array(self.first),
            "second": mx.array(self.second),
            "steps": mx.array(self.steps),
        }

    def load_state(self, state: dict[str, mx.array]) -> None:
        for name in ("weights", "first", "second", "steps"):
            getattr(self, name)[:] = np.array(state[name])


def adamw(
    blocks: list[mx.array],
    gradient: mx.array,
    rate: mx.array,
    betas: tuple[float, float],
    weight_decay: float,
) -> list[mx.array]:
    """One AdamW step on stacked blocks, each with a step count of its own.

    Args:
        blocks: weights, first and second moments (n, ...), and steps (n,) so far.
        gradient: as the weights.
    """
    weights, first, second, steps = blocks
    steps = steps + 1
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * mx.square(gradient)
    counts = steps.astype(mx.float32).reshape(-1, *[1] * (weights.ndim - 1))
    first_hat = first / (1 - betas[0] ** counts)
    second_hat = second / (1 - betas[1] ** counts)
    weights = weights * (1 - rate * weight_decay) - rate * first_hat / (mx.sqrt(second_hat) + 1e-8)
    return [weights, first, second, steps]
