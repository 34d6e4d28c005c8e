"""The loss of packed documents: that of the documents alone, and padding does not count; sequences
of several lengths give the gradient that each of them gives by itself."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.openlm import Model
from mlx_hmem.memory import initial_block, join_blocks
from tests.helpers.loop_runs import EOT, MEMORY, VOCABULARY, make_model
from train.ranks import ALONE
from train.recipe.recipe import TrainerConfig
from train.step.gradient import ALIKE, SHAPES, BatchGradient, Ragged, fitting_parts, packed_mask
from train.step.loss import masked_loss


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


@pytest.mark.parametrize("at_once", [1, 64, 10_000])
def test_sequences_of_several_lengths_give_what_each_gives_by_itself(at_once):
    """A token of the text that is EOT counts, what is given and the padding behind do not."""
    model, rng = make_model(), np.random.default_rng(2)
    model.freeze()
    lengths, given = np.array([70, 33, 33, 9, 2]), np.array([1, 20, 1, 8, 1])
    tokens = np.full((5, 97), EOT, np.uint16)
    for row, length in zip(tokens, lengths, strict=True):
        row[1:length] = rng.integers(1, VOCABULARY, length - 1)
    tokens[0, 30] = tokens[2, 32] = EOT
    slot, paths = attach_memory(model, MEMORY), np.array([[0, 1], [0, 2], [0, 1], [1, 4], [0, 0]])
    unique = [np.unique(paths[:, level], return_inverse=True) for level in (0, 1)]
    blocks = [
        mx.array(np.stack([initial_block(MEMORY, r, rng) + 0.1 for _ in clusters]))
        for (clusters, _), r in zip(unique, MEMORY.r, strict=True)
    ]
    training = TrainerConfig(batch_size=1, document_mask=False, grad_clip=1e9)
    gradient = BatchGradient(model, slot, EOT, training, ALONE)
    indices = [index for _, index in unique]
    ragged = Ragged(given, lengths, at_once)
    value, _, slopes = gradient({"anchor": {}, "blocks": blocks}, tokens, indices, (), ragged)

    def total(blocks: list[mx.array]) -> mx.array:
        losses = []
        for i, (row, length) in enumerate(zip(tokens, lengths, strict=True)):
            ids = mx.array(row[:length].astype(np.int32))[None]
            own = [b[mx.array([int(index[i])])] for b, index in zip(blocks, indices, strict=True)]
            with slot.using(join_blocks(own, MEMORY)):
                logits = model(ids[:, :-1])
            each = nn.losses.cross_entropy(logits, ids[:, 1:], reduction="none")[0]
            losses.append(each[given[i] - 1 :].sum())
        return sum(losses) / int((lengths - given).sum())

    wanted, wanted_slopes = mx.value_and_grad(total)(blocks)
    assert value == pytest.approx(wanted.item(), rel=1e-5)
    for found, own in zip(slopes["blocks"], wanted_slopes, strict=True):
        assert mx.abs(found - own).max().item() < 1e-6
    own = [b[mx.array(index)] for b, index in zip(blocks, indices, strict=True)]
    with slot.using(join_blocks(own, MEMORY)):
        said = np.array(model(mx.array(tokens[:, :-1].astype(np.int32))).argmax(-1))
    places = np.arange(1, 97)
    counts = (places >= given[:, None]) & (places < lengths[:, None])
    assert np.array_equal(gradient.likeliest, (said == tokens[:, 1:]) & counts)


def test_a_part_is_of_nearly_one_length_and_of_no_more_tokens_than_it_may():
    lengths = np.sort(np.random.default_rng(0).integers(2, 200, 50))[::-1]
    parts = fitting_parts(lengths, 384)
    assert [row for rows, _ in parts for row in range(rows.start, rows.stop)] == [*range(50)]
    for rows, length in parts:
        own = lengths[rows]
        assert own[0] - 1 <= length < own[0] - 1 + SHAPES
        alike = own[-1] >= min(ALIKE * length, own[0])
        assert len(own) == 1 or (alike and len(own) * length <= 384)
    assert len(parts) < 40


def test_short_sequences_of_one_length_are_one_part():
    """Padding may be more than a quarter of them: an answer behind a title of one word has eleven
    tokens."""
    for length in (*range(2, 34), 100):
        parts = fitting_parts(np.full(3, length), 384)
        assert [rows for rows, _ in parts] == [slice(0, 3)], length
