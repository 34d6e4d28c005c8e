"""Scores a model directory: ``python -m mlx_hmem.evaluate MODEL_DIR --facts F --text T``.

Prints a table of recall by how often a fact was stated and of perplexity, and with ``--tasks all
--data FOLDER`` of accuracy on benchmark tasks, for each kind of memory asked for; with ``--json``
one JSON object on standard output. Progress goes to standard error.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.evaluate.benchmark import (
    Average,
    TaskResult,
    averages,
    model_fingerprint,
    score_task,
)
from mlx_hmem.evaluate.facts import FactRecall, RecallBucket, read_facts, recall
from mlx_hmem.evaluate.perplexity import ROUTE_BY, Perplexity, perplexity
from mlx_hmem.evaluate.tasks import TaskData, load_tasks
from mlx_hmem.evaluate.texts import read_texts
from mlx_hmem.find import MODEL_FILES, find_model
from mlx_hmem.loading import load
from mlx_hmem.model import MODES, MemoryModel


def table(rows: Sequence[Sequence[str]]) -> str:
    """``rows`` as aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def recall_table(results: Sequence[FactRecall]) -> str:
    """Recall in per cent ± standard error, one column per number of times stated."""
    first = results[0]
    rows = [["recall, %", *(f"{t}×" for t in first.times), "all"]]
    rows.append(["facts", *(str(first.bucket(times=t).total) for t in [*first.times, None])])
    kinds = ["all", *first.kinds] if len(first.kinds) > 1 else ["all"]
    for kind in kinds:
        for result in results:
            name = result.memory if kind == "all" else f"{result.memory}, {kind}"
            cells = [_cell(result.bucket(kind, t)) for t in [*first.times, None]]
            rows.append([name, *cells])
    return table(rows)


def _cell(bucket: RecallBucket) -> str:
    if not bucket.total:
        return "–"
    return _per_cent(bucket.accuracy, bucket.standard_error)


def perplexity_table(results: Sequence[Perplexity]) -> str:
    first = results[0]
    head = f"perplexity, {first.documents} documents, {first.tokens} tokens"
    rows = [[head, "per token", "per byte", "bits per byte"]]
    for r in results:
        token = f"{r.per_token:.2f} ± {r.per_token_error:.2f}"
        bits = f"{r.bits_per_byte:.4f} ± {r.bits_per_byte_error:.4f}"
        rows.append([r.memory, token, f"{r.per_byte:.4f}", bits])
    return table(rows)


def task_table(results: Sequence[TaskResult], means: Sequence[Average]) -> str:
    """Accuracy in per cent ± standard error: a line per task, a column per kind of memory."""
    memories = list(dict.fromkeys(r.memory for r in results))
    rows = [["accuracy, %", "rows", *memories]]
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for r in results:
        of = f"{r.rows} of {r.of_rows}" if r.rows < r.of_rows else str(r.rows)
        lines.setdefault((r.task.name, of), {})[r.memory] = _per_cent(r.accuracy, r.standard_error)
        for name, (right, total) in r.categories.items():
            part = RecallBucket(name, None, right, total)
            lines.setdefault((f"  {name}", str(total)), {})[r.memory] = _cell(part)
    for m in means:
        count = f"{len(m.tasks)} of {len(m.tasks) + len(m.missing)} tasks"
        lines.setdefault((m.name, count), {})[m.memory] = _per_cent(m.accuracy, m.standard_error)
    rows += [[*key, *(cells[m] for m in memories)] for key, cells in lines.items()]
    return table(rows)


def _per_cent(accuracy: float, error: float) -> str:
    return f"{100 * accuracy:.1f} ± {100 * error:.1f}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m mlx_hmem.evaluate", description=__doc__)
    parser.add_argument("model", help="model directory or Hub id")
    parser.add_argument("--facts", type=Path, help="facts to recall, one JSON object per line")
    parser.add_argument("--text", type=Path, help="held-out documents, JSON lines or plain text")
    parser.add_argument("--tasks", help="benchmark tasks, with commas, as arc_easy:3; or all")
    parser.add_argument("--data", type=Path, help="the folder of the tasks' files")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/evaluate"), help="where tasks keep their results"
    )
    parser.add_argument("--memory", default="none,generic,fetched", help="kinds, with commas")
    parser.add_argument("--route-by", default="window", help=f"for text: one of {ROUTE_BY}")
    parser.add_argument(
        "--limit", type=int, help="score this many facts, documents and rows of a task"
    )
    parser.add_argument("--lazy", action="store_true", help="fetch only what is needed of the bank")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    modes = [m.strip() for m in args.memory.split(",")]
    if unknown := [m for m in modes if m not in MODES]:
        raise UserError("unknown memory mode", repr(unknown[0]), f"use {','.join(MODES)}")
    if args.route_by not in ROUTE_BY:
        raise UserError("unknown --route-by", repr(args.route_by), f"use one of {ROUTE_BY}")
    if args.limit is not None and args.limit < 1:
        raise UserError("--limit is less than 1", args.limit, "give 1 or more, or leave it out")
    if not args.facts and not args.text and not args.tasks:
        raise UserError("there is nothing to score", "no file", "give --facts, --text or --tasks")
    if args.tasks and not args.data:
        raise UserError("--tasks needs their files", args.tasks, "name their folder with --data")
    tasks = load_tasks(args.tasks, args.data) if args.tasks else []
    facts = read_facts(args.facts) if args.facts else []
    if args.limit and len(facts) > args.limit:
        facts = random.Random(0).sample(facts, args.limit)  # the first would share few topics
    texts = read_texts(args.text, args.limit) if args.text else []

    model = load(args.model, lazy=args.lazy)
    recalls = [recall(model, facts, m) for m in modes] if args.facts else []
    scores = []
    if args.text:
        scores = [perplexity(model, texts, m, route_by=args.route_by) for m in modes]
    results = _score_tasks(model, tasks, modes, args) if tasks else []
    means = averages(results)
    if args.json:
        found: dict[str, Any] = {
            "recall": [r.to_dict() for r in recalls],
            "perplexity": [p.to_dict() for p in scores],
        }
        if tasks:
            found["tasks"] = [r.to_dict() for r in results]
            found["averages"] = [m.to_dict() for m in means]
        print(json.dumps(found))
        return
    parts = [recall_table(recalls)] if recalls else []
    parts += [perplexity_table(scores)] if scores else []
    parts += [task_table(results, means)] if results else []
    print("\n\n".join(parts))


def _score_tasks(
    model: MemoryModel, tasks: Sequence[TaskData], modes: Sequence[str], args: Any
) -> list[TaskResult]:
    folder = find_model(args.model, MODEL_FILES)  # once more: the Hub's cache has it by now
    name = model_fingerprint(folder)
    options = {"out": args.out, "model_name": name, "limit": args.limit}
    results = [score_task(model, task, mode, **options) for task in tasks for mode in modes]
    for r in results[:: len(modes)]:  # the same for each kind of memory
        if r.cut:
            note = f"{r.task.name}: {r.cut} of {r.rows} prompts were cut to fit the context"
            print(note, file=sys.stderr)
    print(f"results of every row: {args.out}", file=sys.stderr)
    return results


if __name__ == "__main__":
    run_program(main, stopped="stopped; --tasks go on from here with the same command")
