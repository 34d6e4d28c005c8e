"""What tests of the training store share: a small run, and programs in processes of their own.

``python -m tests.helpers.store_worker WHAT FOLDER``, started by `start`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.openlm import Model
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import run_program
from tests.helpers.loop_runs import ARGS, CONTEXT, EOT, SEED, VOCABULARY, make_model
from tests.helpers.places import ROOT
from train.data.order import ShuffledOrder
from train.loop.loop import train
from train.recipe.recipe import TrainerConfig
from train.step.anchor import initialise
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress
from train.store.records import RecordStore

MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(3, 2), branching=(4, 8))
RUN = TrainerConfig(epochs=20, batch_size=4, learning_rate=1e-2, warmup_steps=2, save_every=7)
TO_THE_END = replace(RUN, save_every=10_000)
PROGRESS = Progress({"a": 1}, 2, [(0, 1.5, 0.25), (1, 1.25, 0.5)])


def sequences(rows: int, config: MemoryConfig = MEMORY) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (rows, CONTEXT + 1)).astype(np.uint16)
    leaves = rng.integers(0, config.num_clusters[-1], rows)
    return tokens, np.stack([leaves // config.branching[-1], leaves], axis=1)


def small_store(folder: Path, **options: int) -> BlockStore:
    """A store whose cache holds six blocks of level 2."""
    cache = 6 * (12 * 2 * 3 * 2 * 16 + 4)
    return BlockStore(folder, MEMORY, SEED, **{"cache_bytes": cache} | options)


def training_run(folder: Path, training: TrainerConfig = RUN) -> None:
    tokens, paths = sequences(60)
    with small_store(folder / "store") as store:
        trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, training)
        train(trainee, ShuffledOrder(len(tokens), training, SEED), training, folder, "memory")


def fill(store: BlockStore, level: int, clusters: list[int], value: float) -> None:
    parts = [mx.full(a.shape, value, a.dtype) for a in store.gather(level, np.array(clusters), 3)]
    store.scatter(level, np.array(clusters), parts)


def start(what: str, folder: Path, **options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.helpers.store_worker", what, str(folder)]
    root = str(ROOT)
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root} | options,
    )  # fmt: skip


# What the processes do.


def run_slowly(folder: Path) -> None:
    """A training run that says when it begins and can be hit between any two records."""
    own = RecordStore._write

    def slowly(self: RecordStore, group: list[tuple[bytes, np.ndarray]]) -> None:
        for record in group:
            own(self, [record])

    RecordStore._write = slowly  # type: ignore[method-assign]
    print("begun", flush=True)
    training_run(folder)


def run_until_signalled(folder: Path) -> None:
    """A training run that saves at its end only, with time for a signal in each step."""
    own = MemoryTrainee.step

    def slowly(self: MemoryTrainee, *arguments: Any) -> tuple[float, float]:
        time.sleep(0.02)
        return own(self, *arguments)

    MemoryTrainee.step = slowly  # type: ignore[method-assign]
    # Tests that run in the background are started with Ctrl-C ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    training_run(folder, TO_THE_END)


def measure_resident(folder: Path) -> None:
    """Trains on a bank that does not fit the cache; prints peak memory and step time."""
    model = Model(replace(ARGS, hidden_size=128))
    initialise(model, SEED)
    config = MemoryConfig(128, 2, (64, 64), (4, int(os.environ["BRANCHING"])))
    tokens, paths = sequences(960, config)
    training = TrainerConfig(epochs=1, batch_size=8, save_every=5)
    with BlockStore(folder, config, SEED, cache_bytes=32 << 20) as store:
        trainee = MemoryTrainee(model, store, tokens, paths, EOT, training)
        begin = time.perf_counter()
        train(trainee, ShuffledOrder(len(tokens), training, SEED), training, folder, "memory")
        seconds = (time.perf_counter() - begin) / 120
        touched = len(store.touched())
    result = {
        "bank_mb": 12 * config.bank_parameters / 1e6,
        "touched_mb": touched * store.record_bytes(2) / 1e6,
        "cache_mb": store.cache_bytes / 1e6,
        "peak_mb": peak_resident_bytes() / 1e6,
        "file_mb": (folder / "data.mdb").stat().st_size / 1e6,
        "ms_a_step": seconds * 1e3,
    }
    print(json.dumps(result))


def write_limited(folder: Path) -> None:
    import resource

    size = (folder / "store" / "data.mdb").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 4096, size + 4096))
    with small_store(folder / "store") as store:
        for first in range(0, 30, 3):
            fill(store, 2, [first, first + 1, first + 2], 2.0)
        store.commit(PROGRESS)


def map_limited(folder: Path, more: int) -> None:
    """Writes with room for ``more`` bytes of address space beside what there is."""
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more,) * 2)
    with small_store(folder / "store") as store:
        fill(store, 2, [0, 1, 2], 2.0)
        store.commit(PROGRESS)


def read(folder: Path) -> None:
    with small_store(folder / "store", readonly=True) as store:
        progress = store.progress()
        print(progress.step if progress else None)


if __name__ == "__main__":
    what, where = sys.argv[1], Path(sys.argv[2])
    programs = {
        "slow": run_slowly,
        "signalled": run_until_signalled,
        "resident": measure_resident,
        "limited": write_limited,
        "read": read,
        "mapped": lambda folder: map_limited(folder, 600 << 20),
        "not mapped": lambda folder: map_limited(folder, 100 << 20),
        "open": lambda folder: small_store(folder / "store").__exit__(),
    }
    run_program(lambda: programs[what](where))
