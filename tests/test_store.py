"""The store of the blocks under training: faults, bounds, and the same numbers as without it.

Run as a program it is a training run in a process of its own: ``test_store.py WHAT FOLDER``.
"""

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx_hmem  # isort: skip  # noqa: F401  OpenBLAS goes in front before MLX is loaded
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import initial_block, join_blocks
from train.anchor import initialise
from train.checkpoint import Progress
from train.gradient import masked_loss, packed_mask
from train.loop import train
from train.memories import MemoryTrainee
from train.order import ShuffledOrder
from train.recipe import TrainerConfig
from train.records import RecordStore, check_free_space
from train.store import BlockStore

EOT, VOCABULARY, CONTEXT, SEED = 0, 48, 12, 5
ARGS = ModelArgs("openlm", 16, 2, 24, 2, 8, VOCABULARY, tie_word_embeddings=True)
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(3, 2), branching=(4, 8))
RUN = TrainerConfig(epochs=20, batch_size=4, learning_rate=1e-2, warmup_steps=2, save_every=7)
KILL_SECONDS = 15  # python -m benchmarks.kills has fifty of them
PROGRESS = Progress({"a": 1}, 2, [(0, 1.5, 0.25), (1, 1.25, 0.5)])


def sequences(rows: int, config: MemoryConfig = MEMORY) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (rows, CONTEXT + 1)).astype(np.uint16)
    leaves = rng.integers(0, config.num_clusters[-1], rows)
    return tokens, np.stack([leaves // config.branching[-1], leaves], axis=1)


def make_model(args: ModelArgs = ARGS) -> Model:
    model = Model(args)
    initialise(model, SEED)
    return model


def small_store(folder: Path, **options: int) -> BlockStore:
    """A store whose cache holds six blocks of level 2."""
    cache = 6 * (12 * 2 * 3 * 2 * 16 + 4)
    return BlockStore(folder, MEMORY, SEED, **{"cache_bytes": cache} | options)


def training_run(folder: Path) -> None:
    tokens, paths = sequences(60)
    with small_store(folder / "store") as store:
        trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, RUN)
        train(trainee, ShuffledOrder(len(tokens), RUN, SEED), RUN, folder, "memory")


def blocks_of(store: BlockStore) -> dict[int, list[np.ndarray]]:
    """Weights, moments and steps of all blocks, by level."""
    counts = enumerate(MEMORY.num_clusters, 1)
    return {n: [np.array(a) for a in store.gather(n, np.arange(c), c)] for n, c in counts}


def fill(store: BlockStore, level: int, clusters: list[int], value: float) -> None:
    parts = [mx.full(a.shape, value, a.dtype) for a in store.gather(level, np.array(clusters), 3)]
    store.scatter(level, np.array(clusters), parts)


def test_a_sparse_step_equals_a_dense_one_in_which_every_block_is_a_parameter(tmp_path):
    """The reference holds all blocks as one array and takes only the rows of touched blocks from
    MLX's AdamW, each block counting its own steps."""
    tokens, paths = sequences(30)
    config = TrainerConfig(weight_decay=0.3, grad_clip=1e9, batch_size=4)
    model = make_model()
    slot = attach_memory(model, MEMORY)
    bank = {
        (level, cluster): mx.array(
            initial_block(
                MEMORY, MEMORY.r[level - 1], np.random.default_rng([SEED, level, cluster])
            )
        )
        for level, count in enumerate(MEMORY.num_clusters, 1)
        for cluster in range(count)
    }
    optimizers = {
        key: optim.AdamW(1.0, [0.9, 0.95], weight_decay=0.3, bias_correction=True) for key in bank
    }

    def loss(weights: list[mx.array], keys: list[tuple[int, int]], rows: np.ndarray) -> mx.array:
        by_key = dict(zip(keys, weights, strict=True))
        batch = mx.array(tokens[rows].astype(np.int32))
        levels = [mx.stack([by_key[n, int(c)] for c in paths[rows, n - 1]]) for n in (1, 2)]
        with slot.using(join_blocks(levels, MEMORY)):
            inputs = batch[:, :-1]
            return masked_loss(model(inputs, mask=packed_mask(inputs, EOT)), batch, EOT)

    rng, touched = np.random.default_rng(1), set()
    with small_store(tmp_path) as store:
        trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, config)
        batches = [rng.choice(30, 4, replace=False) for _ in range(21)]
        for step, (rows, next_rows) in enumerate(itertools.pairwise(batches)):
            rate = 0.02 / (1 + step)
            keys = list(bank)
            value, gradients = mx.value_and_grad(loss)(list(bank.values()), keys, rows)
            found, _ = trainee.step(rows, rate, next_rows)
            assert found == pytest.approx(value.item(), rel=1e-5)
            chosen = {(n, int(c)) for n in (1, 2) for c in paths[rows, n - 1]}
            touched |= chosen
            for key, gradient in zip(keys, gradients, strict=True):
                assert (key in chosen) == bool(mx.any(gradient != 0))
                if key in chosen:
                    optimizers[key].learning_rate = rate
                    bank |= optimizers[key].apply_gradients({key: gradient}, {key: bank[key]})
        found = blocks_of(store)
        assert 6 < len(touched) < len(bank)  # more than the cache holds, not all
        for (level, cluster), wanted in bank.items():
            block = found[level][0][cluster]
            np.testing.assert_allclose(block, np.array(wanted), rtol=0, atol=1e-5)
            assert ((level, cluster) in touched) == (found[level][3][cluster] > 0)


def test_a_cache_of_six_blocks_and_one_of_all_train_to_the_same_bits(tmp_path):
    tokens, paths = sequences(60)
    results = []
    for cache in (1, 6 * 2308, 1 << 30):
        with small_store(tmp_path / str(cache), cache_bytes=cache) as store:
            trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, RUN)
            curve = train(
                trainee, ShuffledOrder(60, RUN, SEED), RUN, tmp_path / str(cache), "memory"
            ).curve
            results.append((curve, blocks_of(store)))
    for curve, blocks in results[1:]:
        assert curve == results[0][0]
        for level, parts in blocks.items():
            for part, wanted in zip(parts, results[0][1][level], strict=True):
                assert part.tobytes() == wanted.tobytes()


def start(what: str, folder: Path, **options: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, what, str(folder)]
    root = str(Path(__file__).parents[1])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": root} | options,
    )  # fmt: skip


def test_a_run_killed_at_random_moments_has_the_losses_of_one_that_was_not(tmp_path):
    training_run(tmp_path / "whole")
    folder, rng, kills = tmp_path / "killed", random.Random(0), 0
    end = time.monotonic() + KILL_SECONDS
    while time.monotonic() < end:
        process = start("slow", folder)
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        time.sleep(rng.random() * 0.5)
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    training_run(folder)
    print(f"killed {kills} times")
    assert kills >= 2
    curves = [(tmp_path / name / "loss.jsonl").read_bytes() for name in ("whole", "killed")]
    assert curves[0] == curves[1]
    states = []
    for name in ("whole", "killed"):
        with small_store(tmp_path / name / "store", readonly=True) as store:
            states.append((store.progress(), blocks_of(store)))
    assert states[0][0] == states[1][0]
    for level, parts in states[0][1].items():
        for part, wanted in zip(parts, states[1][1][level], strict=True):
            assert part.tobytes() == wanted.tobytes()


def resident(folder: Path, branching: str) -> dict[str, float]:
    process = start("resident", folder, BRANCHING=branching)
    out, err = process.communicate()
    assert process.returncode == 0, err[-2000:]
    return json.loads(out.splitlines()[-1])


def test_resident_memory_follows_from_the_budget_not_from_the_bank(tmp_path):
    """Ten times the blocks on level 2, in both far more than the cache holds; the same batches."""
    small, large = resident(tmp_path / "small", "100"), resident(tmp_path / "large", "1000")
    print(f"small bank {small}, large bank {large}")
    assert large["bank_mb"] > 9 * small["bank_mb"]
    assert large["touched_mb"] > 2 * small["touched_mb"] > 6 * small["cache_mb"]
    assert large["peak_mb"] < 1.05 * small["peak_mb"]


def test_blocks_without_text_take_no_disk_and_start_from_their_seed(tmp_path):
    config = MemoryConfig(64, 4, (8, 8), (16, 4096))
    with BlockStore(tmp_path, config, SEED) as store:
        leaf = np.array([40_000])
        store.scatter(2, leaf, store.gather(2, leaf, 1))
        store.commit(PROGRESS)
        assert store.num_touched == 1
    file = (tmp_path / "data.mdb").stat()
    assert file.st_blocks * 512 < 20 * store.record_bytes(2) < config.bank_parameters
    with BlockStore(tmp_path, config, SEED, readonly=True) as store:
        found = next(itertools.islice(store.weights(2), 7, None))
    assert np.array_equal(found, initial_block(config, 8, np.random.default_rng([SEED, 2, 7])))
    assert found.any()


def test_what_was_not_committed_is_gone_and_what_was_is_whole(tmp_path):
    with small_store(tmp_path) as store:
        assert store.progress() is None
        fill(store, 2, [0, 1, 2], 1.0)
        arrays = {"anchor.norm": np.arange(6.0).reshape(2, 3), "step": np.array(7)}
        store.commit(PROGRESS, arrays)
        fill(store, 2, [1, 2, 3], 2.0)
        for first in (4, 10, 16):  # pushes them out to the disk
            store.gather(2, np.arange(first, first + 6), 6)
        assert not store._dirty
        assert np.all(np.array(store.gather(2, np.array([3]), 1)[0]) == 2)
    with small_store(tmp_path) as store:
        assert store.progress() == PROGRESS
        assert store.num_touched == 3
        for name, array in store.arrays().items():
            assert array.dtype == arrays[name].dtype
            assert np.array_equal(array, arrays[name])
        weights, _, _, steps = blocks_of(store)[2]
        assert np.all(weights[:3] == 1)
        assert steps[:5].tolist() == [1, 1, 1, 0, 0]
        fill(store, 2, [1, 2, 3], 3.0)
        store.commit(replace(PROGRESS, step=3))
    with small_store(tmp_path, readonly=True) as store:
        assert [float(w.max()) for w in itertools.islice(store.weights(2), 4)] == [1, 3, 3, 3]


def test_the_file_grows_by_what_one_commit_changes_and_no_more(tmp_path, monkeypatch):
    """And by one transaction: the pages that it replaces are used again only after it."""
    config = MemoryConfig(64, 4, (8, 8), (2, 64))
    with BlockStore(tmp_path, config, SEED) as store:
        size = store.record_bytes(2)
        monkeypatch.setattr("train.records.TRANSACTION_BYTES", 4 * size)
        for step in range(20):
            clusters = np.arange(32)
            store.scatter(2, clusters, store.gather(2, clusters, 32))
            store.commit(replace(PROGRESS, step=step))
    pages = -(-(size + 16) // 4096) * 4096
    assert (tmp_path / "data.mdb").stat().st_size < 1.1 * (32 + 32 + 4) * pages


def test_a_second_writer_is_refused_in_one_line_and_a_reader_is_not(tmp_path):
    with small_store(tmp_path / "store") as store:
        store.commit(PROGRESS)
        process = start("open", tmp_path)
        _, err = process.communicate()
        assert process.returncode == 2
        assert re_one_line("error: the training store has a writer already: .*; wait for it", err)
        reader = start("read", tmp_path)
        assert reader.communicate()[0].strip() == "2"
    assert start("open", tmp_path).wait() == 0


def re_one_line(pattern: str, text: str) -> bool:
    return re.match(pattern, text) is not None and len(text.splitlines()) == 1


def overfill(store: BlockStore, how: str) -> None:
    for first in range(0, 30, 3):
        fill(store, 2, [first, first + 1, first + 2], 2.0)
        if how == "prefetch":
            store.prefetch([(2, (first + n) % 32) for n in range(3, 6)], [])
    store.commit(PROGRESS)


@pytest.mark.parametrize("how", ["commit", "eviction", "prefetch"])
def test_a_full_store_is_one_line_and_the_last_commit_is_intact(how, tmp_path):
    """Wherever it fills up: the worker's error is raised to the caller."""
    cache = 1 << 30 if how == "commit" else 6 * 2308
    with small_store(tmp_path, map_size=100_000, cache_bytes=cache) as store:
        fill(store, 2, [0, 1, 2], 1.0)
        store.commit(PROGRESS)
        with pytest.raises(UserError, match=r"store .* is full: map size .*commit is intact") as e:
            overfill(store, how)
        assert "\n" not in str(e.value)
    with small_store(tmp_path) as store:
        assert store.progress() == PROGRESS
        assert np.all(blocks_of(store)[2][0][:3] == 1)


def test_a_file_that_may_not_grow_is_one_line_and_the_last_commit_is_intact(tmp_path):
    """The system's own refusal of a write, as on a full disk."""
    with small_store(tmp_path / "store") as store:
        fill(store, 2, [0, 1, 2], 1.0)
        store.commit(PROGRESS)
    process = start("limited", tmp_path)
    _, err = process.communicate()
    assert process.returncode == 2
    assert re_one_line("error: cannot write the training store .*commit is intact", err)
    with small_store(tmp_path / "store") as store:
        assert store.progress() == PROGRESS
        assert np.all(blocks_of(store)[2][0][:3] == 1)


def test_a_run_that_cannot_fit_on_the_disk_does_not_begin(tmp_path):
    with pytest.raises(UserError, match=r"too little disk space .* it may grow by .* are free;"):
        check_free_space(tmp_path, 1 << 60)
    check_free_space(tmp_path, 1 << 10)


def test_a_record_of_another_size_and_a_missing_store_are_one_line(tmp_path):
    with RecordStore(tmp_path) as records:
        records.write([(b"a", np.zeros(3))])
        with pytest.raises(UserError, match="another size"):
            records.read(b"a", np.zeros(2))
        assert not records.read(b"b", np.zeros(2))
    with pytest.raises(UserError, match="is missing"):
        RecordStore(tmp_path / "none", readonly=True)
    (tmp_path / "data.mdb").write_bytes(b"no store" * 2000)
    with pytest.raises(UserError, match="cannot open the training store"):
        RecordStore(tmp_path)


# What the processes of these tests do.


def run_slowly(folder: Path) -> None:
    """A training run that says when it begins and can be hit between any two records."""
    own = RecordStore._write

    def slowly(self: RecordStore, group: list[tuple[bytes, np.ndarray]]) -> None:
        for record in group:
            own(self, [record])

    RecordStore._write = slowly  # type: ignore[method-assign]
    print("begun", flush=True)
    training_run(folder)


def measure_resident(folder: Path) -> None:
    """Trains on a bank that does not fit the cache; prints peak memory and step time."""
    args = replace(ARGS, hidden_size=128)
    config = MemoryConfig(128, 2, (64, 64), (4, int(os.environ["BRANCHING"])))
    tokens, paths = sequences(960, config)
    training = TrainerConfig(epochs=1, batch_size=8, save_every=5)
    with BlockStore(folder, config, SEED, cache_bytes=32 << 20) as store:
        trainee = MemoryTrainee(make_model(args), store, tokens, paths, EOT, training)
        begin = time.perf_counter()
        train(trainee, ShuffledOrder(len(tokens), training, SEED), training, folder, "memory")
        seconds = (time.perf_counter() - begin) / 120
        touched = store.num_touched
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    result = {
        "bank_mb": 12 * config.bank_parameters / 1e6,
        "touched_mb": touched * store.record_bytes(2) / 1e6,
        "cache_mb": store.cache_bytes / 1e6,
        "peak_mb": int(peak.split()[1]) / 1024,
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


def read(folder: Path) -> None:
    with small_store(folder / "store", readonly=True) as store:
        progress = store.progress()
        print(progress.step if progress else None)


if __name__ == "__main__":
    from mlx_hmem.errors import run_program

    what, where = sys.argv[1], Path(sys.argv[2])
    programs = {
        "slow": run_slowly,
        "resident": measure_resident,
        "limited": write_limited,
        "read": read,
        "open": lambda folder: small_store(folder / "store").__exit__(),
    }
    run_program(lambda: programs[what](where))
