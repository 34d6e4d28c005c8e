"""Co-training: anchor, memories and generic memory in the same steps, in parts or in one piece."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import join_blocks
from tests.helpers.programs import refused
from tests.helpers.rank_worker import MEMORY, ROWS, SEED, make_model, sequences
from tests.helpers.references import of_kind
from tests.helpers.stores import EOT, Dense, assert_close, store_state
from train.recipe.recipe import CotrainSection, TrainerConfig
from train.step.anchor import AnchorTrainee, initialise
from train.step.memories import MemoryTrainee, generic_block, generic_path
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress

TRAINING = TrainerConfig(batch_size=4, weight_decay=0.3, grad_clip=0.5)
# AdamW makes a whole step of a gradient that is rounding alone, so two orders of summation differ
# by a share of the rate.
RATE = 2e-3
COTRAIN = CotrainSection(learning_rate_scale=0.5, weight_decay=0.1, generic_probability=0.3)


Make = Callable[..., MemoryTrainee]


@pytest.fixture
def make(tmp_path: Path):
    stores: list[BlockStore] = []

    def trainee(
        training: TrainerConfig = TRAINING,
        cotrain: CotrainSection | None = COTRAIN,
        config: MemoryConfig = MEMORY,
    ) -> MemoryTrainee:
        folder = tmp_path / f"store-{len(stores)}"
        stores.append(BlockStore(folder, config, SEED).__enter__())
        model, (tokens, paths) = make_model(), sequences()
        return MemoryTrainee(model, stores[-1], tokens, paths, EOT, training, cotrain)

    yield trainee
    for store in stores:
        store.__exit__()


def state_of(trainee: MemoryTrainee) -> dict[str, np.ndarray]:
    """Everything that training changes."""
    anchor = {name: np.array(array) for name, array in trainee.anchor.arrays().items()}
    return store_state(trainee.store) | anchor


def test_a_cotrained_step_is_that_of_a_dense_reference(make: Make):
    trainee, dense = make(), Dense(make_model(), MEMORY, SEED, clip=0.5, scale=0.5)
    rng, generic = np.random.default_rng(1), 0
    for step in range(20):
        rows, rate = rng.choice(ROWS, 4, replace=False), 0.02 / (1 + step)
        paths = trainee._paths(rows, step)
        generic += int((paths == generic_path(MEMORY)).all(axis=1).sum())
        wanted = dense.step(trainee.tokens[rows], paths, rate)
        assert trainee.step(rows, rate)[0] == pytest.approx(wanted, rel=1e-5)
    assert 10 < generic < 40  # of 80
    dense.assert_close(state_of(trainee))


@pytest.mark.parametrize("part", [1, 2])
def test_gradients_of_parts_add_up_to_those_of_the_batch(make: Make, part: int):
    whole, parts = make(), make(replace(TRAINING, micro_batch_size=part))
    for step in range(5):
        rows = np.arange(4 * step, 4 * step + 4)
        assert parts.step(rows, RATE) == pytest.approx(whole.step(rows, RATE), rel=1e-5)
    assert_close(state_of(whole), state_of(parts))


@pytest.mark.parametrize("cotrain", [None, COTRAIN])
@pytest.mark.parametrize("kind", ["ffn", "kv"])
def test_layers_that_are_computed_again_give_the_same_gradient(make: Make, kind, cotrain):
    config = replace(MEMORY, kind=kind, query_size=16).placed("last 1")
    again = replace(TRAINING, gradient_checkpointing=True)
    kept, computed = (make(t, cotrain, config) for t in (TRAINING, again))
    for step in range(4):
        rows = np.arange(4 * step, 4 * step + 4)
        assert computed.step(rows, RATE) == pytest.approx(kept.step(rows, RATE), rel=1e-5)
    for level, count in enumerate(MEMORY.num_clusters, 1):
        a, b = (t.store.gather(level, np.arange(count), count)[0] for t in (kept, computed))
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=0, atol=1e-5)


def test_layers_that_are_computed_again_take_less_memory():
    args = ModelArgs("openlm", 64, 12, 192, 2, 32, 32, tie_word_embeddings=True)
    tokens, peaks = np.full((4, 129), 5, np.uint16), []
    for again in (False, True):
        training = replace(TRAINING, gradient_checkpointing=again)
        model = Model(args)
        initialise(model, SEED)
        trainee = AnchorTrainee(model, tokens, EOT, training)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        trainee.step(np.arange(4), RATE)
        peaks.append(mx.get_peak_memory() - before)
        del trainee, model
    assert peaks[1] < 0.5 * peaks[0]


def test_an_anchor_in_parts_is_the_anchor_in_one_piece_where_the_batch_divides():
    tokens, _ = sequences()
    whole, parts = (
        AnchorTrainee(make_model(), tokens, EOT, replace(TRAINING, micro_batch_size=size))
        for size in (None, 2)
    )
    for step in range(5):
        rows = np.arange(4 * step, 4 * step + 4)
        assert parts.step(rows, RATE) == pytest.approx(whole.step(rows, RATE), rel=1e-5)
    found = parts.weights.arrays()
    for name, array in whole.weights.arrays().items():
        np.testing.assert_allclose(np.array(array), np.array(found[name]), atol=1e-5)
    refused("batch_size is not a multiple", replace, TRAINING, micro_batch_size=3)


def test_generic_memory_stands_in_as_often_as_it_should(make: Make):
    rows = np.arange(ROWS)
    for cotrain, low, high in (
        (None, 0, 0),
        (CotrainSection(generic_probability=0), 0, 0),
        (CotrainSection(), 0.2, 0.3),  # 1 / (3 + 1)
        (CotrainSection(generic_probability=1), 1, 1),
    ):
        trainee = make(cotrain=cotrain)
        paths = np.concatenate([trainee._paths(rows, step) for step in range(100)])
        generic = (paths == generic_path(MEMORY)).all(axis=1)
        assert low <= generic.mean() <= high
        assert (paths[~generic] < MEMORY.num_clusters).all()


def test_generic_memory_alone_touches_no_block_of_the_bank(make: Make):
    trainee = make(cotrain=CotrainSection(generic_probability=1))
    for step in range(3):
        trainee.step(np.arange(4 * step, 4 * step + 4), 0.02)
    state = state_of(trainee)
    assert state["1.steps"].tolist() == [0, 0, 0, 3]
    assert state["2.steps"].tolist() == [0, 0, 0, 0, 0, 0, 3]


@pytest.mark.parametrize("kind", ["ffn", "lora_ffn", "lora", "kv"])
def test_the_generic_block_is_the_memory_that_the_anchor_was_trained_with(make: Make, kind: str):
    sizes = dict(intermediate_size=24, query_size=16, key_value_size=16)
    config = replace(MEMORY, **of_kind(kind), **sizes)
    trainee = make(config=config)
    for step in range(3):
        trainee.step(np.arange(4 * step, 4 * step + 4), 0.02)
    trainee.save(Path(), Progress({}))
    block = mx.array(generic_block(trainee.store))
    assert block.shape == config.block_shape(0)
    levels = [
        trainee.store.gather(n, np.array([c]), 1)[0][0]
        for n, c in enumerate(generic_path(config), 1)
    ]
    for group, wanted in zip(
        join_blocks([block], config), join_blocks(levels, config), strict=True
    ):
        assert np.abs(np.array(wanted)).max() > 0
        assert np.array_equal(np.array(group), np.array(wanted))


def test_a_step_that_is_not_finite_leaves_anchor_and_blocks_as_they_were(make: Make):
    trainee, again = make(), make()
    for each in (trainee, again):
        each.step(np.arange(4), 0.02)
    before = state_of(trainee)
    tokens = trainee.anchor.weights["model.norm.weight"]
    trainee.anchor.weights["model.norm.weight"] = tokens * np.inf
    assert not np.isfinite(trainee.step(np.arange(4), 0.02)[0])
    trainee.anchor.weights["model.norm.weight"] = tokens
    trainee.anchor.restore()
    after = state_of(trainee)
    for name in before:
        assert np.array_equal(before[name], after[name]), name
    again.number += 1  # the step counts
    assert trainee.step(np.arange(4, 8), 0.02) == again.step(np.arange(4, 8), 0.02)
