"""Perplexity on held-out windows with what is being trained: with no, generic and fetched memory.

It only reads: the anchor as it is, and copies of the blocks that leave the store's cache alone. A
training goes on bit for bit as if it had not been asked. It counts as
:mod:`mlx_hmem.evaluate.perplexity` does: every token of a text, each window routed by its own text.
Trade-off: blocks that are not in the cache are read again each time, so a few windows must do.
"""

import hashlib
import heapq
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.architectures import head_of
from mlx_hmem.anchors.load import num_embedded
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.texts import records
from mlx_hmem.memory import Rows, join_blocks
from mlx_hmem.retriever import ClusterTree, load_encoder

from ..data.tokenizer import begin_of, load_tokenizer
from ..data.windows import Windows, choose, cut_windows
from ..recipe.recipe import Recipe, TrainerConfig
from ..step.gradient import check_tokens
from ..step.loss import chunk_size, token_losses
from ..step.memories import MemoryTrainee, generic_path


class Validation:
    """Called, it gives the perplexity per token on ``windows`` by the name of the memory; "none"
    is the anchor alone. Of a frozen anchor that is worked out once.

    Args:
        rows: windows at a time.
        trainee: trains the memory; None if there is only the anchor.
        paths: those of the windows, (n, levels), by the name of the memory that they lead to in the
            trainee's store.
    """

    def __init__(
        self,
        anchor: nn.Module,
        windows: Windows,
        rows: int,
        trainee: MemoryTrainee | None = None,
        paths: dict[str, np.ndarray] | None = None,
    ):
        self.anchor, self.windows, self.trainee, self.paths = anchor, windows, trainee, paths or {}
        self.num_embedded = num_embedded(anchor)
        self.chunk = chunk_size(self.num_embedded)
        # Windows of about one length share a batch.
        order = np.argsort(-np.diff(windows.offsets), kind="stable")
        self.known: dict[str, float] = {}
        self.batches = [order[i : i + rows] for i in range(0, len(order), rows)]

    def __call__(self) -> dict[str, float]:
        modes = ["none", *self.paths]
        asked = [mode for mode in modes if mode not in self.known]
        total = len(asked) * len(self.batches)
        with tqdm(total=total, desc="validation", leave=False, delay=2) as bar:
            found = self.known | {mode: self._perplexity(mode, bar) for mode in asked}
        if self.trainee is not None and self.trainee.cotrain is None:
            self.known = {"none": found["none"]}
        return {mode: found[mode] for mode in modes}

    def _perplexity(self, mode: str, bar: "tqdm[Any]") -> float:
        total, count, front = 0.0, 0, len(self.windows.begin)
        for numbers in self.batches:
            rows = [self.windows[i] for i in numbers]
            lengths = np.array([len(row) for row in rows])
            tokens = np.zeros((len(rows), lengths.max()), np.int32)
            for row, target in zip(rows, tokens, strict=True):
                target[: len(row)] = row  # padded on the right, which a causal model cannot see
            places = np.arange(1, lengths.max())
            counted = (places >= front) & (places < lengths[:, None])
            check_tokens(tokens, self.num_embedded)
            losses = self._losses(mx.array(tokens), mode, numbers)
            total += float(np.array(losses)[counted].sum(dtype=np.float64))
            count += int(counted.sum())
            bar.update()
        try:
            return math.exp(total / count)
        except OverflowError:  # of an anchor that has gone astray
            return math.inf

    def _losses(self, tokens: mx.array, mode: str, numbers: np.ndarray) -> mx.array:
        rows = self._rows(mode, numbers)
        with self.trainee.slot.using(rows) if self.trainee else nullcontext():
            hidden = self.anchor.model(tokens[:, :-1])
            return token_losses(hidden, tokens[:, 1:], head_of(self.anchor), self.chunk)

    def _rows(self, mode: str, numbers: np.ndarray) -> Rows | None:
        """The memory of each window, as the store holds it now."""
        if self.trainee is None or mode == "none":
            return None
        store, paths, blocks = self.trainee.store, self.paths[mode][numbers], []
        for level, r in enumerate(store.config.r, 1):
            if r:
                clusters, index = np.unique(paths[:, level - 1], return_inverse=True)
                own = mx.array(np.stack([store.current(level, int(c)) for c in clusters]))
                blocks.append(own[mx.array(index.astype(np.int32))])
        return join_blocks(blocks, store.config)


def held_out_windows(run: Path, training: TrainerConfig, context: int) -> Windows | None:
    """The held-out windows that ``training`` is validated on; None if it is not.

    At most ``validation_sequences`` of them, of the documents whose text has the smallest md5.
    """
    if not training.validate_every:
        return None
    most = training.validation_sequences
    texts = heapq.nsmallest(most, records(run / "corpus" / "held_out.jsonl"), key=_md5)
    windows = cut_windows(texts, load_tokenizer(run), context, begin_of(run), 1 << 32)
    if not len(windows):
        remedy = "raise corpus.held_out, or set training.validate_every to 0"
        raise UserError("there is nothing to validate on", "no document is held out", remedy)
    return choose(windows, np.arange(min(most, len(windows))))


def _md5(text: str) -> bytes:
    return hashlib.md5(text.encode()).digest()


def validation_of_anchor(
    run: Path, training: TrainerConfig, context: int, anchor: nn.Module
) -> Validation | None:
    """That of a training of the anchor's own weights; None if ``training`` asks for none."""
    windows = held_out_windows(run, training, context)
    return None if windows is None else Validation(anchor, windows, training.part)


def validation_of_memory(
    run: Path, recipe: Recipe, name: str, anchor: nn.Module, trainee: MemoryTrainee
) -> Validation | None:
    """That of the arm ``name``: with the memory that it trains, and with none."""
    training = recipe.memories.training
    windows = held_out_windows(run, training, recipe.windows.context)
    if windows is None:
        return None
    if name == "generic":  # a bank of its own with one block in use
        paths = {"generic": np.zeros((len(windows), 1), np.int32)}
    else:
        texts = list(windows.texts(load_tokenizer(run)))
        tree = ClusterTree.load(run / "tree" / "tree.safetensors")
        own = tree.route_batch(load_encoder(recipe.tree.encoder).encode(texts))
        if trainee.subtree is not None:
            numbers = np.flatnonzero(own[:, 0] == trainee.subtree)
            if not len(numbers):
                return None  # no held-out window is of this subtree
            windows, own = choose(windows, numbers), own[numbers]
        generic = np.tile(generic_path(recipe.memory_config), (len(windows), 1))
        paths = (
            {"fetched": own} if trainee.cotrain is None else {"generic": generic, "fetched": own}
        )
    return Validation(anchor, windows, training.part, trainee, paths)
