"""Results as tables of plain text."""

from collections.abc import Sequence

from mlx_hmem.evaluate.facts import FactRecall, Proportion
from mlx_hmem.evaluate.paper.blocking import BlockingRow
from mlx_hmem.evaluate.paper.fact_runs import count_buckets, decade
from mlx_hmem.evaluate.paper.routing_quality import RoutingRow
from mlx_hmem.evaluate.perplexity import Perplexity
from mlx_hmem.evaluate.tasks.benchmark import Average, TaskResult


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
    rows = [["recall, %", *("all" if t is None else f"{t}×" for t in first.times)]]
    rows.append(["facts", *(str(first.bucket(times=t).total) for t in first.times)])
    for kind in first.kinds:
        for result in results:
            name = result.memory if kind == "all" else f"{result.memory}, {kind}"
            rows.append([name, *(cell(result.bucket(kind, t)) for t in first.times)])
    return table(_with_flops(rows, [*results] * len(first.kinds)))


def count_table(results: Sequence[FactRecall], counted: bool = True) -> str:
    """As :func:`recall_table`, one column per decade of counts in a corpus, if they are known."""
    buckets = count_buckets(results[0]) if counted else []
    names = [decade(b) for b in buckets]
    rows = [["times in the corpus" if counted else "recall, %", *names, "all"]]
    rows.append(["facts", *(str(b.total) for b in buckets), str(len(results[0].facts))])
    for result in results:
        parts = [*(count_buckets(result) if counted else []), result.bucket()]
        rows.append([result.memory, *map(cell, parts)])
    return table(_with_flops(rows, results))


def _with_flops(rows: list[list[str]], results: Sequence[FactRecall]) -> list[list[str]]:
    """``rows``, the last of them one of each of ``results``, with a column of their FLOPs."""
    if any(result.flops is None for result in results):
        return rows
    column = ["FLOPs", "", *(f"{result.flops:.2f}×" for result in results)]
    return [[*row, cell] for row, cell in zip(rows, column, strict=True)]


def cell(part: Proportion | TaskResult | Average) -> str:
    """Per cent ± standard error."""
    if isinstance(part, Proportion) and not part.total:
        return "–"
    return f"{100 * part.accuracy:.1f} ± {100 * part.standard_error:.1f}"


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
        lines.setdefault((r.task.name, of), {})[r.memory] = cell(r)
        for name, part in r.categories.items():
            lines.setdefault((f"  {name}", str(part.total)), {})[r.memory] = cell(part)
        if r.flops is not None:
            name = f"  FLOPs of {r.task.name}"
            lines.setdefault((name, ""), {})[r.memory] = f"{r.flops:.2f}×"
    for m in means:
        count = f"{len(m.tasks)} of {len(m.tasks) + len(m.missing)} tasks"
        lines.setdefault((m.name, count), {})[m.memory] = cell(m)
    rows += [[*key, *(cells[m] for m in memories)] for key, cells in lines.items()]
    return table(rows)


def blocking_table(rows: Sequence[BlockingRow]) -> str:
    """Accuracy on all facts, and on those that the whole bank answers; how many paths moved."""
    lines = [["blocking, %", "all facts", "known to the whole bank", "paths moved"]]
    lines.append(["facts", str(rows[0].accuracy.total), str(rows[0].known.total), ""])
    for row in rows:
        moved = str(row.moved) if row.level else ""
        lines.append([row.name, cell(row.accuracy), cell(row.known), moved])
    return table(lines)


def routing_table(rows: Sequence[RoutingRow]) -> str:
    """Shares in per cent ± standard error, with how many texts each is of, for each level."""
    levels = range(1, len(rows[0].shares) + 1)
    lines = [["routing, %", *(f"level {level}" for level in levels)]]
    for group in dict.fromkeys(row.group for row in rows):
        lines.append([group, *("" for _ in levels)])
        for row in (row for row in rows if row.group == group):
            lines.append([f"  {row.name}", *(f"{cell(s)} of {s.total}" for s in row.shares)])
    return table(lines)
