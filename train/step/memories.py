"""Trains memory: the blocks of a bank, or the generic memory, on a frozen anchor or with it.

Every sequence brings its cluster path. A step gathers the *unique* blocks of the batch, so the
gradient of a block sums over the sequences that share it. The number of gathered blocks is padded
to the most that a batch can touch: a compiled step wants fixed shapes, and the padding gets no
gradient and is not put back. The blocks themselves lie in a :class:`train.store.blocks.BlockStore`.

Co-training (paper, section 5) trains the anchor in the same steps, and now and then the generic
memory stands in for the fetched one. It is kept as one more cluster of each level.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import join_blocks, whole_block

from ..ranks import ALONE, Ranks
from ..recipe.recipe import CotrainSection, TrainerConfig
from ..store.blocks import BlockStore
from ..store.checkpoint import LOWER, Progress, check_finite, check_identity
from .adamw import AnchorWeights, adamw, bias_corrections, rate_shares
from .candidates import Drawn
from .gradient import BatchGradient, Ragged, is_finite
from .trainee import Sequences


class MemoryTrainee:
    """The blocks of ``store``, trained on ``anchor``.

    Args:
        tokens: sequences, (n, context + 1).
        paths: their cluster paths, (n, levels).
        cotrain: how the anchor is trained along; None leaves it frozen.
        subtree: the cluster of level 1 that is trained alone, if one is.
        grouped: the sequences of a step are all of one cluster of level 1.
        ragged: where not all sequences are of one length, all of theirs. The sequences of a step
            must come the longest first.
    """

    def __init__(
        self,
        anchor: nn.Module,
        store: BlockStore,
        tokens: Sequences,
        paths: np.ndarray,
        eot: int,
        training: TrainerConfig,
        cotrain: CotrainSection | None = None,
        ranks: Ranks = ALONE,
        subtree: int | None = None,
        ragged: Ragged | None = None,
        grouped: bool = False,
    ):
        self.training, self.cotrain = training, cotrain
        self.ranks, self.subtree, self.grouped = ranks, subtree, grouped
        config = store.config
        if len(paths) and not ((paths >= 0) & (paths < np.array(config.num_clusters))).all():
            remedy = "restore the run's sequences, or make them anew in another --out"
            raise UserError("a sequence has a path beyond the tree", config.num_clusters, remedy)
        self.levels = [level for level in range(1, config.num_levels + 1) if config.r[level - 1]]
        self.turn_to(store, tokens, paths, ragged)
        self.anchor = None
        if cotrain is None:
            anchor.freeze()
        else:
            self.anchor = AnchorWeights(anchor, training, cotrain.weight_decay)
        self.slot = attach_memory(anchor, config)
        self.gradient = BatchGradient(anchor, self.slot, eot, training, self.ranks)
        self._betas = betas = (training.beta1, training.beta2)
        shares = [rate_shares(config, level, training.reading_rate) for level in self.levels]

        def update(states: Any, gradients: Any, corrections: Any, rate: mx.array) -> Any:
            levels = zip(states, gradients, shares, corrections, strict=True)
            decay = training.weight_decay
            return [adamw(s, g, rate * own, c, betas, decay) for s, g, own, c in levels]

        self._update = mx.compile(update)

    def turn_to(
        self, store: BlockStore, tokens: Sequences, paths: np.ndarray, ragged: Ragged | None = None
    ) -> None:
        """From now on trains another store of the same shape; what is compiled stays."""
        self.store, self.tokens, self.paths, self.ragged = store, tokens, paths, ragged
        self.number = 0  # of the step to come
        generic = 0 if self.cotrain is None else 1
        self._most = {n: self._most_together(n) + generic for n in self.levels}

    @property
    def identity(self) -> dict[str, Any]:
        return identity_of_memory(self.store.config, self.cotrain)

    def step(
        self,
        rows: np.ndarray,
        learning_rate: float,
        next_rows: np.ndarray | None = None,
        drawn: Drawn | None = None,
    ) -> tuple[float, float]:
        """``drawn``: tokens that stand for the whole vocabulary."""
        paths = self._paths(rows, self.number)
        self.store.load(self._keys(paths))
        unique, indices, states = [], [], []
        for level in self.levels:
            clusters, index = np.unique(paths[:, level - 1], return_inverse=True)
            unique.append(clusters)
            indices.append(index)
            most = min(len(rows), self._most[level])
            states.append(self.store.gather(level, clusters, most))
        self.number += 1
        if next_rows is not None:
            coming = self._keys(self._paths(next_rows, self.number))
            self.store.prefetch(coming, keep=self._keys(paths))
        weights = {
            "anchor": self.anchor.weights if self.anchor else {},
            "blocks": [state[0] for state in states],
        }
        counts = [len(clusters) for clusters in unique]
        ragged = self.ragged
        if ragged is not None:
            ragged = Ragged(ragged.given[rows], ragged.lengths[rows], ragged.at_once)
        given = (self.tokens[rows], indices, counts, ragged, drawn)
        loss, norm, gradients = self.gradient(weights, *given)
        del weights  # or the update could not write in place
        if not is_finite(loss, norm):
            if self.anchor is not None:
                self.anchor.restore()
            return loss, norm
        corrections = [bias_corrections(state[3], self._betas) for state in states]
        rate = mx.array(learning_rate)
        updated = self._update(states, gradients["blocks"], corrections, rate)
        if not mx.stack([mx.isfinite(a).all() for new in updated for a in new[:3]]).all().item():
            if self.anchor is not None:
                self.anchor.restore()
            return math.nan, norm
        for level, clusters, blocks in zip(self.levels, unique, updated, strict=True):
            self.store.scatter(level, clusters, blocks)
        if self.anchor is not None and self.cotrain is not None:
            scaled = self.cotrain.learning_rate_scale * learning_rate
            self.anchor.update(gradients["anchor"], scaled)
            mx.eval(self.anchor.arrays())
        return loss, norm

    def resume(self, folder: Path, identity: dict[str, Any]) -> Progress:
        self._settle()
        progress = self.store.progress() or Progress(identity)
        check_identity(progress.identity, identity, self.store.folder)
        self._check_disk()
        self.number = progress.step
        arrays = self.store.arrays()
        if progress.step and set(arrays) != set(self.anchor.arrays() if self.anchor else ()):
            # Before version 2 of the identity it did not say.
            what = f"{self.store.folder} was begun {'with' if arrays else 'without'} co-training"
            raise UserError(what, "memories.cotrain", "go on as before, or use another --out")
        if self.anchor is not None and progress.step:
            self.anchor.load({name: mx.array(array) for name, array in arrays.items()})
        return progress

    def save(self, folder: Path, progress: Progress) -> None:
        arrays = self.anchor.arrays() if self.anchor is not None else {}
        check_finite(arrays, f"the anchor at step {progress.step}", LOWER)
        numbers = {name: np.array(array, copy=False) for name, array in arrays.items()}
        self.store.commit(progress, numbers, self.ranks.wait if self.ranks.size > 1 else None)

    def _settle(self) -> None:
        """Ends a commit that was cut off, so that the stores of all ranks are at the same step: if
        one rank has made it live, all of them had it prepared."""
        live, prepared = self.store.steps()
        steps, ready = self.ranks.gather(live), self.ranks.gather(prepared)
        last = max(steps)
        if any(step < last != ahead for step, ahead in zip(steps, ready, strict=True)):
            raise UserError(
                "the ranks do not continue the same run",
                f"their steps are {steps}",
                "start with as many ranks as before, where they were, or use another --out",
            )
        if prepared:
            self.store.settle(live < last)

    def _paths(self, rows: np.ndarray, number: int) -> np.ndarray:
        """The paths of the sequences in step ``number``, some of them that of generic memory."""
        paths = self.paths[rows]
        if self.cotrain is None:
            return paths
        config = self.store.config
        probability = self.cotrain.generic_probability
        if probability is None:
            probability = 1 / (config.branching[0] + 1)
        random = np.random.default_rng([self.store.seed, 3, number])
        generic = random.random(len(rows)) < probability
        return np.where(generic[:, None], np.array(generic_path(config)), paths)

    def _most_together(self, level: int) -> int:
        """Blocks of a level that one batch can touch, if it is large enough."""
        pairs = np.unique(self.paths[:, [0, level - 1]], axis=0)
        counts = np.bincount(pairs[:, 0]) if self.grouped else [len(pairs)]
        return int(max(counts, default=0))

    def _keys(self, paths: np.ndarray) -> list[tuple[int, int]]:
        """The (level, cluster) of the blocks that the sequences need."""
        return [(level, int(c)) for level in self.levels for c in np.unique(paths[:, level - 1])]

    def _check_disk(self) -> None:
        paths = self.paths
        if self.subtree is not None:
            paths = paths[paths[:, 0] == self.subtree]
        most = self.training.num_steps(len(paths)) * self.training.batch_size
        a_commit = self.training.save_every * self.training.batch_size
        extra = 0 if self.cotrain is None else 1  # generic memory
        touched = {n: min(most, len(np.unique(paths[:, n - 1])) + extra) for n in self.levels}
        anchor = 0
        if self.anchor is not None:
            anchor = sum(array.nbytes for array in self.anchor.arrays().values())
        self.store.check_disk(touched, {n: min(a_commit, touched[n]) for n in self.levels}, anchor)


def identity_of_memory(config: MemoryConfig, cotrain: CotrainSection | None) -> dict[str, Any]:
    """That of a :class:`MemoryTrainee`."""
    return {"sizes": config.to_dict(), "cotrain": cotrain and cotrain.to_dict()}


def generic_config(config: MemoryConfig) -> MemoryConfig:
    """The generic memory as a bank of one level in which cluster 0 is always chosen."""
    return replace(config, r=(sum(config.r),), branching=(2,))


def generic_path(config: MemoryConfig) -> tuple[int, ...]:
    """Where co-training keeps the generic memory: beyond the clusters of each level."""
    return config.num_clusters


def generic_block(store: BlockStore) -> np.ndarray:
    """The generic memory of co-training as one block of sum(r) rows."""
    config = store.config
    blocks = [
        mx.array(store.block(level, cluster))
        for level, cluster in enumerate(generic_path(config), 1)
        if config.r[level - 1]
    ]
    return whole_block([np.array(group) for group in join_blocks(blocks, config)])
