"""The training loop: order and schedule, the loss, and runs that were killed and went on."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from train.checkpoint import CHECKPOINT, Progress, check_identity
from train.gradient import masked_loss, packed_mask
from train.loop import (
    MOST_SKIPPED,
    Trainee,
    learning_rate_at,
    train,
)
from train.memories import MemoryTrainee
from train.order import ShuffledOrder, num_steps_of
from train.recipe import CotrainSection, TrainerConfig
from train.records import RecordStore
from train.store import BlockStore

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
        self.tokens, self.sizes = trainee.tokens, trainee.sizes

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
    result = {}
    with BlockStore(folder / "store", MEMORY, SEED, readonly=True) as store:
        for level, count in enumerate(MEMORY.num_clusters, 1):
            parts = store.gather(level, np.arange(count + 1), count + 1)  # with the generic one
            names = ("weights", "first", "second", "steps")
            result |= {f"{level}.{n}": np.array(p) for n, p in zip(names, parts, strict=True)}
        result |= store.arrays()
        progress = store.progress()
    assert progress is not None
    return result | {"curve": progress.curve_array()}


def saved(folder: Path, kind: str) -> Progress:
    if kind == "anchor":
        with trainee_of(kind, folder) as trainee:
            found = json.loads(read_safetensors_header(folder / CHECKPOINT)[1]["identity"])
            return trainee.resume(folder, found)
    with BlockStore(folder / "store", MEMORY, SEED, readonly=True) as store:
        progress = store.progress()
    assert progress is not None
    return progress


TIMES = {"tokens_per_s", "seconds", "peak_memory_bytes", "peak_resident_bytes"}


def logged(folder: Path) -> list[dict[str, Any]]:
    """The log, without what differs from run to run."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def assert_equal_runs(a: Path, b: Path) -> None:
    """Weights, moments, steps, loss curve and log, bit for bit."""
    first, second = checkpoint(a), checkpoint(b)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype, name
        assert first[name].tobytes() == second[name].tobytes(), name
    assert (a / "loss.jsonl").read_bytes() == (b / "loss.jsonl").read_bytes()
    assert logged(a) == logged(b)


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


def test_the_anchor_is_trained_by_adamw_that_leaves_norm_gains_undecayed():
    config = replace(CONFIG, weight_decay=0.5, grad_clip=0.05)
    model, (tokens, _) = make_model(), sequences()
    trainee = AnchorTrainee(make_model(), tokens, EOT, config)
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
    for steps, done in ((3, None), (6, 4), (5, 8)):
        with trainee_of(kind, tmp_path) as trainee, pytest.raises(KeyboardInterrupt):
            train(Ended(trainee, steps, interrupt), order(), CONFIG, tmp_path, kind)
        assert (tmp_path / "loss.jsonl").exists() == (done is not None)
        assert done is None or saved(tmp_path, kind).step == done
    assert run(kind, tmp_path).step == num_steps_of(ROWS, CONFIG) == 13
    assert_equal_runs(tmp_path, whole[kind])


@pytest.mark.parametrize(
    ("kind", "moment"), [("anchor", "step"), ("memory", "save"), ("cotrain", "save")]
)
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(kind, moment, whole, tmp_path):
    process = multiprocessing.get_context("spawn").Process(
        target=killed_run, args=(kind, tmp_path, moment)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert saved(tmp_path, kind).step == 4
    run(kind, tmp_path)
    assert_equal_runs(tmp_path, whole[kind])


def test_a_finished_run_is_not_trained_further(whole, tmp_path):
    shutil.copytree(whole["memory"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "loss.jsonl").unlink()  # killed between the last commit and this file
    with trainee_of("memory", tmp_path) as trainee:
        train(Ended(trainee, 0, interrupt), order(), CONFIG, tmp_path, "memory")
    assert_equal_runs(tmp_path, whole["memory"])


def test_the_curve_holds_every_step(whole):
    rows = [json.loads(line) for line in (whole["anchor"] / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["learning_rate"] for row in rows] == [
        learning_rate_at(step, 13, CONFIG) for step in range(13)
    ]
    assert rows[0]["loss"] == pytest.approx(math.log(VOCABULARY), rel=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_log_sums_up_the_steps_between_its_lines(whole):
    lines = (whole["memory"] / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    curve = (whole["memory"] / "loss.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in curve]
    assert [record["step"] for record in records] == [4, 8, 12, 13]  # checkpoints
    for record, first in zip(records, [0, 4, 8, 12], strict=True):
        last = record["step"]
        assert record["loss"] == pytest.approx(np.mean(losses[first:last]), abs=2e-5)
        assert record["learning_rate"] == learning_rate_at(last - 1, 13, CONFIG)
        assert record["peak_memory_bytes"] > 0
        assert record["peak_resident_bytes"] > 10_000_000  # Python alone
    seconds = np.diff([0, *(record["seconds"] for record in records)])
    for record, steps, passed in zip(records, [4, 4, 4, 1], seconds, strict=True):
        tokens = steps * CONFIG.batch_size * CONTEXT
        # As precise as milliseconds of a run of milliseconds allow.
        assert record["tokens_per_s"] * (passed - 2e-3) < tokens
        assert tokens < record["tokens_per_s"] * (passed + 2e-3)


def test_a_log_is_cut_where_the_run_goes_on(tmp_path):
    with trainee_of("memory", tmp_path) as trainee, pytest.raises(KeyboardInterrupt):
        train(Ended(trainee, 6, interrupt), order(), CONFIG, tmp_path, "memory")
    path = tmp_path / "log.jsonl"
    before = json.loads(path.read_text())
    assert before["step"] == 4
    # A longer run logs every 20 steps: of what came after the checkpoint, the last half-written.
    with path.open("a") as file:
        file.write(json.dumps({**before, "step": 5}) + '\n{"step": 6, "lo')
    run("memory", tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 13]
    assert records[0] == before
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)  # they add up over both starts
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_begins_again_from_the_start_leaves_no_old_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "validation": {"none": 3.0}}\n')
    run("anchor", tmp_path)
    assert [record["step"] for record in logged(tmp_path)] == [4, 8, 12, 13]


def test_how_a_run_is_watched_may_change_while_it_goes_on(whole, tmp_path):
    with trainee_of("memory", tmp_path) as trainee, pytest.raises(KeyboardInterrupt):
        train(Ended(trainee, 6, interrupt), order(), CONFIG, tmp_path, "memory")
    run("memory", tmp_path, replace(CONFIG, validate_every=3, validation_sequences=5))
    assert_equal_runs(tmp_path, whole["memory"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changed", "seed", "rows", "named"),
    [
        ({"learning_rate": 2e-2}, SEED, ROWS, "training.learning_rate was 0.01, is 0.02"),
        ({}, SEED + 1, ROWS, "seed was 5, is 6"),
        ({}, SEED, ROWS - 1, "num_sequences was 10, is 9"),
    ],
    ids=["recipe", "seed", "data"],
)
def test_what_another_run_saved_is_refused(kind, changed, seed, rows, named, whole, tmp_path):
    shutil.copytree(whole[kind], tmp_path, dirs_exist_ok=True)
    config = replace(CONFIG, **changed)
    wanted = rf"belongs to another run: {named}; use another --out or delete"
    with trainee_of(kind, tmp_path) as trainee, pytest.raises(UserError, match=wanted):
        train(
            Ended(trainee, 0, interrupt), ShuffledOrder(rows, config, seed), config, tmp_path, kind
        )
    assert_equal_runs(tmp_path, whole[kind])


def test_a_run_goes_on_only_with_the_same_sizes_and_files(tmp_path):
    files = {"tokenizer": "a", "tree": "b"}
    with trainee_of("memory", tmp_path) as trainee:
        train(trainee, order(), CONFIG, tmp_path, "memory", files)
    tokens, paths = sequences()
    other = replace(MEMORY, r=(3, 1))
    with BlockStore(tmp_path / "store", other, SEED) as store:
        trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, CONFIG)
        files["tokenizer"] = "c"
        wanted = r"another run: files.tokenizer was a, is c, sizes.r was \[3, 2\], is \[3, 1\];"
        with pytest.raises(UserError, match=wanted):
            train(trainee, order(), CONFIG, tmp_path, "memory", files)


def test_a_difference_is_named_also_where_a_key_is_new_and_the_many_are_cut(tmp_path):
    with pytest.raises(UserError, match=r"another run: a\.c was None, is 2;"):
        check_identity({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, tmp_path)
    with pytest.raises(UserError, match="and 3 more"):
        check_identity({}, {str(i): i for i in range(7)}, tmp_path)
    check_identity({"a": [1, 2]}, {"a": (1, 2)}, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_no_longer_finite_stops_and_has_saved_only_what_was(kind, tmp_path):
    config = replace(CONFIG, learning_rate=1e30, warmup_steps=0, save_every=1)
    with pytest.raises(UserError, match="loss or gradient is not finite") as error:
        run(kind, tmp_path, config)
    assert "\n" not in str(error.value)
    assert "the 10th step skipped" in str(error.value)
    progress = saved(tmp_path, kind)
    assert progress.skipped == MOST_SKIPPED - 1
    assert len(progress.curve) >= 1
    for name, array in checkpoint(tmp_path).items():
        if array.dtype == np.float32:
            assert np.isfinite(array).all(), name


def test_a_step_that_is_not_finite_leaves_the_anchor_and_its_moments_as_they_were():
    tokens, _ = sequences()
    trainee, again = (AnchorTrainee(make_model(), tokens, EOT, CONFIG) for _ in range(2))
    batches = [np.arange(3), np.arange(3, 6)]
    for each in (trainee, again):
        each.step(batches[0], 1e-2)
    good = trainee.state()
    bad = good | {"weights.model.norm.weight": good["weights.model.norm.weight"] * math.inf}
    trainee.load_state(bad)
    assert not math.isfinite(trainee.step(batches[1], 1e-2)[1])
    for name, array in trainee.state().items():
        assert np.array(array).tobytes() == np.array(bad[name]).tobytes(), name
    trainee.load_state(good)
    assert trainee.step(batches[1], 1e-2) == again.step(batches[1], 1e-2)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    _, paths = sequences()
    leaves, counts = np.unique(paths[:, 1], return_counts=True)
    leaf = int(leaves[counts == 1][0])
    row = int(np.flatnonzero(paths[:, 1] == leaf)[0])
    spoiled = [step for step in range(13) if row in order().batch(step).rows]
    with trainee_of("memory", tmp_path) as trainee:
        trainee.store.gather(2, np.array([leaf]), 1)
        trainee.store._entry((2, leaf)).states[0] = np.nan
        progress = train(trainee, order(), CONFIG, tmp_path, "memory")
    assert len(spoiled) == progress.skipped >= 3
    assert [row[0] for row in progress.curve] == [n for n in range(13) if n not in spoiled]
    state = checkpoint(tmp_path)
    assert state["2.steps"][leaf] == 0  # not written at all
    assert all(np.isfinite(state[f"{level}.weights"]).all() for level in (1, 2))
