"""Scores a model directory: ``python -m mlx_hmem.evaluate MODEL_DIR --facts F --text T``.

Prints a table of recall by how often a fact was stated and of perplexity, for each kind of memory
asked for; with ``--json`` one JSON object on standard output. Progress goes to standard error.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.evaluate.facts import FactRecall, RecallBucket, read_facts, recall
from mlx_hmem.evaluate.perplexity import ROUTE_BY, Perplexity, perplexity
from mlx_hmem.evaluate.texts import read_texts
from mlx_hmem.loading import load
from mlx_hmem.model import MODES


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
    return f"{100 * bucket.accuracy:.1f} ± {100 * bucket.standard_error:.1f}"


def perplexity_table(results: Sequence[Perplexity]) -> str:
    first = results[0]
    head = f"perplexity, {first.documents} documents, {first.tokens} tokens"
    rows = [[head, "per token", "per byte", "bits per byte"]]
    for r in results:
        token = f"{r.per_token:.2f} ± {r.per_token_error:.2f}"
        bits = f"{r.bits_per_byte:.4f} ± {r.bits_per_byte_error:.4f}"
        rows.append([r.memory, token, f"{r.per_byte:.4f}", bits])
    return table(rows)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m mlx_hmem.evaluate", description=__doc__)
    parser.add_argument("model", help="model directory or Hub id")
    parser.add_argument("--facts", type=Path, help="facts to recall, one JSON object per line")
    parser.add_argument("--text", type=Path, help="held-out documents, one JSON object per line")
    parser.add_argument("--memory", default="none,generic,fetched", help="kinds, with commas")
    parser.add_argument("--route-by", default="document", help=f"for text: one of {ROUTE_BY}")
    parser.add_argument("--limit", type=int, help="score this many facts and documents at most")
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
    if not args.facts and not args.text:
        raise UserError("there is nothing to score", "no file", "give --facts or --text, or both")
    facts = read_facts(args.facts) if args.facts else []
    if args.limit and len(facts) > args.limit:
        facts = random.Random(0).sample(facts, args.limit)  # the first would share few topics
    texts = read_texts(args.text, args.limit) if args.text else []

    model = load(args.model)
    recalls = [recall(model, facts, m) for m in modes] if args.facts else []
    scores = []
    if args.text:
        scores = [perplexity(model, texts, m, route_by=args.route_by) for m in modes]
    if args.json:
        found = {
            "recall": [r.to_dict() for r in recalls],
            "perplexity": [p.to_dict() for p in scores],
        }
        print(json.dumps(found))
        return
    parts = [recall_table(recalls)] if recalls else []
    parts += [perplexity_table(scores)] if scores else []
    print("\n\n".join(parts))


if __name__ == "__main__":
    run_program(main)
