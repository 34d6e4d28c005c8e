"""The loss of packed documents: that of the documents alone, and padding does not count."""

import itertools

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.openlm import Model
from tests.helpers.loop_runs import EOT, VOCABULARY, make_model
from train.step.gradient import packed_mask
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
