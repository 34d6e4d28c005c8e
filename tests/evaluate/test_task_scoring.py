"""Rows in batches, each with its own memory, give what each gives alone."""

from itertools import chain

import pytest

from mlx_hmem.evaluate.scoring import Candidate, continue_greedily, score_candidates
from mlx_hmem.model.model import MemoryModel
from tests.helpers.bigram import SKY, make_tokenizer
from tests.helpers.task_helpers import alone, greedy_alone, leaf_paths, some_questions
from tests.helpers.tiny_anchors import make_anchor


@pytest.mark.parametrize("memory", ["none", "generic", "fetched"])
@pytest.mark.parametrize("tokens_per_batch", [1, 300, 10_000])
def test_scores_in_batches_are_those_of_each_candidate_alone(model, memory, tokens_per_batch):
    questions = some_questions(400)
    paths = None
    if memory == "fetched":
        paths = leaf_paths(len(questions))
    seen = []
    for batch in score_candidates(model, questions, memory, paths, tokens_per_batch):
        for index, scores in batch:
            seen.append(index)
            assert len(scores) == len(questions[index])
            for score, candidate in zip(scores, questions[index], strict=True):
                path = paths[index] if paths else None
                nats, greedy = alone(model, candidate, memory, path)
                assert score.nats == pytest.approx(nats, rel=2e-4, abs=1e-4)
                assert score.greedy == greedy
                assert score.tokens == len(candidate.answer)
    assert sorted(seen) == list(range(len(questions)))


def test_equal_candidates_get_equal_scores(model):
    twins = [Candidate([5, 6, 7], [8, 9]), Candidate([5], [6]), Candidate([5, 6, 7], [8, 9])]
    ((_, scores),) = next(score_candidates(model, [twins], "none"))
    assert scores[0] == scores[2]


@pytest.mark.parametrize("name", ["gemma3_text", "llama", "gpt2", "qwen2"])
def test_scores_and_continuations_of_other_anchors(name):
    """Sliding windows, too: their cache drops what the prompt has passed."""
    anchor = make_anchor(name)
    if name == "gemma3_text":
        anchor.args.sliding_window = anchor.model.window_size = 8
    model = MemoryModel(anchor, {}, make_tokenizer(SKY))
    questions = some_questions(64, seed=1)
    for batch in score_candidates(model, questions, "none", None, 400):
        for index, scores in batch:
            for score, candidate in zip(scores, questions[index], strict=True):
                assert score.nats == pytest.approx(alone(model, candidate, "none", None)[0], 1e-3)
    prompts = [q[0].context for q in questions]
    together = dict(chain(*continue_greedily(model, prompts, 5, "none", None, 400)))
    for i, prompt in enumerate(prompts):
        assert together[i] == greedy_alone(model, prompt, 5, "none", None)


@pytest.mark.parametrize("memory", ["none", "generic", "fetched"])
def test_continuations_in_batches_are_those_of_each_prompt_alone(model, memory):
    prompts = [question[0].context for question in some_questions(400)[:20]]
    paths = leaf_paths(len(prompts)) if memory == "fetched" else None
    for budget in (1, 200, 10_000):
        found = dict(chain(*continue_greedily(model, prompts, 7, memory, paths, budget)))
        for i, prompt in enumerate(prompts):
            path = paths[i] if paths else None
            assert found[i] == greedy_alone(model, prompt, 7, memory, path)
