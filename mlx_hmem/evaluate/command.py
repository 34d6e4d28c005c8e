"""Scores a model directory: ``mlx_hmem.evaluate --model MODEL --facts F --text T``.

Prints a table of recall by how often a fact was stated, or counted in a corpus, of perplexity, and
with ``--tasks all --data FOLDER`` of accuracy on benchmark tasks, for each kind of memory asked
for; ``--block-best`` and ``--routing`` look into the memory itself. With ``--json`` it is one JSON
object on standard output. Progress goes to standard error.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_hmem.budget.resident import SIZE_HELP, parse_bytes
from mlx_hmem.errors import ArgumentParser, UserError, first_as_model, printable, run_verb
from mlx_hmem.evaluate.facts import ROUTES
from mlx_hmem.evaluate.paper.blocking import blocking
from mlx_hmem.evaluate.paper.fact_runs import FactRun
from mlx_hmem.evaluate.paper.fact_sets import FactSet, counted, fact_sets
from mlx_hmem.evaluate.paper.routing_quality import RoutingRow, document_rows, fact_rows
from mlx_hmem.evaluate.perplexity import ROUTE_BY, perplexity
from mlx_hmem.evaluate.rag.document_index import DocumentIndex
from mlx_hmem.evaluate.rag.rag import Arm, Rag, named, with_flops
from mlx_hmem.evaluate.routing import used_clusters
from mlx_hmem.evaluate.tables import (
    blocking_table,
    count_table,
    perplexity_table,
    recall_table,
    routing_table,
    task_table,
)
from mlx_hmem.evaluate.tasks.benchmark import TaskResult, averages, model_fingerprint, score_task
from mlx_hmem.evaluate.tasks.task import TaskData, load_tasks
from mlx_hmem.evaluate.texts import read_texts
from mlx_hmem.model.fetch import check_mode
from mlx_hmem.model.find import MODEL_FILES, find_model
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import load_encoder

# Programs of their own, by their first word.
VERBS = {
    "index": ("mlx_hmem.evaluate.rag.index", "makes an index of documents for --rag"),
    "harness": ("mlx_hmem.evaluate.tasks.harness", "EleutherAI's harness with this model in it"),
}


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_hmem.evaluate",
        usage="mlx_hmem.evaluate [--model MODEL] [options]",
        description="Scores a model with each kind of memory: recall of facts by how often they "
        "were stated, or counted in a corpus, perplexity of text, and accuracy on benchmark tasks."
        "\n\nPrints a table for each, with --json one JSON object; progress goes to standard "
        "error.",
        verbs=VERBS,
    )
    parser.add_argument("--model", default="demo", help="folder or Hub id (default: demo)")
    parser.add_argument("--memory", default="none,generic,fetched", help="kinds, with commas")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluate"), help="where results are kept"
    )
    parser.add_argument(
        "--limit", type=int, help="score this many facts, documents and rows of a task"
    )
    parser.add_argument("--memory-budget", metavar="BYTES", help=f"most bytes to take, {SIZE_HELP}")
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help="the longest window (default: the anchor's)"
    )
    parser.add_argument("--lazy", action="store_true", help="fetch only what is needed of the bank")
    parser.add_argument(
        "--rag",
        type=Path,
        metavar="INDEX",
        help="facts and tasks also with the nearest document of this index before each prompt",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")

    facts = parser.add_argument_group("facts")
    facts.add_argument("--facts", type=Path, help="CSV of prompt, answers, key; or JSON lines")
    facts.add_argument("--atomic-numbers", action="store_true", help="of the 118 elements")
    facts.add_argument("--corpus", type=Path, help="text in which names of facts are counted")
    facts.add_argument("--route", default="prompt", help=f"facts: one of {', '.join(ROUTES)}")
    facts.add_argument("--seed", type=int, default=0, help="of random leaves and clusters")

    text = parser.add_argument_group("text")
    text.add_argument("--text", type=Path, help="held-out documents, JSON lines or plain text")
    text.add_argument(
        "--route-by", default="window", help=f"for text: one of {', '.join(ROUTE_BY)}"
    )

    tasks = parser.add_argument_group("benchmark tasks")
    tasks.add_argument("--tasks", help="benchmark tasks, with commas, as arc_easy:3; or all")
    tasks.add_argument("--data", type=Path, help="the folder of the tasks' files")

    more = parser.add_argument_group("of the memory")
    more.add_argument(
        "--block-best",
        metavar="LEVELS",
        help="facts and tasks while the best cluster of a level is withheld: as 1,2; or all",
    )
    more.add_argument(
        "--routing", action="store_true", help="how facts and text are routed, not how they score"
    )
    more.add_argument("--encoder", help="with --routing: compare with minilm, static or a folder")
    return parser


def _check(args: Namespace) -> list[str]:
    """The kinds of memory, if the command makes sense."""
    modes = [mode.strip() for mode in args.memory.split(",")]
    facts, routing = args.facts or args.atomic_numbers, args.block_best or args.routing
    for wrong, what, value, remedy in (
        (args.route_by not in ROUTE_BY, "unknown --route-by", repr(args.route_by),
         f"use one of {ROUTE_BY}"),
        (args.route not in ROUTES, "unknown --route", repr(args.route), f"use {', '.join(ROUTES)}"),
        (args.limit is not None and args.limit < 1, "--limit is less than 1", args.limit,
         "give 1 or more, or leave it out"),
        (not (facts or args.text or args.tasks), "there is nothing to score", "no file",
         "give --facts, --atomic-numbers, --text or --tasks"),
        (args.tasks and not args.data, "--tasks needs their files", args.tasks,
         "name their folder with --data"),
        (args.corpus and not facts, "--corpus counts names of facts", args.corpus,
         "give --atomic-numbers too"),
        (args.block_best and not facts and not args.tasks, "nothing to block", args.block_best,
         "give --facts or --tasks with it"),
        (args.routing and not facts and not args.text, "nothing to route", "no file",
         "give --facts or --text with --routing"),
        (routing and args.route != "prompt", "facts are routed by their prompts here", args.route,
         "leave --route out"),
        (args.encoder and not (args.routing and args.text), "--encoder needs documents",
         args.encoder, "give --routing and --text"),
        (args.rag and (args.text or routing), "--rag is for facts and tasks", args.rag,
         "leave --text, --block-best and --routing out"),
    ):  # fmt: skip
        if wrong:
            raise UserError(what, value, remedy)
    return [check_mode(mode) for mode in modes]


def main(words: Sequence[str]) -> None:
    if run_verb(words, VERBS):
        return
    args = _parser().parse_args(first_as_model(words))
    modes = _check(args)
    tasks = load_tasks(args.tasks, args.data) if args.tasks else []
    sets = fact_sets(args.facts, args.atomic_numbers, args.corpus, args.limit)
    texts = read_texts(args.text, args.limit) if args.text else []
    if args.text and not texts:
        raise UserError(f"{args.text} has no text", "an empty file", "name another")
    encoder = load_encoder(args.encoder) if args.encoder else None
    budget = None if args.memory_budget is None else parse_bytes(args.memory_budget)
    model = load(
        args.model, lazy=args.lazy, memory_budget=budget, context=args.context, scoring=True
    )
    if model.plan is not None:
        print(model.plan.line(), file=sys.stderr)
    arms: list[Arm] = [(mode, None) for mode in modes]
    if args.rag:
        rag = Rag(model, DocumentIndex(args.rag, model.require_bank().tree_hash))
        arms += [(mode, rag) for mode in modes]
    levels = _levels(model, args.block_best) if args.block_best else []
    sets = [counted(each, args.corpus, args.out) for each in sets]
    name = ""
    if sets or tasks:  # what they find is kept
        name = model_fingerprint(find_model(args.model, MODEL_FILES))  # by now in the Hub's cache

    found: dict[str, Any] = {} if args.routing else {"recall": [], "perplexity": []}
    tables: list[str] = []
    routed: list[RoutingRow] = []
    for each in sets:
        run = FactRun(model, args.out, name, each.integers, args.route, args.seed)
        if levels:
            rows = blocking(run, each.facts, levels)
            blocked = {"facts": each.name, "rows": [row.to_dict() for row in rows]}
            found.setdefault("blocking", []).append(blocked)
            tables.append(f"{each.name}\n{blocking_table(rows)}")
        if args.routing:
            routed += fact_rows(run, each.facts)
        if not levels and not args.routing:
            tables.append(_recall(run, each, arms, found))
    if args.routing:
        if args.text:
            routed += document_rows(model, texts, encoder)
        found["routing"] = [row.to_dict() for row in routed]
        tables.append(routing_table(routed))
    elif args.text:
        scores = [perplexity(model, texts, m, route_by=args.route_by) for m in modes]
        found["perplexity"] = [score.to_dict() for score in scores]
        tables.append(perplexity_table(scores))
    if tasks:
        options = {"out": args.out, "model_name": name, "limit": args.limit}
        results = [r for task in tasks for r in _score_task(model, task, arms, levels, options)]
        print(f"results of every row: {args.out}", file=sys.stderr)
        means = averages(results)
        found["tasks"] = [r.to_dict() for r in results]
        found["averages"] = [m.to_dict() for m in means]
        tables.append(task_table(results, means))
    print(json.dumps(found) if args.json else printable("\n\n".join(tables), keep="\n"))


def _levels(model: MemoryModel, text: str) -> list[int]:
    depth = model.require_bank().config.num_levels
    if text == "all":
        return list(range(1, depth + 1))
    try:
        levels = list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise UserError("--block-best is no list of levels", text, "give 1 or 1,2 or all") from None
    for level in levels:
        if not 1 <= level <= depth:
            raise UserError("the bank has no such level", level, f"use 1 to {depth}")
    return levels


def _recall(run: FactRun, each: FactSet, arms: Sequence[Arm], found: dict[str, Any]) -> str:
    """Adds the recall of one set of facts to what was ``found``; its table."""
    by = "" if run.route == "prompt" else f", by {run.route}"
    results = [
        run.recall(each.facts, mode, None, named(mode, rag) + by * (mode == "fetched"), rag)
        for mode, rag in arms
    ]
    results = with_flops(run.model, results, arms, each.name)
    if not each.is_table:
        found["recall"] += [result.to_dict() for result in results]
        return recall_table(results)
    found.setdefault("facts", []).append(each.to_dict(results))
    return f"{each.name}\n{count_table(results, bool(each.corpus))}"


def _score_task(
    model: MemoryModel,
    task: TaskData,
    arms: Sequence[Arm],
    levels: Sequence[int],
    options: dict[str, Any],
) -> list[TaskResult]:
    """Of each kind of memory, and with the best cluster of each of ``levels`` withheld."""
    results = [score_task(model, task, mode, rag=rag, **options) for mode, rag in arms]
    results = with_flops(model, results, arms, task.task.name)
    last = results[-1]  # these two are the same for each kind of memory
    if last.cut:
        note = f"{last.cut} of {last.rows} prompts were cut to fit the context"
        print(f"{task.task.name}: {note}", file=sys.stderr)
    if last.left_out:
        note = f"rows left out because an answer fills the context: {last.left_out}"
        print(f"{task.task.name}: {note}", file=sys.stderr)
    for level in sorted(levels, reverse=True):
        label = f"best 1/{len(used_clusters(model, level))} withheld"
        scored = score_task(model, task, "fetched", withheld=level, **options)
        results.append(replace(scored, memory=label))
    return results
