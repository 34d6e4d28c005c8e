"""One rank of test_ranks.py, run as a program: trains, and leaves what it has."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from tests.helpers.stores import EOT, store_state
from train.data.order import ShuffledOrder
from train.loop.loop import train
from train.ranks import Ranks
from train.recipe.recipe import CotrainSection, TrainerConfig
from train.step.anchor import AnchorTrainee, initialise
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore
from train.store.records import RecordStore

SEED, ROWS = 3, 24
ARGS = ModelArgs("openlm", 16, 2, 24, 2, 8, 32, tie_word_embeddings=True)
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(4, 2), branching=(3, 2))
COTRAIN = CotrainSection(learning_rate_scale=0.5, generic_probability=0.3)
# The rate is small because AdamW makes a whole step of a gradient that is rounding alone.
TRAINING = TrainerConfig(
    epochs=2, batch_size=6, learning_rate=2e-3, warmup_steps=2, save_every=3, grad_clip=0.5
)


def make_model() -> Model:
    model = Model(ARGS)
    initialise(model, SEED)
    return model


def sequences() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (ROWS, 11)).astype(np.uint16)
    tokens[1::2, 4] = EOT
    tokens[2::3, -3:] = EOT
    leaves = rng.integers(0, 6, ROWS)
    return tokens, np.stack([leaves // 2, leaves], axis=1)


def anchor_state(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    tokens, _ = sequences()
    model, ranks = make_model(), Ranks.meet(folder)
    trainee = AnchorTrainee(model, tokens, EOT, TRAINING, ranks)
    train(trainee, ShuffledOrder(ROWS, TRAINING, SEED), TRAINING, folder, "anchor")
    state = {name: np.array(array) for name, array in trainee.weights.arrays().items()}
    return state, trainee.gradient.exchanged_bytes


def cotrained_state(folder: Path) -> tuple[dict[str, np.ndarray], int]:
    tokens, paths = sequences()
    model, ranks = make_model(), Ranks.meet(folder)
    own = "store" if ranks.first else f"store-rank-{ranks.rank}"
    with BlockStore(folder / own, MEMORY, SEED) as store:
        trainee = MemoryTrainee(model, store, tokens, paths, EOT, TRAINING, COTRAIN, ranks)
        train(trainee, ShuffledOrder(ROWS, TRAINING, SEED), TRAINING, folder, "memories")
        return store_state(store), trainee.gradient.exchanged_bytes


def die_in_commit(number: int) -> None:
    """SIGKILL for this rank in its commit ``number``: prepared on all ranks, not yet live."""
    commits, own = [], RecordStore.commit_prepared

    def commit_or_die(self: RecordStore, live: bool = True) -> None:
        commits.append(live)
        if len(commits) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        own(self, live)

    RecordStore.commit_prepared = commit_or_die  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, out, killed = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    rank = Ranks.meet(out).rank
    folder = out / f"machine-{rank}" if kind == "apart" else out  # as if on two machines
    if killed and rank == int(killed[0]):
        die_in_commit(int(killed[1]))
    state, exchanged = (cotrained_state if kind == "memories" else anchor_state)(folder)
    np.savez(out / f"rank-{rank}.npz", **state)
    (out / f"rank-{rank}.json").write_text(json.dumps(exchanged))
