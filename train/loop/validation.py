"""Perplexity on held-out windows with what is being trained: with no, generic and fetched memory.

It only reads: the anchor as it is, and copies of the blocks that leave the store's cache alone. A
training goes on bit for bit as if it had not been asked. It counts as
:mod:`mlx_hmem.evaluate.perplexity` does: every token of a text, each window routed by its own text.
Trade-off: blocks that are not in the cache are read again each time, so a few windows must do.
"""

import hashlib
import heapq
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.attach import MemorySlot
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.texts import records
from mlx_hmem.memory import Rows, join_blocks
from mlx_hmem.retriever import ClusterTree, load_encoder

from ..data.tokenizer import begin_of, load_tokenizer
from ..data.windows import Windows, cut_windows
from ..recipe.recipe import Recipe, TrainerConfig
from ..step.memories import MemoryTrainee, generic_path
from ..store.blocks import BlockStore


@dataclass(frozen=True)
class TrainedMemory:
    """The memory in training: ``paths`` are the cluster paths of the windows, (n, levels), by the
    name of the memory that they lead to in ``store``. On a ``frozen`` anchor that without memory
    is worked out once."""

    slot: MemorySlot
    store: BlockStore
    paths: dict[str, np.ndarray]
    frozen: bool


class Validation:
    """Called, it gives the perplexity per token on ``windows`` by the name of the memory; "none"
    is the anchor alone.

    Args:
        rows: windows at a time.
        memory: None if there is only the anchor.
    """

    def __init__(
        self, anchor: nn.Module, windows: Windows, rows: int, memory: TrainedMemory | None = None
    ):
        self.anchor, self.windows, self.memory = anchor, windows, memory
        # Windows of about one length share a batch.
        order = np.argsort(-np.diff(windows.offsets), kind="stable")
        self.known: dict[str, float] = {}
        self.batches = [order[i : i + rows] for i in range(0, len(order), rows)]

    def __call__(self) -> dict[str, float]:
        modes = ["none", *(self.memory.paths if self.memory else ())]
        asked = [mode for mode in modes if mode not in self.known]
        total = len(asked) * len(self.batches)
        with tqdm(total=total, desc="validation", leave=False, delay=2) as bar:
            found = self.known | {mode: self._perplexity(mode, bar) for mode in asked}
        if self.memory is not None and self.memory.frozen:
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
            losses = self._losses(mx.array(tokens), mode, numbers)
            total += float(np.array(losses)[counted].sum(dtype=np.float64))
            count += int(counted.sum())
            bar.update()
        try:
            return math.exp(total / count)
        except OverflowError:  # of an anchor that has gone astray
            return math.inf

    def _losses(self, tokens: mx.array, mode: str, numbers: np.ndarray) -> mx.array:
        if self.memory is None:
            logits = self.anchor(tokens[:, :-1])
        else:
            with self.memory.slot.using(self._rows(mode, numbers)):
                logits = self.anchor(tokens[:, :-1])
        logits = logits.astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="none")

    def _rows(self, mode: str, numbers: np.ndarray) -> Rows | None:
        """The memory of each window, as the store holds it now."""
        if mode == "none":
            return None
        assert self.memory is not None
        store, paths, blocks = self.memory.store, self.memory.paths[mode][numbers], []
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
        raise UserError(
            "there is nothing to validate on",
            "no document is held out",
            "raise corpus.held_out, or set training.validate_every to 0",
        )
    return choose(windows, np.arange(min(most, len(windows))))


def _md5(text: str) -> bytes:
    return hashlib.md5(text.encode()).digest()


def choose(windows: Windows, numbers: np.ndarray) -> Windows:
    """The windows of these numbers, which may be none."""
    chosen = [windows[i] for i in numbers]
    offsets = np.cumsum([0, *(len(window) for window in chosen)])
    return Windows(np.concatenate([windows.tokens[:0], *chosen]), offsets, windows.begin)


def route_windows(run: Path, recipe: Recipe, windows: Windows) -> np.ndarray:
    """The cluster path of each window by its text, (n, levels)."""
    encoder = load_encoder(recipe.tree.encoder)
    tree = ClusterTree.load(run / "tree" / "tree.safetensors")
    return tree.route_batch(encoder.encode(list(windows.texts(load_tokenizer(run)))))


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
        own = route_windows(run, recipe, windows)
        if trainee.subtree is not None:
            numbers = np.flatnonzero(own[:, 0] == trainee.subtree)
            if not len(numbers):
                return None  # no held-out window is of this subtree
            windows, own = choose(windows, numbers), own[numbers]
        paths = {"fetched": own}
        if recipe.memories.cotrain is not None:
            paths = {
                "generic": np.tile(generic_path(recipe.memory_config), (len(windows), 1)),
                **paths,
            }
    memory = TrainedMemory(
        trainee.slot, trainee.store, paths, frozen=recipe.memories.cotrain is None
    )
    return Validation(anchor, windows, training.part, memory)
