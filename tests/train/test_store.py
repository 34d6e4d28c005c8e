"""The store of the blocks under training: bounds, and the same numbers as without it."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import initial_block
from tests.helpers.loop_runs import EOT, SEED, make_model
from tests.helpers.store_worker import MEMORY, PROGRESS, RUN, sequences, small_store, start
from tests.helpers.stores import Dense, assert_same, store_state
from train.data.order import ShuffledOrder
from train.loop.loop import train
from train.recipe.recipe import TrainerConfig
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore


def test_a_sparse_step_equals_a_dense_one_in_which_every_block_is_a_parameter(tmp_path):
    """Of the reference only the touched blocks are updated, each counting its own steps."""
    tokens, paths = sequences(30)
    config = TrainerConfig(weight_decay=0.3, grad_clip=1e9, batch_size=4)
    dense, rng = Dense(make_model(), MEMORY, SEED, clip=1e9), np.random.default_rng(1)
    with small_store(tmp_path) as store:
        trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, config)
        batches = [rng.choice(30, 4, replace=False) for _ in range(21)]
        for step, (rows, next_rows) in enumerate(itertools.pairwise(batches)):
            rate = 0.02 / (1 + step)
            wanted = dense.step(tokens[rows], paths[rows], rate)
            assert trainee.step(rows, rate, next_rows)[0] == pytest.approx(wanted, rel=1e-5)
        state = store_state(store)
    dense.assert_close(state)
    chosen = paths[np.concatenate(batches[:-1])]
    touched = {(n, c) for n in (1, 2) for c in chosen[:, n - 1].tolist()}
    assert 6 < len(touched) < len(dense.weights) - 2  # more than the cache holds, not all
    for level, cluster in dense.weights:
        assert ((level, cluster) in touched) == (state[f"{level}.steps"][cluster] > 0)


def test_a_cache_of_six_blocks_and_one_of_all_train_to_the_same_bits(tmp_path):
    tokens, paths = sequences(60)
    results = []
    for cache in (1, 6 * 2308, 1 << 30):
        with small_store(tmp_path / str(cache), cache_bytes=cache) as store:
            trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, RUN)
            curve = train(
                trainee, ShuffledOrder(60, RUN, SEED), RUN, tmp_path / str(cache), "memory"
            ).curve
            results.append((curve, store_state(store)))
    for curve, state in results[1:]:
        assert curve == results[0][0]
        assert_same(state, results[0][1])


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
        assert len(store.touched()) == 1
    file = (tmp_path / "data.mdb").stat()
    assert file.st_blocks * 512 < 20 * store.record_bytes(2) < config.bank_parameters
    with BlockStore(tmp_path, config, SEED, readonly=True) as store:
        found = store.block(2, 7)
    assert np.array_equal(found, initial_block(config, 8, np.random.default_rng([SEED, 2, 7])))
    assert found.any()


def test_the_file_grows_by_what_one_commit_changes_and_no_more(tmp_path, monkeypatch):
    """And by one transaction: the pages that it replaces are used again only after it."""
    config = MemoryConfig(64, 4, (8, 8), (2, 64))
    with BlockStore(tmp_path, config, SEED) as store:
        size = store.record_bytes(2)
        monkeypatch.setattr("train.store.records.TRANSACTION_BYTES", 4 * size)
        for step in range(20):
            clusters = np.arange(32)
            store.scatter(2, clusters, store.gather(2, clusters, 32))
            store.commit(replace(PROGRESS, step=step))
    pages = -(-(size + 16) // 4096) * 4096
    assert (tmp_path / "data.mdb").stat().st_size < 1.1 * (32 + 32 + 4) * pages
