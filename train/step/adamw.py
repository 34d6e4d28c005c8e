"""AdamW as one function on stacked weights, each with a step count of its own.

For blocks it is *lazy*: a block that no sequence of the batch chose keeps its weights, its moments
do not decay, and its bias correction counts its own steps. Where every block is touched in every
step this equals dense AdamW. An anchor's weight is a stack of one.
"""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import group_shapes, whole_block

from ..recipe.recipe import TrainerConfig

Betas = tuple[float, float]


def bias_corrections(steps: mx.array, betas: Betas) -> list[mx.array]:
    """What the step after ``steps`` steps, (n,), divides first and second moments by, each (n,).

    To be computed outside of what is compiled: fused into it, the powers would be taken for each
    weight, and near zero they are slow (on Linux some 8 % of a training step).
    """
    counts = (steps + 1).astype(mx.float32)
    return [1 - beta**counts for beta in betas]


def adamw(
    state: list[mx.array],
    gradient: mx.array,
    rate: mx.array,
    corrections: list[mx.array],
    betas: Betas,
    weight_decay: float,
) -> list[mx.array]:
    """One AdamW step.

    Args:
        state: weights, first and second moments (n, ...), and steps so far, (n,) or (1,) for all.
        gradient: as the weights.
        corrections: :func:`bias_corrections` of the steps so far.
    """
    weights, first, second, steps = state
    first = betas[0] * first + (1 - betas[0]) * gradient
    second = betas[1] * second + (1 - betas[1]) * mx.square(gradient)
    by_first, by_second = (c.reshape(-1, *[1] * (weights.ndim - 1)) for c in corrections)
    first_hat, second_hat = first / by_first, second / by_second
    weights = weights * (1 - rate * weight_decay) - rate * first_hat / (mx.sqrt(second_hat) + 1e-8)
    return [weights, first, second, steps + 1]


def rate_shares(config: MemoryConfig, level: int, reading: float | None) -> mx.array:
    """The share of the learning rate that each weight of a block has, float32, to be broadcast with
    a stack of them: ``reading`` for the matrices that read a layer (A of LoRA, gate and up, keys),
    1 for those that write into it, which begin as zeros (LoRA+, arXiv 2402.12354)."""
    if reading is None:
        return mx.array(1.0)
    groups = []
    shapes = group_shapes(config, config.r[level - 1])
    for (_, rows, r, width), names in zip(shapes, config.matrices.values(), strict=True):
        writes = [name in ("down", "value") or name.endswith("_b") for name in names]
        shares = np.where(writes, 1.0, reading).astype(np.float32)
        groups.append(np.broadcast_to(shares[None, :, None, None], (1, rows, r, width)))
    return mx.array(whole_block(groups))[None]


class AnchorWeights:
    """All weights of an anchor with their AdamW state; the model always holds the current ones.

    Norm gains are not decayed.
    """

    def __init__(self, model: nn.Module, training: TrainerConfig, weight_decay: float):
        self.model = model
        self.weights = named_parameters(model)
        self.steps = mx.zeros(1, mx.int32)
        self.first = {name: mx.zeros_like(weight) for name, weight in self.weights.items()}
        self.second = {name: mx.zeros_like(weight) for name, weight in self.weights.items()}
        self._betas = betas = (training.beta1, training.beta2)
        self._decayed, self._undecayed = (
            mx.compile(partial(adamw, betas=betas, weight_decay=d)) for d in (weight_decay, 0.0)
        )

    def update(self, gradients: dict[str, mx.array], rate: float) -> None:
        """One step, lazily. What it replaces is let go of at once, so that MLX writes in place."""
        steps, learning_rate = self.steps, mx.array(rate)
        corrections = bias_corrections(steps, self._betas)
        for name, gradient in gradients.items():
            state = [part.pop(name) for part in (self.weights, self.first, self.second)]
            one_step = self._decayed if state[0].ndim >= 2 else self._undecayed
            self.weights[name], self.first[name], self.second[name], self.steps = one_step(
                [*state, steps], gradient, learning_rate, corrections
            )
        self.restore()

    def restore(self) -> None:
        """Puts the weights into the model, which may hold those of a trace."""
        self.model.update(tree_unflatten(list(self.weights.items())))

    def arrays(self) -> dict[str, mx.array]:
        """Everything, by names that :meth:`load` understands."""
        parts = {"weights": self.weights, "first": self.first, "second": self.second}
        result = {f"{part}.{n}": array for part, d in parts.items() for n, array in d.items()}
        return result | {"steps": self.steps}

    def load(self, arrays: dict[str, mx.array]) -> None:
        for name in self.weights:
            self.weights[name] = arrays[f"weights.{name}"]
            self.first[name] = arrays[f"first.{name}"]
            self.second[name] = arrays[f"second.{name}"]
        self.steps = arrays["steps"]
        self.restore()
