"""The report stage: recall by frequency and held-out perplexity of every arm, side by side."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from mlx_hmem.evaluate import Perplexity, perplexity, read_facts, read_texts, recall
from mlx_hmem.evaluate.facts import FactRecall
from mlx_hmem.evaluate.tables import perplexity_table, recall_table
from mlx_hmem.files import write_atomic
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel

from .export import copy_anchor
from .recipe.recipe import Recipe, TrainerConfig


def dense_model(folder: Path) -> MemoryModel:
    target = folder / "report" / "dense"
    shutil.rmtree(target, ignore_errors=True)
    copy_anchor(folder / "dense", folder / "tokenizer", target)
    return load(target)


def _length(training: TrainerConfig | None) -> str:
    if training is None:
        return "0 passes"
    return f"{training.epochs:g} passes" if training.steps is None else f"{training.steps} steps"


def passes(recipe: Recipe) -> str:
    """What the columns of the recall table count."""
    text = "N×: statements of a fact in one pass over the text; "
    if recipe.anchor.path is not None:
        text += f"the anchor began as {recipe.anchor.path} and was trained for "
    else:
        text += "the anchor was trained for "
    text += _length(recipe.anchor.training)
    if recipe.anchor_only:
        return text
    text += f", then fetched and generic {_length(recipe.memories.training)}"
    if recipe.dense is not None:
        text += f", dense {_length(recipe.dense.training)}"
    if recipe.memories.cotrain is not None:
        text += "; anchor, generic and fetched memory were trained together"
    return text


def run_report(recipe: Recipe, folder: Path) -> None:
    """Writes ``report/``: report.txt, the tables, and results.json, the figures behind them."""
    facts = read_facts(folder / "corpus" / "facts.jsonl")
    texts = read_texts(folder / "corpus" / "held_out.jsonl")
    model = load(folder / "model")
    arms = [("anchor alone", model, "none")]
    if not recipe.anchor_only:
        if recipe.dense is not None:
            arms.append(("dense, trained on", dense_model(folder), "none"))
        arms += [("generic", model, "generic"), ("fetched", model, "fetched")]
    recalls: list[FactRecall] = []
    scores: list[Perplexity] = []
    for name, arm, memory in arms:
        if facts:
            recalls.append(replace(recall(arm, facts, memory), memory=name))
        if texts:
            scores.append(replace(perplexity(arm, texts, memory), memory=name))
    tables = [f"{recall_table(recalls)}\n{passes(recipe)}"] if recalls else []
    tables += [perplexity_table(scores)] if scores else []
    results = {
        "recall": [r.to_dict() for r in recalls],
        "perplexity": [p.to_dict() for p in scores],
    }
    out = folder / "report"
    write_atomic(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomic(out / "report.txt", "\n\n".join(tables) + "\n")
    print("\n\n".join(tables))
    print(f"report: {out / 'report.txt'} and {out / 'results.json'}")
