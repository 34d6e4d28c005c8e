"""Recall of facts whose continuations are kept as they come, and its buckets by decades of counts.

What is kept is the text, not whether it is right: other counts, or another rule for what is right,
need no new run.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import xxhash

from mlx_hmem.config import ClusterPath
from mlx_hmem.evaluate.facts import (
    Fact,
    FactRecall,
    Proportion,
    encode_prompts,
    fact_paths,
    is_right,
)
from mlx_hmem.evaluate.journal import Journal, kept_rows
from mlx_hmem.evaluate.rag.rag import Rag, RagSummary, named
from mlx_hmem.evaluate.scoring import LONGEST, Candidate, continue_greedily
from mlx_hmem.model.model import MemoryModel


@dataclass(frozen=True)
class FactRun:
    """How :meth:`recall` asks: ``out`` is the folder that keeps continuations, ``model_name`` tells
    models apart (:func:`model_fingerprint`), ``integers`` the rule for numbers, "first" or "any".
    ``route`` and ``seed`` are those of :func:`mlx_hmem.evaluate.facts.recall`."""

    model: MemoryModel
    out: Path
    model_name: str
    integers: str = "first"
    route: str = "prompt"
    seed: int = 0
    progress: bool = True

    def paths(self, facts: Sequence[Fact], memory: str = "fetched") -> list[ClusterPath] | None:
        return fact_paths(self.model, facts, memory, self.route, self.seed, None, self.progress)

    def recall(
        self,
        facts: Sequence[Fact],
        memory: str,
        paths: Sequence[ClusterPath] | None = None,
        label: str = "",
        rag: Rag | None = None,
    ) -> FactRecall:
        """As :func:`mlx_hmem.evaluate.facts.recall`, going on where a run was cut short. ``label``
        names the result in place of ``memory``. ``rag`` sets a document before each prompt, found
        by the bare prompt whatever routes the memory."""
        if paths is None or memory != "fetched":
            paths = self.paths(facts, memory)
        settings = {
            "version": 1,
            "model": self.model_name,
            "memory": memory,
            "facts": _digest([[f.prompt, f.answer, *f.aliases] for f in facts]),
            "paths": None if paths is None else _digest([list(path) for path in paths]),
            **({"rag": rag.index.fingerprint} if rag else {}),
        }
        name = named(memory, rag)
        label = label or name
        journal = Journal(self.out, f"facts.{name}", settings)
        score = partial(self._continued, facts, memory=memory, paths=paths, rag=rag)
        desc = f"facts, {label}"
        rows = kept_rows(journal, range(len(facts)), score, desc, "fact", self.progress)
        texts = tuple(row["text"] for row in rows)
        right = tuple(is_right(f, t, self.integers) for f, t in zip(facts, texts, strict=True))
        documents = RagSummary.of(rows) if rag else None
        return FactRecall(label, tuple(facts), texts, right, documents)

    def _continued(
        self,
        facts: Sequence[Fact],
        rows: Sequence[int],
        memory: str,
        paths: Sequence[ClusterPath] | None,
        rag: Rag | None,
    ) -> Iterator[list[dict[str, Any]]]:
        """What is kept of those ``rows`` of ``facts``, a batch at a time."""
        prompts, new = encode_prompts(self.model, facts)
        ids, some = [prompts[i] for i in rows], paths and [paths[i] for i in rows]
        documents: list[dict[str, Any]] = [{} for _ in rows]
        if rag is not None:
            plain = [[Candidate(each, [])] for each in ids]
            room = (self.model.context or LONGEST) - new
            shown = rag.show_all([facts[i].prompt for i in rows], plain, room)
            ids = [each.candidates[0].context for each in shown]
            documents = [s.kept(q, new) for s, q in zip(shown, plain, strict=True)]
            for i, kept, each in zip(rows, documents, shown, strict=True):
                kept["holds_answer"] = _holds(facts[i], rag.index.text(each.found.document))
        for batch in continue_greedily(self.model, ids, new, memory, some):
            texts = [(i, self.model.tokenizer.decode(tokens)) for i, tokens in batch]
            yield [{"row": rows[i], "text": text} | documents[i] for i, text in texts]


def _holds(fact: Fact, text: str) -> bool:
    """Whether an answer stands in the text, as a word or words of its own."""
    answers = "|".join(map(re.escape, (fact.answer, *fact.aliases)))
    return re.search(rf"(?<!\w)(?:{answers})(?!\w)", text) is not None


def _digest(values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, ensure_ascii=False).encode())


def count_buckets(result: FactRecall) -> list[Proportion]:
    """The result by decades of counts: 0, 1 to 9, 10 to 99 and so on, those that hold facts."""
    decades: dict[int, list[bool]] = {}
    for fact, right in zip(result.facts, result.right, strict=True):
        decades.setdefault(len(str(fact.times)) if fact.times else 0, []).append(right)
    return [
        Proportion.among(right, least=10 ** (d - 1) if d else 0, most=10**d - 1)
        for d, right in sorted(decades.items())
    ]


def decade(bucket: Proportion) -> str:
    """The counts of one of :func:`count_buckets`, for people."""
    least, most = bucket.of["least"], bucket.of["most"]
    return str(least) if least == most else f"{least:,}–{most:,}"
