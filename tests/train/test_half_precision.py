"""Memory trained on an anchor in bfloat16 or float16: the anchor's part of a step stays in those 16
bits, what is trained, its moments and all sums over sequences in float32."""

import math
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.architectures import head_of
from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.config import MemoryConfig
from tests.helpers.dtypes import (
    BACK,
    FORWARD,
    HALVES,
    UNIT,
    as_on_metal,
    distance,
    half_anchor,
    shapes_in_other_floats,
)
from tests.helpers.graphs import leading_to
from tests.helpers.references import config_of
from tests.helpers.tiny_anchors import HIDDEN, LAYERS, VOCAB
from tests.memory.test_half_precision import CASES, TRACED
from train.ranks import ALONE
from train.recipe.recipe import TrainerConfig
from train.step.candidates import Drawn, counting_of
from train.step.gradient import BatchGradient
from train.step.loss import _of_chunk
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore

EOT, ROWS, TIME, CHUNK = 0, 2, 9, 6
TOKENS = np.random.default_rng(0).integers(1, VOCAB, (ROWS, TIME + 1)).astype(np.int32)
SOME = np.unique(np.append(TOKENS, 7)).astype(np.int32)
DRAWN = Drawn(SOME, np.log(np.full(len(SOME), 1.5, np.float32)))
both = pytest.mark.parametrize("dtype", HALVES, ids=str)


def gradient_for(
    name: str, kind: str, dtype: mx.Dtype, wide: bool = False, **changes: Any
) -> tuple[BatchGradient, MemoryConfig]:
    anchor = half_anchor(name, dtype, wide)
    anchor.freeze()
    config = config_of(anchor, kind)
    training = TrainerConfig(batch_size=ROWS, document_mask=name == "openlm", grad_clip=1e9)
    training = replace(training, **changes)
    return BatchGradient(anchor, attach_memory(anchor, config), EOT, training, ALONE), config


def blocks_for(config: MemoryConfig) -> list[mx.array]:
    """Two of each level, such numbers as either dtype holds."""
    rng = np.random.default_rng(5)
    shapes = [(2, *config.block_shape(level)) for level in (1, 3)]
    blocks = [mx.array(0.15 * rng.standard_normal(shape, np.float32)) for shape in shapes]
    return [b.astype(mx.bfloat16).astype(mx.float32) for b in blocks]


def is_of_blocks(shape: tuple[int, ...]) -> bool:
    """Trained blocks, joined or not, of each sequence or of all: they have all layers in them."""
    return LAYERS in shape[-4:-3] or (len(shape) < 5 and shape[-2:-1] == (LAYERS,))


def is_of_the_loss(shape: tuple[int, ...], vocabulary: int) -> bool:
    """Logits, a number of each place, of a chunk or all places, or of each token that is drawn."""
    of_places = shape[0] in (CHUNK, ROWS * TIME) and shape[1:] in ((), (1,), (vocabulary,))
    return of_places or shape == (len(SOME),)


@pytest.mark.parametrize(("name", "kind"), TRACED)
def test_float32_is_where_it_has_a_reason_and_nowhere_else(name, kind):
    """The graph of a step: in bfloat16 with a block for each sequence and all tokens, in float16
    with one for both and some tokens that stand for all.

    In float32 are:
    - what is trained, and sums of its gradient over sequences and parts: small steps would be lost;
    - from the logits to their gradient: a sum of exponentials over a vocabulary;
    - Gemma's residual sums in float16, which mlx-lm clips to its range.
    No matrix product is.
    """
    ways = ((None, mx.array([0, 1])), (DRAWN, mx.array(0)))
    for dtype, (drawn, index) in zip(HALVES, ways, strict=True):
        with as_on_metal():
            gradient, config = gradient_for(name, kind, dtype)
            weights = {"anchor": {}, "blocks": blocks_for(config)}
            counting = counting_of(TOKENS, TOKENS[:, 1:] != EOT, CHUNK, drawn)
            gradient.chunk = CHUNK
            mx.eval(weights["blocks"])
            given = ([index] * 2, mx.array(TOKENS), counting, mx.array(1.0))
            (loss, right), found = gradient._part(weights, *given)
            steps = leading_to(loss, right, *found["blocks"])
            assert {array.dtype for array in found["blocks"]} == {mx.float32}
            vocabulary = VOCAB if drawn is None else len(SOME)
            for own, shape, product in shapes_in_other_floats(steps, dtype):
                clipped = name == "gemma3_text" and dtype == mx.float16
                reasons = [
                    is_of_blocks(shape),
                    is_of_the_loss(shape, vocabulary),
                    clipped and shape == (ROWS, TIME, HIDDEN),
                ]
                assert (own, product) == ("float32", False), shape
                assert any(reasons), shape


@both
@pytest.mark.parametrize("drawn", [None, DRAWN], ids=["all tokens", "some"])
@pytest.mark.parametrize("name", ["openlm", "granite", "gemma3_text"])
def test_the_loss_goes_back_through_the_head_in_the_dtype_of_that(name, drawn, dtype):
    """Its own gradient, which the graph above has as MLX would make it."""
    anchor, rows = half_anchor(name, dtype), mx.ones((CHUNK, HIDDEN), dtype)
    tokens, weights = (None, None) if drawn is None else map(mx.array, drawn)
    given = (mx.zeros(CHUNK, mx.int32), mx.ones(CHUNK), head_of(anchor, tokens), weights)
    mx.eval(rows, given[:2])
    with as_on_metal():
        value, slopes, right = _of_chunk(rows, *given)
        found = shapes_in_other_floats(leading_to(value, slopes, right), dtype)
    assert slopes.dtype == dtype
    vocabulary = VOCAB if drawn is None else len(SOME)
    assert {(own, product) for own, _, product in found} == {("float32", False)}
    assert all(is_of_the_loss(shape, vocabulary) for _, shape, _ in found)


@both
def test_a_gradient_of_however_many_tokens_has_the_same_digits(dtype):
    """A mean over a million tokens is a millionth of their sum. Divided before the way back through
    the anchor, the gradient left the range of float16, whose least number is 6e-8."""
    gradient, config = gradient_for("openlm", "ffn", dtype)
    weights = {"anchor": {}, "blocks": blocks_for(config)}
    counting = counting_of(TOKENS, TOKENS[:, 1:] != EOT, gradient.chunk)
    given = ([mx.array([0, 1])] * 2, mx.array(TOKENS), counting)
    (loss, _), whole = gradient._part(weights, *given, mx.array(1.0))
    (share, _), small = gradient._part(weights, *given, mx.array(2.0**-20))
    assert share.item() == loss.item() / 2**20
    for found, own in zip(small["blocks"], whole["blocks"], strict=True):
        assert mx.abs(own).max().item() > 1e-3
        assert mx.array_equal(found, own / 2**20)


@both
def test_sequences_that_share_a_block_are_summed_in_float32(dtype):
    gradient, config = gradient_for("llama", "lora_vo", dtype)
    blocks = [mx.stack([b[0], b[0]]) for b in blocks_for(config)]
    counting = counting_of(TOKENS, TOKENS[:, 1:] != EOT, gradient.chunk)

    def found(*index: int) -> list[mx.array]:
        given = ([mx.array(index)] * 2, mx.array(TOKENS), counting, mx.array(1.0))
        return gradient._part({"anchor": {}, "blocks": blocks}, *given)[1]["blocks"]

    for shared, own in zip(found(0, 0), found(0, 1), strict=True):
        wanted = own[0] + own[1]
        assert mx.array_equal(shared[0], wanted)
        assert not mx.array_equal(wanted, wanted.astype(dtype).astype(mx.float32))


@both
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_gradient_is_as_near_to_that_of_float32_as_its_roundings(name, kind, dtype):
    found, index = [], [np.array([0, 1])] * 2
    mx.disable_compile()  # whose own time is most of a tiny step's
    try:
        for wide in (True, False):
            gradient, config = gradient_for(name, kind, dtype, wide)
            weights = {"anchor": {}, "blocks": blocks_for(config)}
            found.append(gradient(weights, TOKENS, index))
        again, _ = gradient_for(name, kind, dtype, gradient_checkpointing=True)
        recomputed = again(weights, TOKENS, index)
    finally:
        mx.enable_compile()
    (loss, _, exact), (own_loss, _, own) = found
    assert abs(own_loss / loss - 1) <= FORWARD * UNIT[dtype]
    for a, b, c in zip(own["blocks"], exact["blocks"], recomputed[2]["blocks"], strict=True):
        assert a.dtype == mx.float32
        assert distance(a, b) <= BACK * UNIT[dtype]
        assert mx.array_equal(a, c)


@both
def test_what_is_trained_keeps_steps_that_are_lost_in_half_precision(dtype, tmp_path):
    """A step moves a weight by about the learning rate, 1e-6: of weights of 0.1 that is far below
    what either dtype can tell apart."""
    config, rate, paths = config_of(half_anchor("openlm", dtype), "ffn"), 1e-6, np.zeros((ROWS, 3))
    training = TrainerConfig(batch_size=ROWS, weight_decay=0.0)
    before = {1: blocks_for(config)[0][:1], 3: blocks_for(config)[1][:1]}
    with BlockStore(tmp_path / "store", config, 0) as store:
        given = (store, TOKENS, paths.astype(int), EOT, training)
        trainee = MemoryTrainee(half_anchor("openlm", dtype), *given)
        for level, blocks in before.items():
            _, first, second, steps = store.gather(level, np.array([0]), 1)
            store.scatter(level, np.array([0]), [blocks, first, second, steps])
        for _ in range(3):
            assert math.isfinite(trainee.step(np.arange(ROWS), rate)[0])
        for level, old in before.items():
            new, first, second, steps = store.gather(level, np.array([0]), 1)
            assert {a.dtype for a in (new, first, second)} == {mx.float32}
            assert steps.tolist() == [3]
            moved, large = mx.abs(new - old), mx.abs(old) > 0.05
            assert ((moved > rate) & large).sum().item() > 0.9 * large.sum().item()
            kept = new.astype(dtype) == old.astype(dtype)
            assert (kept & large).sum().item() > 0.95 * large.sum().item()
