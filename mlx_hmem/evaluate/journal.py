"""Results kept row by row, so that a run that was cut short goes on where it was.

One file per model, task, settings and kind of memory: a line of JSON that says what these are,
then one per scored row, in the order in which batches ended. A batch is appended and synced at
once; what a kill left of an unfinished line is dropped.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.folders import add_lines, locked, whole_lines


class Journal:
    """The results of one run over one task; a context manager that holds the file."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any]):
        self._head = json.dumps(settings, sort_keys=True, ensure_ascii=False)
        digest = xxhash.xxh3_64_hexdigest(self._head.encode())
        self.path = folder / f"{name}.{digest}.jsonl"
        self.rows: dict[int, dict[str, Any]] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator["Journal"]:
        """Reads what is there and holds the file; UserError if another program does, or if what
        it holds is something else."""
        remedy = "wait for it, or choose another --out"
        taken = UserError("another run writes these results", self.path, remedy)
        with locked(self.path, taken) as self._file:
            lines = whole_lines(self._file)
            if not lines:
                add_lines(self._file, [self._head])
            try:
                if lines and lines[0].decode() != self._head:
                    raise ValueError("the first line is not this run's")
                for row in map(json.loads, lines[1:]):
                    self.rows[row["row"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path} is no file of results", error, "give another file"
                ) from None
            yield self

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Appends results, each with its ``row``, and puts them on the disk."""
        add_lines(self._file, [json.dumps(row, ensure_ascii=False) for row in rows])
        self.rows |= {row["row"]: row for row in rows}


def kept_rows(
    journal: Journal,
    rows: Sequence[int],
    score: Callable[[list[int]], Iterable[list[dict[str, Any]]]],
    desc: str,
    unit: str,
    progress: bool,
) -> list[dict[str, Any]]:
    """The results of ``rows``, in their order: those that the journal has, and of the others what
    ``score`` finds, each with its ``row``, kept a batch at a time."""
    with journal.open():
        missing = [row for row in rows if row not in journal.rows]
        done = len(rows) - len(missing)
        with tqdm(total=len(rows), initial=done, desc=desc, unit=unit, disable=not progress) as bar:
            for batch in score(missing) if missing else ():
                journal.add(batch)
                bar.update(len(batch))
    return [journal.rows[row] for row in rows]
