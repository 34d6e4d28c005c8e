"""Tables of facts: the atomic numbers of the elements, and any CSV that a user brings.

A CSV has a header with the columns ``prompt``, ``answers`` and ``key``; of the answers, separated
by ``|``, any is right, and ``key`` holds the names, separated likewise, that are counted in a
corpus. Further columns are not looked at. ``elements.csv`` beside this file (number, name, former
and other names) was written from general knowledge, without a source.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.facts import Fact
from mlx_hmem.reading import require_file

ELEMENTS = Path(__file__).parent / "elements.csv"
COLUMNS = ("prompt", "answers", "key")
PROMPT = "The atomic number of {} is"  # the paper, section 7


class FactTable(NamedTuple):
    """Facts whose ``times`` is to be counted, and the names that each is counted by."""

    facts: list[Fact]
    keys: list[tuple[str, ...]]


def atomic_numbers() -> FactTable:
    """The paper's task: 118 elements, each asked for by its present name."""
    facts, keys = [], []
    for _, row in _rows(ELEMENTS, ("number", "name", "aliases")):
        name = row["name"]
        facts.append(Fact(PROMPT.format(name), row["number"], (), 0, "atomic number", name))
        keys.append((name, *_parts(row["aliases"])))
    return FactTable(facts, keys)


def read_fact_table(path: Path) -> FactTable:
    """The facts of a CSV; a :class:`UserError` with the line of what is wrong."""
    facts, keys = [], []
    for line, row in _rows(path, COLUMNS):
        for column in COLUMNS:
            if not _parts(row[column]):
                raise UserError(
                    f"{path}, line {line} has an empty `{column}`", row, "fill in the cell"
                )
        names, answers = _parts(row["key"]), _parts(row["answers"])
        prompt = row["prompt"].strip()
        facts.append(Fact(prompt, answers[0], tuple(answers[1:]), 0, "fact", names[0]))
        keys.append(tuple(names))
    if not facts:
        raise UserError(f"{path} has no facts", "a header alone", "add a row for each fact")
    return FactTable(facts, keys)


def _parts(cell: str) -> list[str]:
    return [part.strip() for part in cell.split("|") if part.strip()]


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a CSV with these columns, each with the number of its last line."""
    require_file(path, f"name a CSV with {', '.join(columns)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            if missing := [c for c in columns if c not in (rows.fieldnames or ())]:
                found = ", ".join(rows.fieldnames or ()) or "nothing"
                raise UserError(
                    f"{path} has no column `{missing[0]}`", found, f"needs {', '.join(columns)}"
                )
            for row in rows:
                if None in row or None in row.values():
                    what = f"{path}, line {rows.line_num} has not as many cells as the header"
                    raise UserError(what, len(rows.fieldnames or ()), "quote cells with commas")
                yield rows.line_num, row
    except UnicodeDecodeError as error:
        raise UserError(f"{path} cannot be read as text", error, "save it as UTF-8") from None
    except csv.Error as error:
        what = f"{path}, line {rows.line_num} is no CSV"
        raise UserError(what, error, "correct the quotes") from None
