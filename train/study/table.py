"""The tables of a study: mean ± standard error over seeds of every figure, and the figures.

Of one seed the error is that within the run: binomial over facts, over documents for perplexity.
A comparison pairs two rows by document and by seed; its error counts both, as if they were
independent.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.evaluate.perplexity import ratio_and_error
from mlx_hmem.evaluate.tables import table
from mlx_hmem.files import write_atomic

from .file import Study
from .rows import Documents, Figure, Row, leading, searches, sweep_rows


def _cell(figure: Figure | None, digits: int) -> str:
    return "–" if figure is None else f"{figure.mean:.{digits}f} ± {figure.error:.{digits}f}"


def table_of(rows: Sequence[Row]) -> str:
    """All rows: recall in per cent by times stated, perplexity, parameters."""
    times = list(dict.fromkeys(t for row in rows for t in row.recall))
    with_text = any(row.perplexity for row in rows)
    head = ["recall, %" if times else "arm", *("all" if t is None else f"{t}×" for t in times)]
    head += ["perplexity"] if with_text else []
    lines = [[*head, "anchor", "fetched", "bank", "seeds"]]
    for row in rows:
        cells = [row.label, *(_cell(row.recall.get(t), 1) for t in times)]
        cells += [_cell(row.perplexity, 2)] if with_text else []
        cells += [f"{row.sizes[f'{n}_parameters']:,}" for n in ("anchor", "fetched", "bank")]
        lines.append([*cells, str(len(row.seeds))])
    return table(lines)


def comparisons(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """By how many per cent the perplexity of each row is above that of the arms ``against``."""
    first = leading(study, rows)
    pairs = [(row, first[arm]) for row in rows for arm in study.against if arm in first]
    return [
        {"row": row.label, "against": other.label, **difference}
        for row, other in pairs
        if row is not other and (difference := compare(row, other)) is not None
    ]


def compare(row: Row, other: Row) -> dict[str, float] | None:
    """The perplexity of ``row`` over that of ``other``, in per cent above it, of the same documents
    and the seeds that both have; None if there are none."""
    of_row, of_other = (dict(zip(r.seeds, r.documents, strict=False)) for r in (row, other))
    seeds = sorted(set(of_row) & set(of_other))
    if not seeds:
        return None
    each = [_difference(of_row[seed], of_other[seed]) for seed in seeds]
    values = np.array([value for value, _ in each])
    variance = float(np.mean([error for _, error in each])) ** 2
    if len(seeds) > 1:
        variance += float(values.var(ddof=1)) / len(seeds)
    ratio = math.exp(values.mean())
    return {"per_cent": 100 * (ratio - 1), "standard_error": 100 * ratio * math.sqrt(variance)}


def _difference(one: Documents, other: Documents) -> tuple[float, float]:
    """Nats per token of one above the other, and the standard error over documents (NaN of one)."""
    nats = np.array(one["nats"]) - np.array(other["nats"])
    return ratio_and_error(nats, np.array(one["tokens"]))


def comparison_table(found: Sequence[dict[str, Any]]) -> str:
    others = list(dict.fromkeys(pair["against"] for pair in found))
    lines = [["perplexity, % above", *others]]
    for row in dict.fromkeys(pair["row"] for pair in found):
        cells = {p["against"]: p for p in found if p["row"] == row}
        texts = [
            f"{cells[o]['per_cent']:+.2f} ± {cells[o]['standard_error']:.2f}" if o in cells else "–"
            for o in others
        ]
        lines.append([row, *texts])
    return table(lines)


def search_table(study: Study, found: Sequence[dict[str, Any]]) -> str:
    lines = [["rates", "chosen", f"tried: {study.choose_by} of the validation half"]]
    for search in found:
        tried = [(s.partition("=")[2], value) for s, value in search["tried"].items()]
        by_recall = study.choose_by == "recall"
        texts = [f"{r}: {100 * v:.1f}" if by_recall else f"{r}: {-v:.2f}" for r, v in tried]
        lines.append([search["arm"], search["chosen"].partition("=")[2], ", ".join(texts)])
    return table(lines)


def write_tables(study: Study, out: Path, rows: Sequence[Row]) -> str:
    """Writes ``table.txt`` and ``results.json`` and returns the text of the first."""
    found = searches(study, out)
    sweeps = {sweep.name: sweep_rows(study, out, sweep) for sweep in study.sweeps}
    compared = comparisons(study, rows)
    parts = [table_of(rows)] if rows else ["nothing is measured yet"]
    parts += [comparison_table(compared)] if compared else []
    parts += [f"sweep: {name}\n{table_of(some)}" for name, some in sweeps.items() if some]
    parts += [search_table(study, found)] if found else []
    parts.append(
        "± standard error over seeds; of one seed, over facts and documents. Shown are the halves\n"
        "of facts and documents that no rate was chosen by."
    )
    text = "\n\n".join(parts) + "\n"
    values = {
        "recipe": study.recipe,
        "searches": found,
        "rows": [row.to_dict() for row in rows],
        "comparisons": compared,
        "sweeps": {name: [row.to_dict() for row in some] for name, some in sweeps.items()},
    }
    write_atomic(out / "results.json", json.dumps(values, indent=1) + "\n")
    write_atomic(out / "table.txt", text)
    return text
