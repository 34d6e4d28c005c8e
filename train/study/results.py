"""What a run of a study is measured by: recall of facts and perplexity of held-out text.

Facts and documents are dealt into two halves: ``validation``, which learning rates are chosen by,
and ``test``, which tables show. Facts of one kind, stated equally often, go to the halves in turn,
documents as well. Every figure is kept in a file of its own, so that a stopped study goes on.

* ``none``, ``generic``, ``fetched``: the memory; facts route by their prompt, text by the document
* ``dense``: the anchor as it was trained on without memory
* ``oracle``: each fact routes by a document that states it; ``random``: to any leaf
* ``first_sentence``: the text routes by the first sentence of each window
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_hmem.evaluate import Fact, read_facts, read_texts, recall
from mlx_hmem.evaluate.perplexity import document_losses, summed
from mlx_hmem.files import write_atomic
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.reading import read_json

from ..corpus.facts import documents_of_facts
from ..cost.costs import anchor_parameters
from ..export import run_export
from ..recipe.recipe import Recipe
from ..report import dense_model
from .file import FETCHED

VERSION = 1  # of what is measured and how: results of another one are made anew
HALVES = ("validation", "test")
NO_TEXT, NO_FACTS = ("oracle", "random"), ("first_sentence",)


def halves_of(facts: Sequence[Fact]) -> list[int]:
    """The half of each fact, 0 or 1: in turn among those of one kind stated equally often."""
    seen: Counter[tuple[str, int]] = Counter()
    halves = []
    for fact in facts:
        halves.append(seen[fact.kind, fact.times] % 2)
        seen[fact.kind, fact.times] += 1
    return halves


def results_file(run: Path, measure: str) -> Path:
    return run / "results" / f"{measure}.json"


def read_results(run: Path, measure: str) -> dict[str, Any] | None:
    path = results_file(run, measure)
    results = read_json(path) if path.exists() else {}
    return results if results.get("version") == VERSION else None


def chosen_by(results: dict[str, Any], choose_by: str) -> float:
    """The figure that a learning rate is chosen by, the greater the better: the validation half's
    recall over all facts, or its perplexity with a minus."""
    found = results[choose_by]["validation"]
    if choose_by == "perplexity":
        return -float(found["per_token"])
    return sum(b["right"] for b in found) / sum(b["total"] for b in found)


def measure_run(recipe: Recipe, run: Path, measures: Sequence[str]) -> None:
    """Writes ``results/MEASURE.json`` of each measure that has none yet."""
    missing = [m for m in measures if read_results(run, m) is None]
    if not missing:
        return
    facts = read_facts(run / "corpus" / "facts.jsonl")
    texts = read_texts(run / "corpus" / "held_out.jsonl")
    model = None
    for measure in missing:
        if measure == "dense":
            scored = dense_model(run)
        else:
            model = scored = model or exported(recipe, run, measures)
        values: dict[str, Any] = {"version": VERSION, "measure": measure}
        values |= sizes_of(recipe, measure)
        if facts and measure not in NO_FACTS:
            values["recall"] = _recall(scored, facts, measure, run, recipe.seed)
        if texts and measure not in NO_TEXT:
            values["perplexity"] = _perplexity(scored, texts, measure)
        write_atomic(results_file(run, measure), json.dumps(values, indent=1) + "\n")


def memories_of(recipe: Recipe, measures: Sequence[str]) -> list[str]:
    """The stages among ``memories`` and ``generic`` that ``measures`` need, and those that an
    anchor trained along with them needs."""
    if recipe.anchor_only:
        return []
    if recipe.memories.cotrain is not None:
        return ["memories"]
    needed = [("memories", FETCHED), ("generic", ("generic",))]
    return [name for name, of in needed if any(m in of for m in measures)]


def exported(recipe: Recipe, run: Path, measures: Sequence[str]) -> MemoryModel:
    """The model of the run, with the memories that were trained."""
    trained = memories_of(recipe, measures)
    if not trained:
        recipe = replace(recipe, anchor_only=True)
    elif recipe.memories.cotrain is not None:
        trained = ["memories", "generic"]
    run_export(recipe, run, trained)
    return load(run / "model")


def sizes_of(recipe: Recipe, measure: str) -> dict[str, int]:
    """Parameters of what is measured: the anchor, one fetched memory, the bank."""
    config = recipe.memory_config
    return {
        "anchor_parameters": anchor_parameters(recipe),
        "fetched_parameters": 0 if _memory(measure) == "none" else config.fetched_parameters,
        "bank_parameters": config.bank_parameters if measure in FETCHED else 0,
    }


def _memory(measure: str) -> str:
    return "fetched" if measure in FETCHED else "generic" if measure == "generic" else "none"


def _recall(
    model: MemoryModel, facts: list[Fact], measure: str, run: Path, seed: int
) -> dict[str, Any]:
    """Recall of each half by the times that a fact was stated."""
    route: dict[str, Any] = {}
    if measure == "random":
        route = {"route": "random", "seed": seed}
    elif measure == "oracle":
        with (run / "corpus" / "train.jsonl").open(encoding="utf-8") as lines:
            route = {"routed_by": documents_of_facts(facts, map(json.loads, lines))}
    found = recall(model, facts, _memory(measure), **route)
    total, right = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    for fact, is_right, half in zip(facts, found.right, halves_of(facts), strict=True):
        total[half, fact.times] += 1
        right[half, fact.times] += bool(is_right)
    result: dict[str, Any] = {half: [] for half in HALVES}
    for (half, times), count in sorted(total.items()):
        bucket = {"times": times, "right": right[half, times], "total": count}
        result[HALVES[half]].append(bucket)
    return result


def _perplexity(model: MemoryModel, texts: list[str], measure: str) -> dict[str, Any]:
    """Perplexity of each half of the documents; of the test half each document's losses too."""
    memory = _memory(measure)
    route_by = "first_sentence" if measure == "first_sentence" else "document"
    result: dict[str, Any] = {}
    for number, half in enumerate(HALVES):
        losses = document_losses(model, texts[number::2], memory, route_by=route_by)
        result[half] = summed(losses, memory, route_by).to_dict()
    result["documents"] = {"nats": losses.nats.round(4).tolist(), "tokens": losses.tokens.tolist()}
    return result
