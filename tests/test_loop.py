"""The training loop: order and schedule, the loss, and runs that were killed and went on."""

import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx_hmem  # isort: skip  # noqa: F401  OpenBLAS goes in front before MLX is loaded
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, read_safetensors_header
from train.anchor import AnchorTrainee, initialise
from train.loop import (
    Order,
    Trainee,
    learning_rate_at,
    masked_loss,
    num_steps_of,
    packed_mask,
    train,
)
from train.memories import MemoryTrainee
from train.recipe import TrainerConfig

EOT, VOCABULARY, CONTEXT, ROWS, SEED = 0, 48, 12, 10, 5
ARGS = ModelArgs("openlm", 16, 2, 24, 2, 8, VOCABULARY, tie_word_embeddings=True)
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(3, 2), branching=(2, 3))
CONFIG = TrainerConfig(epochs=4, batch_size=3, learning_rate=1e-2, warmup_steps=2, save_every=4)
KINDS = ["anchor", "memory"]


def sequences() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (ROWS, CONTEXT + 1)).astype(np.uint16)
    tokens[rng.random(tokens.shape) < 0.15] = EOT
    leaves = rng.integers(0, 6, ROWS)
    return tokens, np.stack([leaves // 3, leaves], axis=1)


def make_model() -> Model:
    model = Model(ARGS)
    initialise(model, SEED)
    return model


def make_trainee(kind: str, config: TrainerConfig = CONFIG) -> Trainee:
    tokens, paths = sequences()
    if kind == "anchor":
        return AnchorTrainee(make_model(), tokens, EOT, config)
    return MemoryTrainee(make_model(), MEMORY, tokens, paths, EOT, config, SEED)


def run(kind: str, folder: Path, config: TrainerConfig = CONFIG, seed: int = SEED) -> None:
    train(make_trainee(kind, config), ROWS, config, folder, seed, kind)


class Ended:
    """A trainee that calls ``end`` in place of its step number ``steps``."""

    def __init__(self, trainee: Trainee, steps: int, end: Callable[[], None]):
        self.trainee, self.left, self.end = trainee, steps, end
        self.state, self.load_state = trainee.state, trainee.load_state

    def step(self, rows: np.ndarray, learning_rate: float) -> tuple[float, float]:
        if self.left == 0:
            self.end()
        self.left -= 1
        return self.trainee.step(rows, learning_rate)


def interrupt() -> None:
    raise KeyboardInterrupt


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(kind: str, folder: Path, moment: str) -> None:
    """A run that SIGKILL ends in step 6, or when its second checkpoint is to replace the first."""
    own_replace, replaced = os.replace, []

    def replace_or_die(source: Path, target: Path) -> None:
        replaced.append(Path(target).name)
        if moment == "save" and replaced.count("checkpoint.safetensors") == 2:
            kill()
        own_replace(source, target)

    os.replace = replace_or_die  # type: ignore[assignment]
    steps = 6 if moment == "step" else 1000
    train(Ended(make_trainee(kind), steps, kill), ROWS, CONFIG, folder, SEED, kind)


def checkpoint(folder: Path) -> dict[str, np.ndarray]:
    arrays = load_safetensors(folder / "checkpoint.safetensors")
    return {name: np.array(array) for name, array in arrays.items()}


def step_of(folder: Path) -> int:
    return int(read_safetensors_header(folder / "checkpoint.safetensors")[1]["step"])


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, moments, steps and loss curve, bit for bit."""
    first, second = checkpoint(a), checkpoint(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert first[name].tobytes() == second[name].tobytes(), name
    assert (a / "loss.jsonl").read_bytes() == (b / "loss.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        run(kind, folder)
    return folders


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    config = TrainerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)
    rates = [learning_rate_at(step, 24, config) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55)  # half-way down
    assert rates[9] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert rates[24] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate_at(0, 1, replace(config, warmup_steps=0)) == 1.0


def test_an_epoch_is_a_permutation_that_follows_from_the_seed():
    order = Order(12, seed=1)
    epochs = [np.concatenate([order.batch(4 * e + i, 3) for i in range(4)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])
    # The same stream whatever the batch, also for one who comes in later.
    assert np.array_equal(Order(12, seed=1).batch(2, 12), epochs[2])
    assert np.array_equal(Order(12, seed=1).batch(1, 5), np.concatenate(epochs)[5:10])
    assert not np.array_equal(Order(12, seed=2).batch(0, 12), epochs[0])


def test_the_number_of_steps_counts_whole_batches():
    assert num_steps_of(10, TrainerConfig(epochs=1.5, batch_size=4)) == 3
    assert num_steps_of(1, TrainerConfig(epochs=0.1, batch_size=4)) == 1


def loss_of(model: Model, row: list[int]) -> float:
    batch = mx.array([row])
    inputs = batch[:, :-1]
    return masked_loss(model(inputs, mask=packed_mask(inputs, EOT)), batch, EOT).item()


def test_the_loss_of_packed_documents_is_that_of_the_documents_alone():
    model, rng = make_model(), np.random.default_rng(1)
    documents = [[EOT, *rng.integers(1, VOCABULARY, n).tolist()] for n in (2, 5, 1, 4)]
    row = [*itertools.chain.from_iterable(documents), EOT]
    packed = loss_of(model, row)
    alone = [loss_of(model, [*document, EOT]) for document in documents]
    assert packed == pytest.approx(np.average(alone, weights=list(map(len, documents))), rel=1e-5)
    # Attention across the borders would be another loss.
    batch = mx.array([row])
    assert masked_loss(model(batch[:, :-1]), batch, EOT).item() != pytest.approx(packed, rel=1e-4)


def test_padding_does_not_count():
    model, row = make_model(), [EOT, 5, 6, 7, EOT, 8, 9]
    ended = loss_of(model, [*row, EOT])
    assert loss_of(model, [*row, EOT, EOT, EOT, EOT]) == pytest.approx(ended, rel=1e-6)
    # The one that ends a document does.
    assert ended != pytest.approx(loss_of(model, row), rel=1e-4)
    assert loss_of(model, [EOT, EOT, EOT]) == 0.0


def test_the_anchor_is_trained_by_adamw_that_leaves_norm_gains_undecayed():
    config = replace(CONFIG, weight_decay=0.5, grad_clip=0.05)
    trainee, model, (tokens, _) = make_trainee("anchor", config), make_model(), sequences()
    optimizers = {
        decay: optim.AdamW(1.0, [0.9, 0.95], weight_decay=decay, bias_correction=True)
        for decay in (0.0, 0.5)
    }

    def loss(batch: mx.array) -> mx.array:
        inputs = batch[:, :-1]
        return masked_loss(model(inputs, mask=packed_mask(inputs, EOT)), batch, EOT)

    for rows, rate in (([1, 2, 3], 0.01), ([0, 4, 1], 0.02), ([5, 6, 7], 0.005)):
        value, norm = trainee.step(np.array(rows), rate)
        wanted, tree = nn.value_and_grad(model, loss)(mx.array(tokens[rows].astype(np.int32)))
        gradients, weights = dict(tree_flatten(tree)), named_parameters(model)
        assert norm == pytest.approx(
            math.sqrt(sum((g**2).sum().item() for g in gradients.values()))
        )
        assert value == pytest.approx(wanted.item(), rel=1e-5)
        for decay, optimizer in optimizers.items():
            optimizer.learning_rate = rate
            own = {
                n: g * (0.05 / norm) for n, g in gradients.items() if (g.ndim > 1) == (decay > 0)
            }
            weights |= optimizer.apply_gradients(own, {name: weights[name] for name in own})
        model.update(tree_unflatten(list(weights.items())))
    for name, array in named_parameters(trainee.model).items():
        wanted = np.array(named_parameters(model)[name])
        np.testing.assert_allclose(np.array(array), wanted, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_that_goes_on_equals_an_uninterrupted_one(kind, whole, tmp_path):
    # Before the first checkpoint, in the 7th step of all, in the 10th.
    for steps, saved in ((3, None), (6, 4), (5, 8)):
        trainee = Ended(make_trainee(kind), steps, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(trainee, ROWS, CONFIG, tmp_path, SEED, kind)
        assert (step_of(tmp_path) if saved else list(tmp_path.iterdir())) == (saved or [])
    run(kind, tmp_path)
    assert step_of(tmp_path) == num_steps_of(ROWS, CONFIG) == 13
    assert_equal_runs(tmp_path, whole[kind])


@pytest.mark.parametrize(("kind", "moment"), [("anchor", "step"), ("memory", "save")])
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(kind, moment, whole, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=killed_run, args=(kind, tmp_path, moment)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert step_of(tmp_path) == 4
    run(kind, tmp_path)
    assert_equal_runs(tmp_path, whole[kind])


def test_a_finished_run_is_not_trained_further(whole, tmp_path):
    shutil.copytree(whole["memory"], tmp_path, dirs_exist_ok=True)
    state = train(
        Ended(make_trainee("memory"), 0, interrupt), ROWS, CONFIG, tmp_path, SEED, "memory"
    )
    before = checkpoint(whole["memory"])
    assert all(np.array_equal(np.array(array), before[name]) for name, array in state.items())
    assert_equal_runs(tmp_path, whole["memory"])


def test_the_curve_holds_every_step(whole):
    rows = [json.loads(line) for line in (whole["anchor"] / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["learning_rate"] for row in rows] == [
        learning_rate_at(step, 13, CONFIG) for step in range(13)
    ]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.parametrize(
    ("changed", "seed", "rows"),
    [({"learning_rate": 2e-2}, SEED, ROWS), ({}, SEED + 1, ROWS), ({}, SEED, ROWS - 1)],
    ids=["recipe", "seed", "data"],
)
def test_the_checkpoint_of_another_run_is_refused(changed, seed, rows, whole, tmp_path):
    shutil.copytree(whole["anchor"], tmp_path, dirs_exist_ok=True)
    config = replace(CONFIG, **changed)
    trainee = Ended(make_trainee("anchor"), 0, interrupt)
    with pytest.raises(UserError, match=r"belongs to another run.*use another --out or delete"):
        train(trainee, rows, config, tmp_path, seed, "anchor")
    assert_equal_runs(tmp_path, whole["anchor"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(kind, tmp_path):
    config = replace(CONFIG, learning_rate=1e30, warmup_steps=0, save_every=1)
    with pytest.raises(UserError, match="loss or gradient is not finite") as error:
        run(kind, tmp_path, config)
    assert "\n" not in str(error.value)
    assert f"at step {step_of(tmp_path)};" in str(error.value)
    assert step_of(tmp_path) >= 1
    for name, array in checkpoint(tmp_path).items():
        if array.dtype == np.float32:
            assert np.isfinite(array).all(), name


def test_nothing_to_train_on_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nothing to train on"):
        train(make_trainee("anchor"), 0, CONFIG, tmp_path, SEED, "anchor")
