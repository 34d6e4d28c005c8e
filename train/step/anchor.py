"""Trains all weights of an OpenLM anchor: from scratch, or on from a trained one (``dense``)."""

import math
from dataclasses import asdict, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model

from ..ranks import ALONE, Ranks
from ..recipe.recipe import TrainerConfig
from ..store.checkpoint import CheckpointFile
from .adamw import AnchorWeights
from .gradient import BatchGradient, is_finite
from .trainee import Sequences


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
    """All weights of an anchor, trained on ``tokens`` (sequences, context + 1). Those of several
    lengths hold one document each and need no mask but the causal one."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Sequences,
        eot: int,
        training: TrainerConfig,
        ranks: Ranks = ALONE,
    ):
        self.model, self.tokens, self.ranks = model, tokens, ranks
        self.weights = AnchorWeights(model, training, training.weight_decay)
        if not isinstance(tokens, np.ndarray):
            training = replace(training, document_mask=False)
        self.gradient = BatchGradient(model, None, eot, training, self.ranks)

    @property
    def identity(self) -> dict[str, Any]:
        return {"sizes": asdict(self.model.args)}

    def step(
        self, rows: np.ndarray, learning_rate: float, next_rows: np.ndarray | None = None
    ) -> tuple[float, float]:
        weights = {"anchor": self.weights.weights, "blocks": []}
        loss, norm, gradients = self.gradient(weights, self.tokens[rows])
        del weights  # or the update could not write in place
        if is_finite(loss, norm):
            self.weights.update(gradients["anchor"], learning_rate)
            mx.eval(self.weights.arrays())
        else:
            self.weights.restore()
        return loss, norm
