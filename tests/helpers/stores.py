"""What a training changes, as arrays; and the same training with every block a parameter."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import initial_block, join_blocks
from train.step.gradient import packed_mask
from train.step.loss import masked_loss
from train.store.blocks import BlockStore

EOT = 0


def store_state(store: BlockStore) -> dict[str, np.ndarray]:
    """All weights, moments and steps, those of generic memory too, and what was saved beside."""
    result = store.arrays()
    for level, count in enumerate(store.config.num_clusters, 1):
        parts = store.gather(level, np.arange(count + 1), count + 1)
        names = (f"{level}.{name}" for name in ("weights", "first", "second", "steps"))
        result |= zip(names, map(np.array, parts), strict=True)
    return result


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].tobytes() == b[name].tobytes(), name


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5, err_msg=name)


class Dense:
    """The reference of a step: every block, those of generic memory too, is a parameter with an
    MLX AdamW of its own; so is every weight of the anchor at ``scale`` of the rate, if there is
    one. Sequence by sequence, no batch."""

    def __init__(
        self, model: nn.Module, config: MemoryConfig, seed: int, clip: float, scale: float = 0.0
    ):
        self.model, self.config, self.clip, self.scale = model, config, clip, scale
        self.slot = attach_memory(model, config)
        self.weights: dict[object, mx.array] = dict(named_parameters(model)) if scale else {}
        self.names = list(self.weights)
        for level, count in enumerate(config.num_clusters, 1):
            for cluster in range(count + 1):
                random = np.random.default_rng([seed, level, cluster])
                block = initial_block(config, config.r[level - 1], random)
                self.weights[level, cluster] = mx.array(block)
        self.optimizers = {
            key: optim.AdamW(1.0, [0.9, 0.95], weight_decay=self.decay(key), bias_correction=True)
            for key in self.weights
        }

    def decay(self, key: object) -> float:
        if isinstance(key, str):
            return 0.1 if self.weights[key].ndim > 1 else 0.0
        return 0.3

    def step(self, tokens: np.ndarray, paths: np.ndarray, rate: float) -> float:
        keys = list(self.weights)

        def loss(weights: list[mx.array]) -> mx.array:
            found = dict(zip(keys, weights, strict=True))
            self.model.update(tree_unflatten([(name, found[name]) for name in self.names]))
            levels = [mx.stack([found[n, int(c)] for c in paths[:, n - 1]]) for n in (1, 2)]
            batch = mx.array(tokens.astype(np.int32))
            with self.slot.using(join_blocks(levels, self.config)):
                inputs = batch[:, :-1]
                logits = self.model(inputs, mask=packed_mask(inputs, EOT))
                return masked_loss(logits, batch, EOT)

        value, gradients = mx.value_and_grad(loss)(list(self.weights.values()))
        gradients, _ = optim.clip_grad_norm(gradients, self.clip)
        chosen = {(n, int(c)) for n in (1, 2) for c in paths[:, n - 1]}
        for key, gradient in zip(keys, gradients, strict=True):
            of_anchor = isinstance(key, str)
            assert of_anchor or (key in chosen) == bool(mx.any(gradient != 0))
            if of_anchor or key in chosen:
                self.optimizers[key].learning_rate = rate * (self.scale if of_anchor else 1)
                self.weights |= self.optimizers[key].apply_gradients(
                    {key: gradient}, {key: self.weights[key]}
                )
        return value.item()

    def assert_close(self, state: dict[str, np.ndarray]) -> None:
        for key, weight in self.weights.items():
            found = (
                state[f"weights.{key}"]
                if isinstance(key, str)
                else (state[f"{key[0]}.weights"][key[1]])
            )
            np.testing.assert_allclose(found, np.array(weight), rtol=0, atol=1e-5, err_msg=str(key))
