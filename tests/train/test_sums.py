"""Sums of a gradient have one order on every device: no operation of a step adds several rows to a
place by itself, which Metal and CUDA do in the order in which their threads come."""

import math
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.budget.resident import machine_bytes
from tests.helpers.graphs import launches, traced
from tests.helpers.loop_runs import EOT, MEMORY, make_model, sequences
from train.ranks import ALONE
from train.recipe.recipe import TrainerConfig
from train.step.candidates import counting_of
from train.step.gradient import BatchGradient
from train.step.sums import blocks_of, embeddings_of

INDEX = [2, 0, 2, 2, 1, 2, 0]  # of three or more rows that meet, the order shows


def gradient_of(gather, table: mx.array, index: mx.array, cotangent: mx.array) -> mx.array:
    return mx.vjp(lambda table: gather(table, index), [table], [cotangent])[1][0]


@pytest.mark.parametrize("gather", [blocks_of, embeddings_of])
def test_a_gradient_is_the_sum_in_the_order_of_the_rows(gather):
    rng = np.random.default_rng(0)
    slopes = rng.standard_normal((len(INDEX), 5, 4), np.float32)
    table, index = mx.array(rng.standard_normal((3, 5, 4), np.float32)), mx.array(INDEX)
    assert mx.array_equal(gather(table, index), table[index])
    wanted = np.zeros((3, 5, 4), np.float32)
    for row, slope in zip(INDEX, slopes, strict=True):
        wanted[row] += slope
    assert np.array_equal(gradient_of(gather, table, index, mx.array(slopes)), wanted)


def test_no_two_rows_of_blocks_are_added_at_once():
    table, index, slopes = mx.zeros((3, 5, 4)), mx.array(INDEX), mx.zeros((len(INDEX), 5, 4))
    steps = traced(partial(gradient_of, blocks_of), table, index, slopes)
    sums = [step for step in steps if step.name == "Scatter"]
    assert len(sums) == len(INDEX)
    assert all(math.prod(step.inputs[1]) == 1 for step in sums)


@pytest.mark.parametrize("trained", [False, True])
def test_a_step_adds_its_rows_so(trained):
    """Counted in its graph: one sum for each sequence and level, and that of embeddings."""
    model = make_model()
    if not trained:
        model.freeze()
    mx.disable_compile()
    try:
        slot, weights = attach_memory(model, MEMORY), {"anchor": {}, "blocks": []}
        gradient = BatchGradient(model, slot, EOT, TrainerConfig(batch_size=4), ALONE)
        if trained:
            weights["anchor"] = {"model.embed_tokens.weight": model.model.embed_tokens.weight}
        weights["blocks"] = [mx.zeros((2, *MEMORY.block_shape(level))) for level in (1, 2)]
        batch, index = sequences()[0][:4].astype(np.int32), mx.array([0, 1, 1, 1])
        counting = counting_of(batch, batch[:, 1:] != EOT, gradient.chunk, None)
        given = ([index, index], mx.array(batch), counting, mx.array(1.0))
        _, found = gradient._part(weights, *given)
        by_blocks = launches(*found["blocks"])["Scatter Sum"]
        assert by_blocks == 2 * 4 + (not trained)  # of places that count, each there once
        by_all = launches(*found["blocks"], *found["anchor"].values())["Scatter Sum"]
        assert by_all == 2 * 4 + 1
    finally:
        mx.enable_compile()


def test_training_limits_what_mlx_keeps_of_freed_buffers():
    """On Metal the limit is half as much again as the GPU should use: steps of many lengths took
    all memory before one buffer was let go of."""
    for before, wanted in ((1 << 50, machine_bytes() // 8), (1 << 20, 1 << 20)):
        mx.set_cache_limit(before)
        BatchGradient(make_model(), None, EOT, TrainerConfig(), ALONE)
        assert mx.set_cache_limit(0) == wanted
