"""Text files that evaluation reads: one JSON object per line, or plain text; gzip or not."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.files import require_file


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of the first ``limit`` lines of ``path``; empty lines are passed over."""
    for _, row in numbered_jsonl(path, limit):
        yield row


def numbered_jsonl(path: Path, limit: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """As :func:`read_jsonl`, each object with the number of its line, from 1."""
    require_file(path, "name a file with one JSON object per line")
    opener = gzip.open if path.suffix == ".gz" else open
    count = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if count == limit:
                    return
                if line.strip():
                    yield number, _parse(line, f"{path}, line {number}")
                    count += 1
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text", error, "restore the file") from None


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON", error, "restore the file") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object", line.strip()[:60], "restore the file")
    return row


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The ``text`` of each object of ``path``; of a file that is not ``.jsonl``, plain or gzip, the
    articles of :func:`read_articles`."""
    if ".jsonl" not in path.suffixes and path.suffix != ".json":
        return read_articles(path)[:limit]
    texts = []
    for number, row in numbered_jsonl(path, limit):
        if not isinstance(row.get("text"), str):
            found = ", ".join(row) or "nothing"
            raise UserError(f"{path}, line {number} has no `text`", f"it has {found}", "add it")
        texts.append(row["text"])
    return texts


def read_articles(path: Path) -> list[str]:
    """The articles of a plain text in WikiText's layout: each begins with a line `` = Title = ``
    between empty lines. A text without such lines is one article. Words stay as they are."""
    require_file(path, "name a text, or a file with one JSON object per line")
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text", error, "restore the file") from None
    articles = re.split(r"(?:^|(?<=\n) ?\n)(?= = [^=\n]+ = \n ?\n)", text)
    return [article.strip() for article in articles if article.strip()]
