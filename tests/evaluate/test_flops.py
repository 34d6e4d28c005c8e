"""FLOPs and their parts, by hand and by watching what is called."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.evaluate.rag.flops import Flops, Work, parameters_per_token, question_work
from mlx_hmem.evaluate.scoring import Candidate, score_candidates
from mlx_hmem.model.stream import AnchorWithMemory
from tests.helpers.programs import refused
from tests.helpers.tiny_anchors import GATED, UNGATED, make_anchor


def test_flops_are_those_worked_out_by_hand(model):
    """Of conftest's anchor: 2 layers, hidden 16, inner 32, 2 heads of 8, 400 tokens, own head."""
    layer = 4 * 16 * 16 + 2 * 16 + 3 * 16 * 32 + 2 * 16  # attention, its norms, FFN, layer norms
    anchor = 2 * layer + 16 + 16 * 400  # the last norm and the head, not the embedding
    flops = Flops(model)
    assert (flops.anchor_parameters, anchor) == (anchor, 11_664)
    assert flops.memory_parameters == 3 * (4 + 0 + 2) * 2 * 16 == 576
    work = Work.of(3, before=5)
    assert work == Work(3, 6 + 7 + 8)
    # 2 · P · n, and of each pair 4 · 16 numbers in each of two layers
    assert flops.of(work, "none") == 2 * 11_664 * 3 + 4 * 2 * 16 * 21 == 72_672
    assert flops.of(work, "generic") == flops.of(work, "fetched") == 72_672 + 2 * 576 * 3


def multiplications(anchor, ids) -> int:
    """Of all matrices while the anchor reads ``ids``, counted as they are called."""
    count = 0
    linear, as_linear = nn.Linear.__call__, nn.Embedding.as_linear

    def seen(self, x, before):
        nonlocal count
        count += x.size // x.shape[-1] * self.weight.size
        return before(self, x)

    nn.Linear.__call__ = lambda self, x: seen(self, x, linear)
    nn.Embedding.as_linear = lambda self, x: seen(self, x, as_linear)
    try:
        mx.eval(anchor(mx.array([ids])))
    finally:
        nn.Linear.__call__, nn.Embedding.as_linear = linear, as_linear
    return count


@pytest.mark.parametrize("name", [*GATED, *UNGATED])
def test_parameters_per_token_are_those_that_a_call_multiplies_by(name):
    anchor = make_anchor(name)
    vectors = sum(a.size for n, a in named_parameters(anchor).items() if a.ndim == 1)
    found = parameters_per_token(anchor)
    assert found - vectors == multiplications(anchor, [1, 2, 3, 4, 5]) / 5
    if name == "llama":
        nn.quantize(anchor, group_size=32, bits=4)
        assert parameters_per_token(anchor) == found


def test_of_experts_those_that_a_token_uses_are_counted():
    anchor = make_anchor("qwen3_moe")
    sizes = {name: a.size for name, a in named_parameters(anchor).items()}
    experts = sum(size for name, size in sizes.items() if "switch_mlp" in name)
    assert experts
    assert parameters_per_token(anchor, 2) == sum(sizes.values()) - experts // 2
    refused("how many experts", parameters_per_token, anchor)


def test_the_work_of_a_question_is_what_scoring_runs(model, monkeypatch):
    rng = np.random.default_rng(0)
    ids = lambda n: rng.integers(3, 399, n).tolist()  # noqa: E731
    shared = ids(20)
    questions = [
        [Candidate(shared, ids(3)), Candidate(shared, ids(3))],
        [Candidate(shared + ids(4), ids(2)), Candidate(shared + ids(4), ids(2))],
        [Candidate(ids(9), ids(4))],
    ]
    seen = []
    call = AnchorWithMemory.__call__

    def watched(self, rows, cache=None):
        length, before = rows.shape[1], int(np.max(np.array(cache[0].offset)))
        seen.append(Work(0) if not length else Work(
            rows.size, rows.shape[0] * Work.of(length, before).pairs))  # fmt: skip
        return call(self, rows, cache=cache)

    monkeypatch.setattr(AnchorWithMemory, "__call__", watched)
    for question in questions:
        seen.clear()
        list(score_candidates(model, [question], "none"))
        assert sum(seen, Work()) == question_work(question)
    assert question_work(questions[2], max_tokens=6) == Work.of(9 + 5)
