"""Several ranks over loopback do what one does with the whole batch, and survive a kill."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model
from tests.helpers import rank_worker
from tests.helpers.places import ROOT
from tests.helpers.rank_worker import MEMORY, TRAINING
from train.data.order import ShuffledOrder
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore

LAUNCH = Path(sys.executable).with_name("mlx.launch")
STATES = {"anchor": rank_worker.anchor_state, "memories": rank_worker.cotrained_state}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launch(kind: str, out: Path, *killed: int, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """Runs the worker on so many ranks. The launcher's own exit status says nothing."""
    out.mkdir(exist_ok=True)
    command = [str(LAUNCH), "-n", str(ranks), "--backend", "ring", "-p", str(free_port())]
    command += ["--env", f"PYTHONPATH={ROOT}", "--python", sys.executable]
    command += [
        str(ROOT / "tests" / "helpers" / "rank_worker.py"),
        kind,
        str(out),
        *map(str, killed),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def states(out: Path, ranks: int = 2) -> list[dict[str, np.ndarray]]:
    return [dict(np.load(out / f"rank-{rank}.npz")) for rank in range(ranks)]


def assert_close(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5, err_msg=name)


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("kind", STATES)
def test_two_ranks_are_one_rank_with_the_whole_batch(kind, tmp_path):
    result = launch(kind, tmp_path / "two")
    assert "rank-1.npz" in {path.name for path in (tmp_path / "two").iterdir()}, result.stderr
    (tmp_path / "one").mkdir()
    two, (one, exchanged) = states(tmp_path / "two"), STATES[kind](tmp_path / "one")
    assert_equal(two[0], two[1])
    assert_close(two[0], one)
    assert exchanged == 0


def test_a_step_exchanges_the_anchor_and_the_blocks_it_touches(tmp_path):
    launch("memories", tmp_path)
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
        assert json.loads((tmp_path / f"rank-{rank}.json").read_text()) == wanted


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_between_the_phases_of_a_commit_goes_on_with_the_others(rank, tmp_path):
    launch("memories", tmp_path / "whole")
    launch("memories", tmp_path / "killed", rank, 2)
    assert not (tmp_path / "killed" / f"rank-{rank}.npz").exists()
    launch("memories", tmp_path / "killed")
    assert_equal(states(tmp_path / "killed")[rank], states(tmp_path / "whole")[rank])


def test_ranks_at_different_steps_of_different_runs_are_refused(tmp_path):
    launch("memories", tmp_path)
    shutil.rmtree(tmp_path / "store-rank-1")
    (tmp_path / "rank-1.npz").unlink()
    result = launch("memories", tmp_path)
    assert "ranks do not continue the same run: their steps are [8, 0]" in result.stderr
    assert not (tmp_path / "rank-1.npz").exists()


def test_a_machine_without_a_checkpoint_takes_over_that_of_the_other(tmp_path):
    """It was killed before it wrote its own."""
    launch("apart", tmp_path)
    whole = states(tmp_path)
    assert_equal(whole[0], whole[1])
    shutil.rmtree(tmp_path / "machine-1")
    for rank in (0, 1):
        (tmp_path / f"rank-{rank}.npz").unlink()
    launch("apart", tmp_path)
    assert_equal(states(tmp_path)[1], whole[0])
