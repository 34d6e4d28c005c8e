"""The training loop: schedule, steps, log, and steps that are not finite."""

import itertools
import json
import math
from dataclasses import asdict, replace

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_hmem.anchors.load import named_parameters
from tests.helpers import loop_runs as runs
from tests.helpers.programs import refused
from tests.helpers.stores import assert_same, store_state
from train.loop.loop import MOST_SKIPPED, learning_rate_at, train
from train.recipe.recipe import TrainerConfig
from train.step.anchor import AnchorTrainee
from train.step.gradient import packed_mask
from train.step.loss import masked_loss
from train.step.memories import MemoryTrainee
from train.step.start import save_anchor, sound_anchor, take_anchor, trainable_anchor
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress


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
    config = replace(runs.CONFIG, weight_decay=0.5, grad_clip=0.05)
    model, (tokens, _) = runs.make_model(), runs.sequences()
    trainee = AnchorTrainee(runs.make_model(), tokens, runs.EOT, config)
    optimizers = {
        decay: optim.AdamW(1.0, [0.9, 0.95], weight_decay=decay, bias_correction=True)
        for decay in (0.0, 0.5)
    }

    def loss(batch: mx.array) -> mx.array:
        inputs = batch[:, :-1]
        return masked_loss(model(inputs, mask=packed_mask(inputs, runs.EOT)), batch, runs.EOT)

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


def test_the_curve_holds_every_step(tmp_path):
    runs.run("anchor", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(13))
    assert [row["learning_rate"] for row in rows] == [
        learning_rate_at(step, 13, runs.CONFIG) for step in range(13)
    ]
    assert rows[0]["loss"] == pytest.approx(math.log(runs.VOCABULARY), rel=0.3)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_log_sums_up_the_steps_between_its_lines(tmp_path):
    runs.run("memory", tmp_path)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    curve = (tmp_path / "loss.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in curve]
    assert [record["step"] for record in records] == [4, 8, 12, 13]  # checkpoints
    for record, first in zip(records, [0, 4, 8, 12], strict=True):
        last = record["step"]
        assert record["loss"] == pytest.approx(np.mean(losses[first:last]), abs=2e-5)
        assert record["learning_rate"] == learning_rate_at(last - 1, 13, runs.CONFIG)
        assert record["peak_memory_bytes"] > 0
        assert record["peak_resident_bytes"] > 10_000_000  # Python alone
    seconds = np.diff([0, *(record["seconds"] for record in records)])
    for record, steps, passed in zip(records, [4, 4, 4, 1], seconds, strict=True):
        tokens = steps * runs.CONFIG.batch_size * runs.CONTEXT
        # As precise as milliseconds of a run of milliseconds allow.
        assert record["tokens_per_s"] * (passed - 2e-3) < tokens
        assert tokens < record["tokens_per_s"] * (passed + 2e-3)


@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_run_that_is_no_longer_finite_stops_and_has_saved_only_what_was(kind, tmp_path):
    config = replace(runs.CONFIG, learning_rate=1e30, warmup_steps=0, save_every=1)
    line = refused("loss or gradient is not finite", runs.run, kind, tmp_path, config)
    assert "the 10th step skipped" in line
    progress = runs.saved(tmp_path, kind)
    assert progress.skipped == MOST_SKIPPED - 1
    assert len(progress.curve) >= 1
    for name, array in runs.checkpoint(tmp_path).items():
        if array.dtype == np.float32:
            assert np.isfinite(array).all(), name


def test_a_step_that_is_not_finite_leaves_the_anchor_and_its_moments_as_they_were():
    tokens, _ = runs.sequences()
    trainee, again = (
        AnchorTrainee(runs.make_model(), tokens, runs.EOT, runs.CONFIG) for _ in range(2)
    )
    batches = [np.arange(3), np.arange(3, 6)]
    for each in (trainee, again):
        each.step(batches[0], 1e-2)
    good = trainee.weights.arrays()
    bad = good | {"weights.model.norm.weight": good["weights.model.norm.weight"] * math.inf}
    trainee.weights.load(bad)
    assert not math.isfinite(trainee.step(batches[1], 1e-2)[1])
    for name, array in trainee.weights.arrays().items():
        assert np.array(array).tobytes() == np.array(bad[name]).tobytes(), name
    trainee.weights.load(good)
    assert trainee.step(batches[1], 1e-2) == again.step(batches[1], 1e-2)


def test_an_update_that_overflows_is_skipped_and_never_saved(tmp_path):
    """The gradient was finite, what it made was not: kept, and saved over the last sound state."""
    tokens, paths = runs.sequences()
    with BlockStore(tmp_path / "store", runs.MEMORY, runs.SEED) as store:
        trainee = MemoryTrainee(runs.make_model(), store, tokens, paths, runs.EOT, runs.CONFIG)
        trainee.step(np.arange(3), 1e-2)
        before = store_state(store)
        assert math.isnan(trainee.step(np.arange(3), math.inf)[0])
        assert_same(store_state(store), before)
    trainee = AnchorTrainee(runs.make_model(), tokens, runs.EOT, runs.CONFIG)
    trainee.save(tmp_path, Progress({"stage": "a"}))
    saved = (tmp_path / "checkpoint.safetensors").read_bytes()
    trainee.step(np.arange(3), math.inf)
    refused("at step 1 has numbers that are not finite", trainee.save, tmp_path, Progress({}, 1))
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == saved


def test_an_anchor_that_is_not_finite_is_not_trained_with(tmp_path):
    model = runs.make_model()
    model.model.norm.weight = model.model.norm.weight * math.nan
    save_anchor(model, asdict(runs.ARGS), tmp_path)
    for use in (trainable_anchor, sound_anchor, lambda f: take_anchor(str(f), tmp_path / "taken")):
        (tmp_path / "taken").mkdir(exist_ok=True)
        refused("not finite: model.norm.weight; use one that is sound", use, tmp_path)


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    _, paths = runs.sequences()
    leaves, counts = np.unique(paths[:, 1], return_counts=True)
    leaf = int(leaves[counts == 1][0])
    row = int(np.flatnonzero(paths[:, 1] == leaf)[0])
    spoiled = [step for step in range(13) if row in runs.order().batch(step).rows]
    with runs.trainee_of("memory", tmp_path) as trainee:
        trainee.store.gather(2, np.array([leaf]), 1)
        trainee.store._cache[2, leaf].states[0] = np.nan
        progress = train(trainee, runs.order(), runs.CONFIG, tmp_path, "memory")
    assert len(spoiled) == progress.skipped >= 3
    assert [row[0] for row in progress.curve] == [n for n in range(13) if n not in spoiled]
    state = runs.checkpoint(tmp_path)
    assert state["2.steps"][leaf] == 0  # not written at all
    assert all(np.isfinite(state[f"{level}.weights"]).all() for level in (1, 2))
