"""Tables, JSON and notebooks as text: a row is a sentence of ``column: value``."""

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

DELIMITERS = (",", ";", "\t", "|")


def sentence(values: Iterable[tuple[str, Any]]) -> str:
    """``a: 1, b: 2.``; what has no value is left out."""
    texts = ((name.strip(), _value(value)) for name, value in values)
    said = ", ".join(f"{name}: {text}" if name else text for name, text in texts if text)
    return said if not said or said.endswith((".", "!", "?")) else f"{said}."


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return "" if value is None else " ".join(text.split())


def table_text(text: str, delimiter: str = "") -> str:
    """Of a ``.csv`` or, where the delimiter is a tab, a ``.tsv``. The first row names the columns,
    unless a cell of it is empty, a number, or there twice."""
    first = text.partition("\n")[0]
    delimiter = delimiter or max(DELIMITERS, key=first.count)
    try:
        rows = [row for row in csv.reader(io.StringIO(text, ""), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise ValueError(f"a damaged table ({error})") from None
    if not rows:
        return ""
    names = [name.strip() for name in rows[0]]
    if not all(names) or len(set(names)) < len(names) or any(map(_is_number, names)):
        return "\n".join(sentence(("", cell) for cell in row) for row in rows)
    width = max(map(len, rows))
    names += [""] * (width - len(names))
    return "\n".join(sentence(zip(names, row, strict=False)) for row in rows[1:])


def _is_number(text: str) -> bool:
    return any(c.isdigit() for c in text) and not any(c.isalpha() for c in text)


def notebook_text(text: str) -> str:
    """Of an ``.ipynb``: what its cells say, without what they gave."""
    try:
        book = json.loads(text)
        sheets = book.get("worksheets") or [book]  # before version 4
        cells = [cell for sheet in sheets for cell in sheet["cells"]]
        found = [cell.get("source", cell.get("input", "")) for cell in cells]
        return "\n\n".join("".join(each) for each in found)
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise ValueError("no notebook") from None


@dataclass(frozen=True)
class Records:
    """How a JSON object becomes a document: the value of ``text_key``, or what is said in
    ``messages``, or in ``prompt`` and ``completion``, as mlx-lm takes them. Turns are lines: a
    document's text is never read as a chat template's control tokens."""

    text_key: str = "text"

    def has_text(self, record: Any) -> bool:
        """Whether an object is a document at all."""
        names = ({self.text_key}, {"messages"}, {"prompt", "completion"})
        return isinstance(record, dict) and any(each <= set(record) for each in names)

    def text(self, record: Any) -> str:
        """Of a document; ValueError where it is none."""
        if not self.has_text(record):
            raise ValueError(f"no `{self.text_key}`")
        if self.text_key in record:
            if not isinstance(record[self.text_key], str):
                raise ValueError(f"`{self.text_key}` is not a text")
            return str(record[self.text_key])
        given = record.get("messages")
        if given is None:
            pairs = (("user", record["prompt"]), ("assistant", record["completion"]))
            given = [{"role": role, "content": content} for role, content in pairs]
        return "\n\n".join(f"{role.capitalize()}: {said}" for role, said in _turns(given))

    def document(self, record: Any, number: int) -> tuple[str, str, str]:
        """(id, title, text); the id is the number of the record where it has none."""
        text, title = self.text(record), record.get("title")
        return str(record.get("id", number)), title if isinstance(title, str) else "", text


def _turns(given: Any) -> Iterator[tuple[str, str]]:
    """Turns with a role and a text each; of a content in parts those that are text."""
    if not isinstance(given, list):
        raise ValueError("`messages` is not a list")
    for message in given:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list):
            parts = (part.get("text") for part in content if isinstance(part, dict))
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ValueError("a message without role and content")
        yield message["role"], content


def array_items(text: str) -> list[Any]:
    """The items of a ``.json`` file that is an array; none of anything else."""
    if not text.lstrip("\ufeff \t\r\n").startswith("["):
        return []
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # lone surrogates fail here
    except (ValueError, RecursionError):
        return []
    return found if isinstance(found, list) else []


def array_text(items: list[Any]) -> str:
    """Of an array whose items are no documents: a line for each."""
    return "\n".join(sentence(i.items() if isinstance(i, dict) else [("", i)]) for i in items)
