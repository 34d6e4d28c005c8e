"""What sampling leaves out is what mlx-lm's leaves out; a row's random numbers are its own."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

from mlx_hmem.server.asked import Asked
from mlx_hmem.server.row import Sampling, options_of


@pytest.mark.parametrize(
    "fields",
    [
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"top_k": 3},
        {"top_p": 0.9, "min_p": 0.02, "top_k": 7},
        {"top_p": 1e-9},
        {"top_k": 1 << 20},
    ],
)
def test_the_tokens_that_are_left_are_those_of_mlx_lm(fields):
    mx.random.seed(1)
    logits = mx.random.normal((1, 50)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    wanted = logprobs
    if "top_p" in fields:
        wanted = apply_top_p(wanted, fields["top_p"])
    if "min_p" in fields:
        wanted = apply_min_p(wanted, fields["min_p"])
    if fields.get("top_k", 50) < 50:
        wanted = apply_top_k(wanted, fields["top_k"])
    found = Sampling(Asked(temperature=1.0, seed=0, **fields), 0).likely(logprobs)
    assert np.array_equal(np.array(found), np.array(wanted))


def test_each_answer_has_its_own_numbers_and_the_same_seed_gives_them_again():
    logprobs = mx.zeros((1, 1000))

    def tokens(seed, number):
        sampling = Sampling(Asked(temperature=1.0, seed=seed), number)
        return [sampling(logprobs).item() for _ in range(8)]

    assert tokens(1, 0) == tokens(1, 0)
    assert len({tuple(tokens(1, number)) for number in range(4)}) == 4
    assert tokens(None, 0) != tokens(None, 0)


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-39, 1e-19])
def test_a_temperature_that_float32_does_not_have_is_greedy(temperature):
    (sampler,) = options_of(Asked(temperature=temperature, seed=0), 0, [])["samplers"]
    logprobs = mx.log(mx.array([[0.2, 0.5, 0.3]]))
    assert sampler is None or sampler(logprobs).item() == 1  # None: the batch's, which is greedy
