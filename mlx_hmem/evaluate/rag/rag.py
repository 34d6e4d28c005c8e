"""Retrieval-augmented generation, the paper's baseline (section 6): one document in the prompt.

A question is routed by its own text, as for memory, and the nearest document by cosine among those
of its leaf is set before the prompt: the document's text, an empty line, then the prompt as it is
without it, examples first. The document's end is cut so that prompt and answer fit the context; the
prompt itself never loses a token to it, so where none is left the prompt goes without.
Document, empty line and prompt are tokenised apart.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_hmem.evaluate.rag.document_index import DocumentIndex, Found
from mlx_hmem.evaluate.rag.flops import Flops, Work, question_work
from mlx_hmem.evaluate.scoring import Candidate
from mlx_hmem.model.model import MemoryModel

SEPARATOR = "\n\n"
CHARACTERS = 32  # of a document that are tokenised, for each token of the context
Result = TypeVar("Result")  # FactRecall or TaskResult


@dataclass(frozen=True)
class Shown:
    """A question with its document: ``tokens`` of it that are shown; ``cut`` says whether that is
    not the whole document."""

    candidates: list[Candidate]
    found: Found
    tokens: int
    cut: bool

    def kept(self, plain: Sequence[Candidate], max_tokens: int = 0) -> dict[str, Any]:
        """What a journal keeps of it, with the :class:`Work` of ``plain``, the question without
        its document, and of this."""
        works = question_work(plain, max_tokens), question_work(self.candidates, max_tokens)
        return {
            "document": self.found.document,
            "in_leaf": self.found.in_leaf,
            "shown": self.tokens,
            "document_cut": self.cut,
            "work": [[work.tokens, work.pairs] for work in works],
        }


class Rag:
    """Documents of ``index`` for the questions that ``model`` is asked."""

    def __init__(self, model: MemoryModel, index: DocumentIndex, progress: bool = True):
        self.model, self.index, self.progress = model, index, progress
        self._separator = self._encode(SEPARATOR)
        start = list(model.tokenizer.encode(""))
        self._start = [
            i for i in start if len(start) == 1 or i not in model.tokenizer.eos_token_ids
        ]

    def _encode(self, text: str) -> list[int]:
        return list(self.model.tokenizer.encode(text, add_special_tokens=False))

    def find(self, questions: Sequence[str]) -> list[Found]:
        """The document of each question."""
        retriever = self.model.require_retriever()
        vectors = retriever.vectors(questions, self.progress)
        return self.index.nearest(vectors, retriever.tree.route_batch(vectors)[:, -1].tolist())

    def show_all(
        self, questions: Sequence[str], plain: Sequence[Sequence[Candidate]], context: int
    ) -> list[Shown]:
        """The candidates ``plain`` of each question with the document of the question."""
        pairs = zip(plain, self.find(questions), strict=True)
        return [self.show(candidates, found, context) for candidates, found in pairs]

    def show(self, candidates: Sequence[Candidate], found: Found, context: int) -> Shown:
        """The candidates of one question with the document in front, the same of it in each.

        ``context``: the most tokens of context and answer.
        """
        room = context - len(self._separator)
        room -= max(len(c.context) + len(c.answer) for c in candidates)
        if room < 1 or any(c.cut for c in candidates):
            return Shown(list(candidates), found, 0, True)
        text = self.index.text(found.document)
        part = text[: CHARACTERS * context]
        ids = self._encode(part)
        start = self._start
        if any(c.context[: len(start)] != start for c in candidates):
            start = []
        front = start + ids[:room] + self._separator
        shown = [c._replace(context=front + c.context[len(start) :]) for c in candidates]
        cut = len(ids) > room or len(part) < len(text)
        return Shown(shown, found, min(room, len(ids)), cut)


Arm = tuple[str, Rag | None]  # a kind of memory, with documents or without


@dataclass(frozen=True)
class RagSummary:
    """What is kept of all questions of a run: how many documents came ``in_leaf``, from the
    question's own leaf; how many lost their end, ``cut``, or all, ``left_out``; how many
    ``hold_answer``, None where nobody looked."""

    questions: int
    in_leaf: int
    cut: int
    left_out: int
    hold_answer: int | None
    alone: Work
    with_document: Work

    @classmethod
    def of(cls, rows: Sequence[dict[str, Any]]) -> "RagSummary":
        """Of what :meth:`Shown.kept` gave."""
        left_out = sum(not row["shown"] for row in rows)
        return cls(
            len(rows),
            sum(row["in_leaf"] for row in rows),
            sum(row["document_cut"] for row in rows) - left_out,
            left_out,
            sum(row["holds_answer"] for row in rows) if "holds_answer" in rows[0] else None,
            *(sum((Work(*row["work"][i]) for row in rows), Work()) for i in (0, 1)),
        )

    def line(self, name: str) -> str:
        answer = "" if self.hold_answer is None else f"; {self.hold_answer} hold an answer"
        return (
            f"{name}: {self.in_leaf} of {self.questions} documents are of the question's leaf, the "
            f"others of a cluster above{answer}; {self.cut} were cut to fit the context, "
            f"{self.left_out} left out"
        )


def in_json(documents: RagSummary | None, flops: float | None) -> dict[str, Any]:
    """What a result with these adds to its JSON."""
    found: dict[str, Any] = {} if flops is None else {"flops": flops}
    return found if documents is None else found | {"documents": dataclasses.asdict(documents)}


def named(memory: str, rag: Rag | None) -> str:
    """What results with this memory, and with documents or not, are called."""
    return f"{memory}+rag" if rag else memory


def with_flops(
    model: MemoryModel, results: Sequence[Result], arms: Sequence[Arm], name: str
) -> list[Result]:
    """The results of ``arms`` on one set of questions, of this ``name``, with their FLOPs to those
    of the anchor alone; says what became of the documents. As they are where none had any."""
    summary: RagSummary | None = vars(results[-1])["documents"]
    if summary is None:
        return list(results)
    print(summary.line(name), file=sys.stderr)
    flops = Flops(model)
    base = flops.of(summary.alone, "none")
    return [
        dataclasses.replace(  # type: ignore[type-var]
            result, flops=flops.of(summary.with_document if rag else summary.alone, memory) / base
        )
        for result, (memory, rag) in zip(results, arms, strict=True)
    ]
