"""Text files that evaluation reads: one JSON object per line, or plain text; gzip or not."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from mlx_hmem.errors import UserError
from mlx_hmem.reading import require_file


@contextmanager
def reading(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """``path`` opened as text, gzip or not; UserError where it is not text to the end."""
    try:
        opener: Any = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text", error, "restore the file") from None


def numbered_jsonl(path: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of the first ``limit`` lines of ``path``, each with the number of its line, from
    1; empty lines are passed over."""
    require_file(path, "name a file with one JSON object per line")
    with reading(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(lines, limit):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where} is not valid JSON", error, "restore the file") from None
            if not isinstance(row, dict):
                what = f"{where} is not a JSON object"
                raise UserError(what, line.strip()[:60], "restore the file")
            yield number, row


def records(path: Path, limit: int | None = None) -> Iterator[str]:
    """The ``text`` of each object of ``path``."""
    for number, row in numbered_jsonl(path, limit):
        if not isinstance(row.get("text"), str):
            found = ", ".join(row) or "nothing"
            raise UserError(f"{path}, line {number} has no `text`", f"it has {found}", "add it")
        yield row["text"]


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The :func:`records` of ``path``; of a file that is not ``.jsonl`` the articles of
    :func:`read_articles`. Plain or gzip."""
    if ".jsonl" not in path.suffixes and path.suffix != ".json":
        return read_articles(path)[:limit]
    return list(records(path, limit))


def read_articles(path: Path) -> list[str]:
    """The articles of a plain text in WikiText's layout: each begins with a line `` = Title = ``
    between empty lines. A text without such lines is one article. Words stay as they are."""
    require_file(path, "name a text, or a file with one JSON object per line")
    with reading(path, newline="") as file:
        text = file.read()
    articles = re.split(r"(?:^|(?<=\n) ?\n)(?= = [^=\n]+ = \n ?\n)", text)
    return [article.strip() for article in articles if article.strip()]
