"""Trains all weights of an OpenLM anchor: from scratch, or on from a trained one (``dense``)."""

import math
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model
from train.checkpoint import CheckpointFile
from train.loop import masked_loss, packed_mask
from train.recipe import TrainerConfig


def initialise(model: Model, seed: int) -> None:
    """OpenLM's start: truncated normal at 3σ, σ = fan-in^-1/2, less in deeper output matrices."""
    args, key = model.args, mx.random.key(seed)
    weights = {}
    for name, array in named_parameters(model).items():
        if array.ndim < 2:
            continue  # norms start at one
        key, draw = mx.random.split(key)
        depth = int(name.split(".")[2]) + 1 if ".layers." in name else 1
        sigma = args.hidden_size**-0.5
        if "o_proj" in name:
            sigma /= math.sqrt(2 * depth)
        elif "down_proj" in name:
            sigma = args.intermediate_size**-0.5 / math.sqrt(2 * depth)
        weights[name] = sigma * mx.random.truncated_normal(-3, 3, array.shape, key=draw)
    model.update(tree_unflatten(list(weights.items())))
    mx.eval(model.parameters())


class AnchorTrainee(CheckpointFile):
    """An anchor, its AdamW state and its data (sequences, context + 1)."""

    def __init__(self, model: Model, tokens: np.ndarray, eot: int, config: TrainerConfig):
        self.model, self.tokens = model, tokens
        betas = [config.beta1, config.beta2]
        # Norm gains are not decayed.
        self.optimizer = optim.MultiOptimizer(
            [
                optim.AdamW(1.0, betas, weight_decay=config.weight_decay, bias_correction=True),
                optim.AdamW(1.0, betas, weight_decay=0.0, bias_correction=True),
            ],
            [lambda _, weight: weight.ndim >= 2],
        )
        self.optimizer.init(model.trainable_parameters())

        def loss(model: Model, batch: mx.array) -> mx.array:
            inputs = batch[:, :-1]
            return masked_loss(model(inputs, mask=packed_mask(inputs, eot)), batch, eot)

        def step(batch: mx.array, rate: mx.array) -> tuple[mx.array, mx.array]:
            value, gradients = nn.value_and_grad(model, loss)(model, batch)
            gradients, norm = optim.clip_grad_norm(gradients, config.grad_clip)
            self.optimizer.learning_rate = rate
            before = self._parts()
            self.optimizer.update(model, gradients)
            finite = mx.isfinite(value) & mx.isfinite(norm)
            after = tree_map(lambda new, old: mx.where(finite, new, old), self._parts(), before)
            self._put(after)
            return value, norm

        state = [model.state, self.optimizer.state]
        self._step = mx.compile(step, inputs=state, outputs=state)

    @property
    def sizes(self) -> dict[str, Any]:
        return asdict(self.model.args)

    def step(
        self, rows: np.ndarray, learning_rate: float, next_rows: np.ndarray | None = None
    ) -> tuple[float, float]:
        batch = mx.array(self.tokens[rows].astype(np.int32))
        value, norm = self._step(batch, mx.array(learning_rate, mx.float32))
        mx.eval(value, norm, self.model.state, self.optimizer.state)
        return float(value), float(norm)

    def state(self) -> dict[str, mx.array]:
        pairs: Any = tree_flatten(self._parts())
        return dict(pairs)

    def load_state(self, state: dict[str, mx.array]) -> None:
        self._put(tree_unflatten(list(state.items())))
        mx.eval(self.model.state, self.optimizer.state)

    def _parts(self) -> dict[str, Any]:
        parts = {"model": self.model.parameters(), "optimizer": self.optimizer.state}
        return tree_map(lambda array: array, parts)  # dictionaries of our own

    def _put(self, parts: Any) -> None:
        self.model.update(parts["model"])
        # In place: the compiled step holds on to these very dictionaries.
        states = parts["optimizer"]["states"]
        for optimizer, saved in zip(self.optimizer.optimizers, states, strict=True):
            optimizer.state.update(saved)
