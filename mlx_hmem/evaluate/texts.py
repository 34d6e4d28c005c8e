"""Text files that evaluation reads: one JSON object per line, plain or gzip."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError


def read_jsonl(path: Path, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The objects of the first ``limit`` lines of ``path``; empty lines are passed over."""
    if not path.is_file():
        raise UserError("a file is missing", path, "name a file with one JSON object per line")
    opener = gzip.open if path.suffix == ".gz" else open
    count = 0
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if count == limit:
                    return
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
                    count += 1
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
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
    """The ``text`` of each object of ``path``."""
    texts = []
    for number, row in enumerate(read_jsonl(path, limit), 1):
        if not isinstance(row.get("text"), str):
            raise UserError(f"{path} has an object without `text`", number, "add the key `text`")
        texts.append(row["text"])
    return texts
