"""Passages of remembered documents, which go into the prompt beside the memory.

The text lies in the run's folder, with whoever owns it. A passage is as many whole sentences as
have ``WORDS`` words together, behind the headings that they stand under, and is found as a document
is, by the words of the question (:mod:`mlx_hmem.retriever.words`).
"""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.views import Barred
from mlx_hmem.errors import UserError, printable
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.reading import read_sealed_lines
from mlx_hmem.retriever.words import NEAR, WordIndex, words_of

WORDS = 100  # of a passage; a longer sentence is one by itself
ANSWER = 4  # at least this part of the context is left to the answer, if it wants so much
_HEADING = re.compile("(#{1,6}) ")
_BETWEEN = re.compile(r"(?<=[.!?])\s+|\n+")


class Passage(NamedTuple):
    """Whole sentences, and the name of the document that they stand in."""

    document: str
    text: str


def passages_of(text: str) -> Iterator[str]:
    """A document cut into passages."""
    own, count, headings = list[str](), 0, dict[int, str]()
    for sentence in filter(None, map(str.strip, _BETWEEN.split(text))):
        words, found = len(sentence.split()), _HEADING.match(sentence)
        if found:
            headings = {n: each for n, each in headings.items() if n < len(found[1])}
        if own and count + words > WORDS:
            yield " ".join(own)
            own, count = [*headings.values()], 0
        if found and words <= WORDS // 4:
            headings[len(found[1])] = sentence
        own.append(sentence)
        count += words
    if own:
        yield " ".join(own)


class Passages:
    """Those of the documents that a run has taught a model and that may be fetched from it."""

    def __init__(self, run: Path, model: MemoryModel, blocked: Collection[Barred] = ()):
        """``run``: the folder that a remembering made; ``blocked``: as of
        :meth:`MemoryModel.fetch`. Raises UserError unless the run is whole and of this model."""
        known = _allowed(model, blocked)
        if not (run / DOCUMENTS).is_file():
            remedy = "name the folder that remember made beside the model with --run"
            raise UserError("no folder with the text of a remembering", run, remedy)
        lines = read_sealed_lines(run / DOCUMENTS, "restore the folder as the remembering left it")
        documents = [(line.get("sha256"), line.get("text")) for line in lines]
        if known and not any(sha256 in known for sha256, _ in documents):
            raise UserError("the run has taught this model nothing", run, "give its own with --run")
        self._passages = [
            Passage(name, passage)
            for sha256, text in documents
            if isinstance(text, str) and (name := known.get(str(sha256))) is not None
            for passage in passages_of(text)
        ]
        tokenizer = model.require_retriever().encoder.tokenizer
        bags = [words_of(tokenizer, passage.text) for passage in self._passages]
        self._words = WordIndex(tokenizer, bags)

    def nearest_in(self, document: str, text: str) -> Passage | None:
        """The passage of one document that covers the most of a question."""
        covered = self._words.covered(text)
        own = [n for n, passage in enumerate(self._passages) if passage.document == document]
        return self._passages[max(own, key=covered.__getitem__)] if own else None

    def nearest(self, text: str, count: int, around: str | None = None) -> list[Passage]:
        """Up to ``count`` passages that cover enough of a question, the nearest first; ``around``:
        as of :meth:`mlx_hmem.retriever.Retriever.near`."""
        covered = self._words.covered(text, around)
        order = (-covered).argsort(kind="stable")[:count]
        return [self._passages[number] for number in order if covered[number] >= NEAR]


def _allowed(model: MemoryModel, blocked: Collection[Barred]) -> dict[str, str | None]:
    """The documents of a model by hash: the names of those of which all blocks may be fetched."""
    banks, found = model.require_banks(), dict[str, str | None]()
    for name, part in banks.parts.items():
        barred = part.bank.config.check_blocked(banks.blocked_in(blocked, name))
        for document in part.documents:
            free = not any(part.bank.bars(*key) or key in barred for key in document.keys)
            found[document.sha256] = document.name if free else found.get(document.sha256)
    return found


def beside(
    passages: Sequence[Passage],
    text: str,
    ids_of: Callable[[str], list[int]],
    context: int | None,
    max_tokens: int,
) -> tuple[str, list[Passage]]:
    """The text behind as many of the passages as leave room for an answer, and these.

    ``ids_of``: the ids of a prompt; UserError for one that is longer than the context.
    """
    for count in range(len(passages), 0, -1):
        shown = "\n\n".join([*(passage.text for passage in passages[:count]), text])
        with contextlib.suppress(UserError):
            ids = ids_of(shown)
            if context is None or len(ids) + min(max_tokens, context // ANSWER) <= context:
                return shown, list(passages[:count])
    return text, []


def answer_alone(passages: object, asked: bool, name: str | None) -> bool:
    """Whether these passages, if there are any, stand in place of the memory: where none was
    ``asked`` for, by its mode or its ``name``. What has learned to answer from itself reads less
    (docs/own_documents.md)."""
    return bool(passages) and not asked and name is None


def passages_line(passages: Sequence[Passage], near: int) -> str:
    """Of which documents they are, of so many that were near, for people."""
    names = ", ".join(printable(passage.document) for passage in passages) or "none"
    left = near - len(passages)
    return f"passages: {names}{f', no room for {left} more' if left else ''}"
