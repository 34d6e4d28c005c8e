"""``bank/documents.jsonl``: which documents trained which blocks of a bank.

The file is optional, one JSON object a line. A document names the leaves that its windows trained;
every block above such a leaf has seen it too. The texts themselves stay with whoever owns them.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

from mlx_hmem.config import ClusterPath, JsonConfig, MemoryConfig
from mlx_hmem.errors import UserError, printable
from mlx_hmem.files import write_atomic
from mlx_hmem.reading import open_regular, strict_json

DOCUMENTS = "documents.jsonl"
MAX_TERMS = 8
REMEDY = "restore the file"


@dataclass(frozen=True)
class Document(JsonConfig):
    """A text that trained blocks.

    ``sha256``: 64 hex digits, of its UTF-8 text; ``name``: file or title; ``tokens``: of the
    anchor's tokenizer; ``clusters``: paths of the leaves that its windows trained; ``terms``: up to
    eight typical words; ``words``: of each of the ``clusters``, all words of the windows there,
    each once, apart by spaces: a text with enough of them is routed there.
    """

    sha256: str
    name: str
    tokens: int
    clusters: tuple[ClusterPath, ...]
    terms: tuple[str, ...] = ()
    words: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sha256, str) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise UserError("sha256 is not 64 hex digits", repr(self.sha256)[:80], REMEDY)
        if not isinstance(self.name, str):
            raise UserError("a document's name is not a text", repr(self.name)[:80], REMEDY)
        if type(self.tokens) is not int or self.tokens < 0:
            raise UserError("tokens is not a whole number", repr(self.tokens)[:80], REMEDY)
        object.__setattr__(self, "clusters", _paths(self.clusters))
        if (
            not isinstance(self.terms, list | tuple)
            or len(self.terms) > MAX_TERMS
            or not all(isinstance(term, str) for term in self.terms)
        ):
            raise UserError(f"terms are not up to {MAX_TERMS} words", repr(self.terms)[:80], REMEDY)
        object.__setattr__(self, "terms", tuple(self.terms))
        words = self.words
        if words is not None and (
            not isinstance(words, tuple)
            or len(words) != len(self.clusters)
            or not all(isinstance(each, str) for each in words)
        ):
            raise UserError("words are not those of each cluster", repr(words)[:80], REMEDY)

    @property
    def keys(self) -> frozenset[tuple[int, int]]:
        """(level, cluster) of every block that the document has trained."""
        return frozenset(key for path in self.clusters for key in enumerate(path, 1))

    @property
    def taught(self) -> dict[ClusterPath, str]:
        """The words of each leaf, where they are known."""
        return dict(zip(self.clusters, self.words or (), strict=False))

    def of_leaves(self, leaves: Mapping[ClusterPath, str | None]) -> Self:
        """The same document in other leaves, each with its words, None where they are unknown."""
        words = None if None in leaves.values() else tuple(map(str, leaves.values()))
        return replace(self, clusters=tuple(leaves), words=words)


def _paths(values: Any) -> tuple[ClusterPath, ...]:
    if isinstance(values, list | tuple) and all(
        isinstance(path, list | tuple) and path and all(type(i) is int and i >= 0 for i in path)
        for path in values
    ):
        return tuple(tuple(path) for path in values)
    raise UserError("clusters are not cluster paths", repr(values)[:80], REMEDY)


def read_documents(folder: str | Path, config: MemoryConfig | None = None) -> list[Document]:
    """The documents of the bank in ``folder``, where ``bank.json`` lies; none without the file.

    With ``config``, that of the bank, every path must lead to a leaf of it. Raises UserError, with
    the number of the line.
    """
    file = Path(folder) / DOCUMENTS
    if not file.exists():
        return []
    with open_regular(file) as opened:
        lines = opened.read().split(b"\n")
    found: dict[str, Document] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            document = Document.from_dict(strict_json(line))
            for path in document.clusters if config is not None else ():
                config.check_path(path)  # type: ignore[union-attr]
            if document.sha256 in found:
                raise ValueError("the document stands there twice")
        except (ValueError, TypeError) as error:  # UserError is one
            raise UserError(f"{file}, line {number}, is damaged", error, REMEDY) from None
        found[document.sha256] = document
    return list(found.values())


def taught(documents: Iterable[Document]) -> list[tuple[ClusterPath, str]]:
    """Of each document and each leaf whose words are known, the path and the words."""
    return [each for document in documents for each in document.taught.items()]


def write_documents(folder: str | Path, documents: Iterable[Document]) -> None:
    """Writes the file whole or not at all."""
    lines = [json.dumps(document.to_dict(), ensure_ascii=False) + "\n" for document in documents]
    write_atomic(Path(folder) / DOCUMENTS, "".join(lines))


def find_documents(
    documents: Sequence[Document], wanted: str, also: Mapping[str, Collection[str]] | None = None
) -> list[Document]:
    """The documents that are meant by a name, a folder (``letters/``), a pattern of names, whose *
    stays within a folder (``letters/*.txt``), or the beginning of a hash (6 digits at least).

    ``also``: more names of documents, by their hashes. Names are compared as :func:`one_name`.
    Raises UserError where none is meant, or the hash is of several.
    """
    also, name = also or {}, one_name(wanted)
    folder = name if name.endswith("/") and name.strip("/") else None
    for is_meant in (
        lambda own: own == name,
        lambda own: folder is not None and own.startswith(folder),
        lambda own: _is_like(own, name),
    ):
        named = ((d, map(one_name, (d.name, *also.get(d.sha256, ())))) for d in documents)
        if found := [d for d, names in named if any(map(is_meant, names))]:
            return found
    found = [d for d in documents if len(wanted) >= 6 and d.sha256.startswith(wanted.lower())]
    if len(found) == 1:
        return found
    if found:
        hashes = ", ".join(d.sha256[:12] for d in found)
        raise UserError("several documents have that hash", wanted, f"give more of it: {hashes}")
    raise UserError(
        "the bank knows no such document",
        wanted,
        "mlx_hmem.bank inspect names those that trained it",
    )


def _is_like(name: str, pattern: str) -> bool:
    own, wanted = name.split("/"), pattern.split("/")
    return len(own) == len(wanted) and all(map(fnmatchcase, own, wanted))


def one_name(text: str) -> str:
    """A name as it is compared: macOS writes an accent apart from its letter, a keyboard both as
    one, and a person may copy what was printed of it."""
    return printable(unicodedata.normalize("NFC", text))
