"""The adapter gives EleutherAI's lm-evaluation-harness what plain loops over the model give."""

import json

import pytest

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.scoring import Candidate
from mlx_hmem.model.model import MemoryModel
from tests.helpers.programs import refused
from tests.helpers.task_helpers import alone, greedy_alone

lm_eval_instance = pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed")

from mlx_hmem.evaluate.tasks.harness import MemoryLM  # noqa: E402


def requests(kind: str, arguments: list[tuple]) -> list:
    make = lm_eval_instance.Instance
    return [make(kind, {}, args, i, ("t", i, 1)) for i, args in enumerate(arguments)]


@pytest.mark.parametrize("memory", ["none", "generic", "fetched"])
def test_log_likelihoods_are_those_of_each_text_alone(model: MemoryModel, texts, memory):
    lm = MemoryLM(model, memory)
    tokenizer = model.tokenizer
    pairs = [(f"{t[60:90]}\n\n{t[:30]}", t[30:cut]) for t in texts[:6] for cut in (36, 44)]
    pairs += [(t[:200] + " ", t[200:210]) for t in texts[:3]]  # too long, a space at the border
    pairs += [("", texts[0][:20])]
    found = lm.loglikelihood(requests("loglikelihood", pairs))
    for (context, answer), (log_probability, greedy) in zip(pairs, found, strict=True):
        before = tokenizer.encode(context.rstrip())
        after = tokenizer.encode(context + answer)[len(before) :]
        candidate = Candidate(before[-(96 - len(after)) :], after)
        routed = context.split("\n\n")[-1].strip() or answer
        path = model.retriever.route(routed) if memory == "fetched" else None
        nats, likeliest = alone(model, candidate, memory, path)
        assert log_probability == pytest.approx(-nats, rel=2e-4)
        assert greedy == likeliest


def test_a_rolling_text_is_scored_once_each_token(model: MemoryModel, texts):
    lm = MemoryLM(model, "fetched", max_length=40)
    some = [" ".join(texts[i : i + 3]) for i in range(0, 9, 3)] + [texts[0][:20]]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(t,) for t in some]))
    for text, total in zip(some, found, strict=True):
        start, *ids = model.tokenizer.encode(text)
        path, expected = model.retriever.route(text), 0.0
        for i in range(0, len(ids), 40):
            # Disjoint windows; the last reaches back for its context.
            part = ids[i : i + 40]
            before = [start] if i == 0 else ids[max(0, i + len(part) - 41) : i]
            expected += alone(model, Candidate(before, part), "fetched", path)[0]
        assert total == pytest.approx(-expected, rel=2e-4)


def test_text_is_generated_up_to_its_stops(model: MemoryModel, texts):
    lm = MemoryLM(model, "fetched")
    contexts = [t[: 20 + i] for i, t in enumerate(texts[:8])]
    options = {"until": ["\n\n"], "max_gen_toks": 40, "do_sample": False}
    whole = lm.generate_until(requests("generate_until", [(c, options) for c in contexts]))
    for context, text in zip(contexts, whole, strict=True):
        path, prompt = model.retriever.route(context), model.tokenizer.encode(context)
        ids = greedy_alone(model, prompt, 40, "fetched", path)
        assert text == model.tokenizer.decode(ids).split("\n\n")[0]
    stop = whole[0][10:13]
    options = {"until": [stop, "never said"], "max_gen_toks": 40}
    short = lm.generate_until(requests("generate_until", [(c, options) for c in contexts]))
    assert short == [text.split(stop)[0] for text in whole]
    assert short[0] != whole[0]
    with pytest.raises(UserError, match="does not sample"):
        lm.generate_until(requests("generate_until", [("a", {"do_sample": True})]))


def test_what_routes_can_be_the_whole_context(model: MemoryModel, texts):
    pairs = [
        (f"{a[:60]}\n\n{b[:40].strip()}", b[40:60])
        for a, b in zip(texts, texts[9:19], strict=False)
    ]
    route = model.retriever.route
    assert any(route(context) != route(context.split("\n\n")[1]) for context, _ in pairs)
    found = MemoryLM(model, route_by="context").loglikelihood(requests("loglikelihood", pairs))
    for (context, answer), (log_probability, _) in zip(pairs, found, strict=True):
        before = model.tokenizer.encode(context)
        after = model.tokenizer.encode(context + answer)[len(before) :]
        nats, _ = alone(model, Candidate(before, after), "fetched", route(context))
        assert log_probability == pytest.approx(-nats, rel=2e-4)
    refused("route_by", MemoryLM, model, route_by="title")


def test_the_harness_itself_runs_a_task(model_folder, tmp_path, texts):
    """From the harness's registry, by name, on a task of its own kind read from a file."""
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")
    rows = [{"q": t[:30], "choices": [t[30:40], t[40:50]], "gold": i % 2} for i, t in
            enumerate(texts[:12])]  # fmt: skip
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "own", "dataset_path": "json", "test_split": "test", "num_fewshot": 2,
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")},
                           "cache_dir": str(tmp_path / "cache")},
        "fewshot_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{gold}}",
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        model="mlx_hmem", model_args={"model": str(model_folder)}, tasks=[task], bootstrap_iters=0
    )
    assert 0 <= found["results"]["own"]["acc,none"] <= 1
    assert len(found["samples"]["own"]) == 12
