"""Several ranks over loopback do what one does with the whole batch, and survive a kill."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model
from tests.helpers import rank_worker
from tests.helpers.places import ROOT
from tests.helpers.rank_worker import MEMORY, TRAINING
from tests.helpers.stores import assert_close, assert_same
from train.data.order import ShuffledOrder
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore

STATES = {"anchor": rank_worker.anchor_state, "memories": rank_worker.cotrained_state}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(kind: str, out: Path, *killed: int, ranks: int = 2) -> str:
    """Runs the worker on so many ranks; returns what they say. One that fails ends the others.

    As ``mlx.launch`` does, which test_shards.py tries, but for its loop that never sleeps.
    """
    out.mkdir(exist_ok=True)
    (out / "hosts").write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(ranks)]))
    command = [sys.executable, "-m", "tests.helpers.rank_worker", kind, str(out)]
    with (out / "said").open("w+") as said:
        processes = [
            subprocess.Popen(
                [*command, *map(str, killed)], cwd=ROOT, stderr=said,
                env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(out / "hosts")},
            )
            for rank in range(ranks)
        ]  # fmt: skip
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                for process in processes:
                    process.kill()
            time.sleep(0.05)
        said.seek(0)
        return said.read()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What two ranks leave that train the memories."""
    out = tmp_path_factory.mktemp("whole")
    launch("memories", out)
    return out


def states(out: Path, ranks: int = 2) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(out / f"rank-{rank}.npz")) for rank in range(ranks)]


@pytest.mark.parametrize("kind", STATES)
def test_two_ranks_are_one_rank_with_the_whole_batch(kind, whole, tmp_path):
    if kind == "anchor":
        whole = tmp_path / "two"
        launch(kind, whole)
    (tmp_path / "one").mkdir()
    two, (one, exchanged) = states(whole), STATES[kind](tmp_path / "one")
    assert_same(two[0], two[1])
    assert_close(two[0], one)
    assert exchanged == 0


def test_a_step_exchanges_the_anchor_and_the_blocks_it_touches(whole, tmp_path):
    anchor = sum(array.size for array in named_parameters(Model(rank_worker.ARGS)).values())
    tokens, paths = rank_worker.sequences()
    order = ShuffledOrder(len(tokens), TRAINING, rank_worker.SEED)
    wanted = 0
    with BlockStore(tmp_path / "other", MEMORY, rank_worker.SEED) as store:
        model = Model(rank_worker.ARGS)
        trainee = MemoryTrainee(model, store, tokens, paths, 0, TRAINING, rank_worker.COTRAIN)
        for step in range(order.num_steps):
            chosen = trainee._paths(order.batch(step).rows, step)
            touched = [len(np.unique(chosen[:, level])) for level in (0, 1)]
            sizes = [np.prod(MEMORY.block_shape(level)) for level in (1, 2)]
            wanted += 4 * (1 + anchor + int(np.dot(touched, sizes)))
    for rank in (0, 1):
        assert json.loads((whole / f"rank-{rank}.json").read_text()) == wanted


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_between_the_phases_of_a_commit_goes_on_with_the_others(
    rank, whole, tmp_path
):
    launch("memories", tmp_path / "killed", rank, 2)
    assert not (tmp_path / "killed" / f"rank-{rank}.npz").exists()
    launch("memories", tmp_path / "killed")
    assert_same(states(tmp_path / "killed")[rank], states(whole)[rank])


def test_ranks_at_different_steps_of_different_runs_are_refused(whole, tmp_path):
    shutil.copytree(whole / "store", tmp_path / "store")  # rank 0's
    said = launch("memories", tmp_path)
    assert "ranks do not continue the same run: their steps are [8, 0]" in said
    assert not (tmp_path / "rank-1.npz").exists()


def test_a_machine_without_a_checkpoint_takes_over_that_of_the_other(tmp_path):
    """It was killed before it wrote its own."""
    launch("apart", tmp_path)
    whole = states(tmp_path)
    assert_same(whole[0], whole[1])
    shutil.rmtree(tmp_path / "machine-1")
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.npz").unlink()
    launch("apart", tmp_path)
    assert_same(states(tmp_path)[1], whole[0])
