"""Trains the blocks of a run's documents on the frozen anchor, until held-out loss stops falling.

Each cluster of level 1 with all below it is trained apart: its rows, their order and its learning
rates follow from its own windows and the seed alone. So a document can be taken out of one of them
later, and the other clusters' blocks are the same bits as if it had never been there.

The rate warms up and then stays: when to stop is not known beforehand. After each pass over a
cluster's rows the perplexity of its held-out sentences is taken, and the state is saved if it is
the best so far; ``PATIENCE`` passes without a better one end the training. A run that is stopped
goes on from the best state, which is what it would have kept anyhow. A cluster without held-out
sentences gets ``PASSES`` passes; with ``settings.passes`` all get so many, and the last state is
kept.
"""

import json
import shutil
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

from ..data.order import Stream
from ..data.sequences import pack_by_leaf
from ..loop.validation import Validation, choose
from ..recipe.recipe import TrainerConfig
from ..step.memories import MemoryTrainee
from ..store.blocks import BlockStore
from ..store.checkpoint import Progress
from .run import OwnText, Settings, whole_paths

PATIENCE = 2  # passes without a better held-out loss
BETTER = 1e-3  # how much smaller, relative, a perplexity must be to count
PASSES = 4  # where nothing is held out
MOST_PASSES = 40


@dataclass(frozen=True)
class Subtree:
    """A cluster of level 1 in training: its rows, their paths in the model, and what is held out
    of it with the paths of that."""

    number: int
    rows: np.ndarray
    paths: np.ndarray
    held_out: Any
    held_paths: np.ndarray


def subtree_folder(run: Path, number: int) -> Path:
    """Where the blocks of a cluster of level 1 are kept, by its number among the new ones."""
    return run / "subtrees" / str(number)


def subtrees_of(paths: np.ndarray) -> list[int]:
    """The clusters of level 1 that windows lie in."""
    return [int(n) for n in np.unique(paths[:, 0])]


class Trainer:
    """One anchor with its memory slot, for all subtrees in turn."""

    def __init__(self, anchor: nn.Module, settings: Settings):
        self.anchor, self.settings = anchor, settings
        self.training = TrainerConfig.from_dict(settings.training)
        self.trainee: MemoryTrainee | None = None

    def train(self, run: Path, text: OwnText, paths: np.ndarray) -> None:
        """Trains every subtree that is not finished; ``paths`` are those of :func:`leaves_of`."""
        numbers = subtrees_of(paths)
        with tqdm(numbers, desc="remembering", unit="cluster", delay=2) as bar:
            for number in bar:
                if not (subtree_folder(run, number) / "done.json").exists():
                    self._train_one(run, self._subtree(run, text, paths, number), bar)

    def _subtree(self, run: Path, text: OwnText, paths: np.ndarray, number: int) -> Subtree:
        folder, settings = subtree_folder(run, number), self.settings
        folder.mkdir(parents=True, exist_ok=True)
        own = np.flatnonzero(paths[:, 0] == number)
        whole = whole_paths(settings, paths)
        windows = choose(text.windows, own)
        file = folder / "tokens.npy"
        rows, row_paths = pack_by_leaf(windows, whole[own], settings.context, settings.seed, file)
        held = np.flatnonzero(np.isin(text.near, own))
        return Subtree(number, rows, row_paths, choose(text.held_out, held), whole[text.near[held]])

    def _trainee(self, subtree: Subtree, store: BlockStore) -> MemoryTrainee:
        """The one trainee, whose step is compiled once, on this subtree."""
        if self.trainee is None:
            self.trainee = MemoryTrainee(
                self.anchor, store, subtree.rows, subtree.paths, self.settings.begin[0],
                self.training,
            )  # fmt: skip
        self.trainee.turn_to(store, subtree.rows, subtree.paths)
        return self.trainee

    def _train_one(self, run: Path, subtree: Subtree, bar: Any) -> None:
        folder, settings = subtree_folder(run, subtree.number), self.settings
        config = settings.memory
        with BlockStore(folder / "store", config, settings.seed) as store:
            done = self._until_best(subtree, self._trainee(subtree, store), bar)
        with BlockStore(folder / "store", config, settings.seed, readonly=True) as store:
            blocks = {
                f"{level}-{c}": mx.array(store.block(level, c)) for level, c in store.touched()
            }
            save_safetensors(folder / "blocks.safetensors", blocks)
        write_atomic(folder / "done.json", json.dumps(sealed(done)) + "\n")
        shutil.rmtree(folder / "store")
        (folder / "tokens.npy").unlink()

    def _until_best(self, subtree: Subtree, trainee: MemoryTrainee, bar: Any) -> dict[str, Any]:
        """Steps until the held-out perplexity stops falling; the store's last commit is the best
        state. What is recorded of it comes back."""
        training, store, held_out = self.training, trainee.store, subtree.held_out
        paths = {"fetched": subtree.held_paths}
        validate = Validation(self.anchor, held_out, training.part, trainee, paths)
        stream = Stream(len(subtree.rows), self.settings.seed, subtree.number)
        size = training.batch_size
        if training.part == size:  # else its parts would not come out even
            size = min(size, len(subtree.rows))
        a_pass = -(-len(subtree.rows) // size)
        progress = store.progress() or Progress({"subtree": subtree.number})
        first: dict[str, Any] = validate() if len(held_out) else {}
        best: Any = first.get("fetched")
        misses, step = 0, progress.step
        fixed = self.settings.passes or (0 if first else PASSES)
        last = a_pass * (fixed or MOST_PASSES)
        while step < last and misses < PATIENCE:
            rows = stream.numbers(step * size, size)
            rate = training.learning_rate * min(1.0, (step + 1) / max(1, training.warmup_steps))
            trainee.step(rows, rate)
            step += 1
            if step % a_pass:
                continue
            found: Any = validate()["fetched"] if first else None
            shown = f"{first['none']:.2f} -> {found:.2f}" if first else "-"
            bar.set_postfix_str(f"held-out perplexity {shown}")
            misses = 0 if fixed or found < best * (1 - BETTER) else misses + 1
            if misses == 0:
                best = found
                store.commit(Progress(progress.identity, step))
        kept = store.progress()
        return {
            "steps": 0 if kept is None else kept.step,
            "rows": len(subtree.rows),
            "held_out_tokens": len(held_out.tokens),
            "perplexity_before": first.get("none"),
            "perplexity": best,
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
