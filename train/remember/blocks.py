"""Trains the blocks of a run's documents on the frozen anchor, until they are known by heart.

Each cluster of level 1 with all below it is trained apart: its rows, their order and its learning
rates follow from its own windows and the seed alone. So a document can be taken out of one of them
later, and the other clusters' blocks are the same bits as if it had never been there.

A cluster gets its passes over its rows (:func:`.rows.num_passes`); its learning rate warms up and
falls along a cosine. The state is saved after each pass, from where a run that was stopped goes on.
What is known is counted on the way: a step's loss says of each token whether it was the likeliest.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_hmem.bank.format import Key
from mlx_hmem.files import load_safetensors, save_safetensors, write_atomic
from mlx_hmem.reading import read_sealed, sealed

from ..data.taken_tokenizer import TakenTokenizer
from ..loop.loop import learning_rate_at
from ..recipe.recipe import TrainerConfig
from ..step.candidates import Drawn, candidates_for
from ..step.memories import MemoryTrainee
from ..store.blocks import BlockStore
from ..store.checkpoint import Progress
from .rows import Passes, Rows, Sentences, num_passes
from .run import OwnText, Settings

MEASURED = 64  # windows that the time is taken with


@dataclass(frozen=True)
class Subtree:
    """A cluster of level 1 in training, by its number among the new ones."""

    number: int
    rows: Rows
    passes: Passes


def subtree_folder(run: Path, number: int) -> Path:
    """Where the blocks of a cluster of level 1 are kept, by its number among the new ones."""
    return run / "subtrees" / str(number)


def subtrees_of(paths: np.ndarray) -> list[int]:
    """The clusters of level 1 that windows lie in."""
    return [int(n) for n in np.unique(paths[:, 0])]


def subtree_of(
    text: OwnText, paths: np.ndarray, settings: Settings, tokenizer: TakenTokenizer, number: int
) -> Subtree:
    """``paths``: those of :func:`.run.leaves_of`."""
    own = np.flatnonzero(paths[:, 0] == number)
    rows = Rows.of(text, own, paths, settings, tokenizer, number)
    return Subtree(number, rows, Passes(rows, settings, number))


class Trainer:
    """One anchor with its memory slot, for all subtrees in turn."""

    def __init__(self, anchor: nn.Module, settings: Settings, tokenizer: TakenTokenizer):
        self.anchor, self.settings, self.tokenizer = anchor, settings, tokenizer
        self.training = TrainerConfig.from_dict(settings.training)
        self.trainee: MemoryTrainee | None = None

    def train(self, run: Path, text: OwnText, paths: np.ndarray) -> None:
        """Trains every subtree that is not finished; ``paths`` are those of :func:`leaves_of`."""
        sizes, numbers = np.diff(text.windows.offsets), subtrees_of(paths)
        tokens = [int(sizes[paths[:, 0] == number].sum()) for number in numbers]
        totals = [num_passes(n, self.settings) * n for n in tokens]
        with tqdm(total=sum(totals), desc="remembering", unit=" tokens", unit_scale=True) as bar:
            for number, total in zip(numbers, totals, strict=True):
                if (subtree_folder(run, number) / "done.json").exists():
                    bar.update(total)
                else:  # the rows of one at a time: they are many times as large as the text
                    subtree = subtree_of(text, paths, self.settings, self.tokenizer, number)
                    self._train_one(run, subtree, bar)

    def seconds(self, text: OwnText, folder: Path) -> float:
        """About how long all passes take, from a step on some windows as if they were one cluster,
        its blocks in ``folder``, after one that compiles; and what each cluster begins with."""
        anywhere = np.ones((len(text.windows), self.settings.memory.num_levels), np.int32)
        anywhere[:MEASURED] = 0
        share = text.windows.offsets[min(MEASURED, len(text.windows))] / len(text.windows.tokens)
        subtree = subtree_of(text, anywhere, self.settings, self.tokenizer, 0)
        rows = subtree.passes.rows(0)
        with BlockStore(folder, self.settings.memory, self.settings.seed) as store:
            began = time.perf_counter()
            drawn = self._draws(subtree)
            to_begin = time.perf_counter() - began
            trainee = self._trainee(subtree, store)
            took = 0.0
            for number in tqdm(range(2), desc="timing", unit=" steps", delay=2, leave=False):
                began = time.perf_counter()
                trainee.step(rows, 0.0, drawn=drawn(number))
                took = time.perf_counter() - began
        a_token = took / int(subtree.rows.lengths[rows].sum())
        a_pass = subtree.passes.total / len(subtree.rows.apart) / share
        clusters = self.settings.branching[0]
        passes = num_passes(len(text.windows.tokens) // clusters, self.settings)
        return float(a_token * a_pass * passes + clusters * to_begin)

    def _trainee(self, subtree: Subtree, store: BlockStore) -> MemoryTrainee:
        """The one trainee, whose step is compiled once, on this subtree."""
        tokens, paths = subtree.rows.tokens, subtree.rows.paths
        ragged = subtree.rows.ragged(self.settings.part_tokens)
        if self.trainee is None:
            begin, training = self.settings.begin[0], self.training
            self.trainee = MemoryTrainee(
                self.anchor, store, tokens, paths, begin, training, ragged=ragged
            )
        else:
            self.trainee.turn_to(store, tokens, paths, ragged)
        return self.trainee

    def _draws(self, subtree: Subtree) -> Callable[[int], Drawn | None]:
        """The tokens that a step looks at, by its number."""
        own, key = subtree.rows.tokens.windows, [self.settings.seed, subtree.number]
        text = [own[number] for number in range(subtree.rows.windows)]
        candidates = candidates_for(self.anchor, text, own.tokens)
        if candidates is None:
            return lambda step: None
        return lambda step: candidates.draw(np.random.default_rng([*key, step, 2]))

    def _train_one(self, run: Path, subtree: Subtree, bar: Any) -> None:
        folder, settings = subtree_folder(run, subtree.number), self.settings
        folder.mkdir(parents=True, exist_ok=True)
        config = settings.memory
        with BlockStore(folder / "store", config, settings.seed) as store:
            done = self._passes(subtree, self._trainee(subtree, store), bar)
        with BlockStore(folder / "store", config, settings.seed, readonly=True) as store:
            blocks = {
                f"{level}-{c}": mx.array(store.block(level, c)) for level, c in store.touched()
            }
            save_safetensors(folder / "blocks.safetensors", blocks)
        write_atomic(folder / "done.json", json.dumps(sealed(done)) + "\n")
        shutil.rmtree(folder / "store")

    def _passes(self, subtree: Subtree, trainee: MemoryTrainee, bar: Any) -> dict[str, Any]:
        """All passes that are left; what is recorded of them comes back."""
        store, rows, passes = trainee.store, subtree.rows, subtree.passes
        sentences, drawn = Sentences(rows, self.tokenizer), self._draws(subtree)
        progress = store.progress() or Progress({"subtree": subtree.number, "known": 0})
        known, loss = progress.identity["known"], float("nan")
        likeliest = np.zeros((rows.windows, rows.tokens.shape[1]), bool)
        # The bar counts the text alone, whose length is known before any rows are made.
        texts = np.where(np.arange(len(rows.lengths)) < rows.windows, rows.lengths, 0)
        bar.update(progress.step // passes.a_pass * int(texts.sum()))
        for step in range(progress.step, passes.num_steps):
            chosen = passes.rows(step)
            rate = learning_rate_at(step, passes.num_steps, self.training)
            loss, _ = trainee.step(chosen, rate, drawn=drawn(step))
            whole = chosen < rows.windows
            found = trainee.gradient.likeliest[whole]
            likeliest[chosen[whole], : found.shape[1]] = found
            if (step + 1) % passes.a_pass == 0:
                known = sentences.known(likeliest)
                store.commit(Progress({"subtree": subtree.number, "known": known}, step + 1))
            shown = f", ends {known} of {len(sentences.halves)} sentences" if known else ""
            bar.set_postfix_str(f"loss {loss:.2f}{shown}", refresh=False)
            bar.update(int(texts[chosen].sum()))
        return {
            "steps": passes.num_steps,
            "windows": rows.windows,
            "sentences": len(sentences.halves),
            "known": known,
        }


def trained_blocks(run: Path, numbers: list[int]) -> dict[Key, mx.array]:
    """The blocks of these subtrees by level and cluster of the model, lazily; what no text has
    touched is not there."""
    found: dict[Key, mx.array] = {}
    for number in numbers:
        blocks = load_safetensors(subtree_folder(run, number) / "blocks.safetensors")
        for name, block in blocks.items():
            level, cluster = name.split("-")
            found[int(level), int(cluster)] = block
    return found


def results_of(run: Path, numbers: list[int]) -> list[dict[str, Any]]:
    """What was recorded of the training of these subtrees."""
    remedy = "restore the folder as the remembering left it"
    return [read_sealed(subtree_folder(run, n) / "done.json", remedy) for n in numbers]
