"""Tiny training runs, how they are ended, and what they leave: for the tests of the loop."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.files import load_safetensors, read_safetensors_header
from tests.helpers.stores import assert_same, store_state
from train.data.order import ShuffledOrder
from train.loop.loop import train
from train.recipe.recipe import CotrainSection, TrainerConfig
from train.step.anchor import AnchorTrainee, initialise
from train.step.memories import MemoryTrainee
from train.step.trainee import Trainee
from train.store.blocks import BlockStore
from train.store.checkpoint import CHECKPOINT, Progress
from train.store.records import RecordStore

EOT, VOCABULARY, CONTEXT, ROWS, SEED = 0, 48, 12, 10, 5
ARGS = ModelArgs("openlm", 16, 2, 24, 2, 8, VOCABULARY, tie_word_embeddings=True)
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(3, 2), branching=(2, 3))
CONFIG = TrainerConfig(epochs=4, batch_size=3, learning_rate=1e-2, warmup_steps=2, save_every=4)
COTRAIN = CotrainSection(learning_rate_scale=0.5, generic_probability=0.4)
KINDS = ["anchor", "memory", "cotrain"]


def sequences() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (ROWS, CONTEXT + 1)).astype(np.uint16)
    tokens[rng.random(tokens.shape) < 0.15] = EOT
    leaves = rng.integers(0, 6, ROWS)
    return tokens, np.stack([leaves // 3, leaves], axis=1)


def order() -> ShuffledOrder:
    return ShuffledOrder(ROWS, CONFIG, SEED)


def make_model() -> Model:
    model = Model(ARGS)
    initialise(model, SEED)
    return model


@contextlib.contextmanager
def trainee_of(kind: str, folder: Path, config: TrainerConfig = CONFIG) -> Iterator[Trainee]:
    tokens, paths = sequences()
    if kind == "anchor":
        yield AnchorTrainee(make_model(), tokens, EOT, config)
        return
    with BlockStore(folder / "store", MEMORY, SEED) as store:
        cotrain = COTRAIN if kind == "cotrain" else None
        yield MemoryTrainee(make_model(), store, tokens, paths, EOT, config, cotrain)


def run(kind: str, folder: Path, config: TrainerConfig = CONFIG, seed: int = SEED) -> Progress:
    with trainee_of(kind, folder, config) as trainee:
        return train(trainee, ShuffledOrder(ROWS, config, seed), config, folder, kind)


class Ended:
    """A trainee that calls ``end`` in place of its step number ``steps``."""

    def __init__(self, trainee: Trainee, steps: int, end: Callable[[], None]):
        self.trainee, self.left, self.end = trainee, steps, end
        self.resume, self.save = trainee.resume, trainee.save
        self.tokens, self.identity = trainee.tokens, trainee.identity
        self.ranks = trainee.ranks

    def step(self, rows: np.ndarray, rate: float, next_rows: np.ndarray) -> tuple[float, float]:
        if self.left == 0:
            self.end()
        self.left -= 1
        return self.trainee.step(rows, rate, next_rows)


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(kind: str, folder: Path, moment: str) -> None:
    """A run that SIGKILL ends in step 6, or when its second checkpoint is to replace the first:
    in the store, when the blocks are written and not yet live."""
    own_replace, replaced = os.replace, []
    own_commit, commits = RecordStore.commit, []

    def commit_or_die(self: RecordStore, values: dict[bytes, bytes]) -> None:
        commits.append(values)
        if moment == "save" and len(commits) == 2:
            kill()
        own_commit(self, values)

    def replace_or_die(source: Path, target: Path) -> None:
        replaced.append(Path(target).name)
        if moment == "save" and replaced.count("checkpoint.safetensors") == 2:
            kill()
        own_replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    RecordStore.commit = commit_or_die  # type: ignore[method-assign]
    with trainee_of(kind, folder) as trainee:
        steps = 6 if moment == "step" else 1000
        train(Ended(trainee, steps, kill), order(), CONFIG, folder, kind)


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    """All that was saved."""
    if (folder / CHECKPOINT).exists():
        arrays = load_safetensors(folder / CHECKPOINT)
        return {name: np.array(array) for name, array in arrays.items()}
    with BlockStore(folder / "store", MEMORY, SEED, readonly=True) as store:
        return store_state(store) | {"curve": store.progress().curve_array()}


def saved(folder: Path, kind: str) -> Progress:
    if kind == "anchor":
        with trainee_of(kind, folder) as trainee:
            found = json.loads(read_safetensors_header(folder / CHECKPOINT)[1]["identity"])
            return trainee.resume(folder, found)
    with BlockStore(folder / "store", MEMORY, SEED, readonly=True) as store:
        return store.progress()


TIMES = {"tokens_per_s", "seconds", "peak_memory_bytes", "peak_resident_bytes"}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The log, without what differs from run to run."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, moments, steps, loss curve and log, bit for bit."""
    assert_same(checkpoint(a), checkpoint(b))
    assert (a / "loss.jsonl").read_bytes() == (b / "loss.jsonl").read_bytes()
    assert logged(a) == logged(b)
