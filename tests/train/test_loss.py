"""The loss in chunks and its gradient are those of whole logits, for the head of every anchor."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.architectures import ARCHITECTURES, head_of
from tests.helpers.tiny_anchors import VOCAB, make_anchor
from train.padding import counted
from train.step.loss import chunked_loss, counted_places, summed_loss

EOT = 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_in_chunks_and_its_gradient_are_those_of_whole_logits(name):
    anchor, rng = make_anchor(name), np.random.default_rng(0)
    tokens = rng.integers(1, VOCAB, (2, 9)).astype(np.int32)
    tokens[0, 5:] = EOT  # the first of them ends a document, the others are padding
    batch, head = mx.array(tokens), head_of(anchor)
    hidden = anchor.model(batch[:, :-1])
    assert mx.array_equal(head(hidden), anchor(batch[:, :-1]))
    value, gradient = mx.value_and_grad(lambda h: 3 * summed_loss(head(h), batch, EOT))(hidden)
    for chunk in (3, 5, 100):  # some filled up, some not whole, one that holds all
        places, count = counted_places(counted(tokens, EOT), chunk)
        assert count == 13
        targets = batch[:, 1:].reshape(-1)[mx.array(places)]
        given = (targets, mx.array(places), mx.array(count), head, chunk)
        step = mx.compile(mx.value_and_grad(lambda h, given=given: 3 * chunked_loss(h, *given)[0]))
        found, slope = step(hidden)
        assert found.item() == pytest.approx(value.item(), rel=1e-6)
        assert mx.abs(slope - gradient).max().item() < 1e-6


def test_logits_are_not_there_at_once():
    vocabulary, width, chunk, chunks = 1 << 14, 8, 16, 32
    weight = mx.random.normal((vocabulary, width))
    hidden = mx.random.normal((1, chunk * chunks, width))
    tokens = np.ones((1, chunk * chunks + 1), np.int32)
    places, count = counted_places(counted(tokens, EOT), chunk)
    targets = mx.ones(len(places), mx.int32)
    given = (targets, mx.array(places), mx.array(count), lambda h: h @ weight.T, chunk)
    step = mx.compile(mx.value_and_grad(lambda h: chunked_loss(h, *given)[0]))
    mx.eval(hidden, weight)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(step(hidden))
    # MLX makes room for ten operations ahead, so a few chunks' at a time, of 32.
    assert mx.get_peak_memory() - before < 16 * 4 * chunk * vocabulary


def test_places_beyond_those_that_count_are_filled_to_whole_chunks():
    places, count = counted_places(np.array([[True, True, True, False, False]]), 2)
    assert (places.tolist(), count) == ([0, 1, 2, 0], 3)
    assert counted_places(np.full((1, 4), False), 2)[1] == 0
