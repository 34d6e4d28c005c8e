"""Some tokens in place of a large vocabulary: the head's own logits, and on average its loss."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_hmem.anchors.architectures import ARCHITECTURES, head_of
from tests.helpers.tiny_anchors import HIDDEN, VOCAB, make_anchor
from train.step import candidates as module
from train.step.candidates import Candidates, candidates_for
from train.step.loss import chunked_loss


def is_head(path: str, _: nn.Module) -> bool:
    return path.endswith(("wte", "embed_tokens", "lm_head"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_some_outputs_of_a_head_are_those_of_the_whole(name):
    anchor, tokens = make_anchor(name), mx.array([3, 5, 60])
    hidden = mx.random.normal((2, 7, HIDDEN))
    for bits in (None, 8, 4):
        if bits is not None:
            anchor = make_anchor(name)
            nn.quantize(anchor, 32, bits, class_predicate=is_head)
        whole = head_of(anchor)(hidden)[..., tokens]
        assert mx.abs(head_of(anchor, tokens)(hidden) - whole).max().item() < 1e-5


def test_a_head_with_a_bias_and_one_whose_scales_have_no_biases():
    anchor, tokens = make_anchor("llama"), mx.array([3, 5, 60])
    hidden = mx.random.normal((2, 7, HIDDEN))
    anchor.lm_head = nn.Linear(HIDDEN, VOCAB)
    for mode in (None, "mxfp4"):
        if mode is not None:
            anchor.lm_head = anchor.lm_head.to_quantized(32, 4, mode)
        whole = head_of(anchor)(hidden)[..., tokens]
        assert mx.abs(head_of(anchor, tokens)(hidden) - whole).max().item() < 1e-5


def test_all_tokens_drawn_are_the_whole_vocabulary():
    head, rng = head_of(make_anchor("llama")), np.random.default_rng(0)
    hidden, targets = mx.random.normal((1, 6, HIDDEN)), rng.integers(0, VOCAB // 2, 6)
    drawn = Candidates(np.arange(VOCAB // 2), np.arange(VOCAB // 2, VOCAB)).draw(rng)
    assert drawn.tokens.tolist() == [*range(VOCAB)]
    places, count = mx.arange(6), mx.array(6)

    def loss(hidden: mx.array, some: bool) -> tuple[mx.array, mx.array]:
        if not some:
            return chunked_loss(hidden, mx.array(targets), places, count, head, 4)
        named, own = mx.array(drawn.places(targets)), head_of(make_anchor("llama"), tokens)
        return chunked_loss(hidden, named, places, count, own, 4, mx.array(drawn.weights))

    tokens = mx.array(drawn.tokens)
    (whole, right), slope = mx.value_and_grad(loss)(hidden, False)
    (found, same), other = mx.value_and_grad(loss)(hidden, True)
    assert found.item() == pytest.approx(whole.item(), rel=1e-6)
    assert mx.abs(slope - other).max().item() < 1e-6
    assert mx.array_equal(right, same)


def test_the_sum_of_exponentials_is_right_on_average_and_a_step_is_drawn_as_before():
    logits = np.random.default_rng(1).normal(0, 2, VOCAB)
    candidates = Candidates(np.arange(16), np.arange(16, VOCAB))
    draws = [candidates.draw(np.random.default_rng([7, step])) for step in range(4000)]
    sums = [np.exp(logits[d.tokens] + d.weights).sum() for d in draws]
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - np.exp(logits).sum()) < 4 * error
    assert all((np.diff(d.tokens) > 0).all() and len(d.tokens) == 32 for d in draws)
    assert all(np.isin(np.arange(16), d.tokens).all() for d in draws)
    again = candidates.draw(np.random.default_rng([7, 3]))
    assert again.tokens.tolist() == draws[3].tokens.tolist() != draws[4].tokens.tolist()


def test_a_small_vocabulary_is_looked_at_whole_and_of_a_large_one_what_the_anchor_expects(
    monkeypatch,
):
    anchor = make_anchor("llama")
    text = [np.random.default_rng(n).integers(1, 9, n).astype(np.uint32) for n in (25, 15)]
    assert candidates_for(anchor, text, text[0]) is None
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "FEWEST", 32)
    targets = np.array([2, 2, 40])
    found = candidates_for(anchor, text, targets)
    assert found is not None
    assert len(found.certain) == 16
    assert np.union1d(found.certain, found.others).tolist() == [*range(VOCAB)]
    logits = [anchor(mx.array(text[n].astype(np.int32))[None, :-1])[0] for n in range(2)]
    behind = np.concatenate([np.array(own.max(-1, keepdims=True) - own) for own in logits])
    nearest = [token for token in behind.min(0).argsort(kind="stable") if token not in (2, 40)]
    assert set(found.certain.tolist()) == {2, 40, *nearest[:14]}
