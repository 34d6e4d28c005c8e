"""Recall of facts whose continuations are kept as they come, and its buckets by decades of counts.

What is kept is the text, not whether it is right: other counts, or another rule for what is right,
need no new run.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.facts import (
    Fact,
    FactRecall,
    Proportion,
    continue_prompts,
    encode_prompts,
    fact_paths,
    is_right,
)
from mlx_hmem.evaluate.journal import Journal
from mlx_hmem.evaluate.rag.rag import LONGEST, Rag, RagSummary, with_rag
from mlx_hmem.evaluate.scoring import Candidate, continue_greedily
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
    batch_size: int = field(default=64, repr=False)

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
        if not facts:
            raise UserError("there are no facts to recall", "an empty list", "give some facts")
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
        label = label or (with_rag(memory) if rag else memory)
        name = f"facts.{with_rag(memory) if rag else memory}"
        with Journal(self.out, name, settings).open() as journal:
            missing = [i for i in range(len(facts)) if i not in journal.rows]
            bar = tqdm(total=len(facts), initial=len(facts) - len(missing), unit="fact",
                       desc=f"facts, {label}", disable=not self.progress)  # fmt: skip
            with bar:
                batches: Iterator[list[dict[str, Any]]]
                if rag is None:
                    options = (memory, paths, self.batch_size)
                    found = continue_prompts(self.model, facts, missing, *options)
                    batches = ([{"row": row, "text": text} for row, text in b] for b in found)
                else:
                    batches = _with_documents(rag, facts, missing, memory, paths)
                for batch in batches:
                    journal.add(batch)
                    bar.update(len(batch))
            rows = [journal.rows[i] for i in range(len(facts))]
        texts = tuple(row["text"] for row in rows)
        right = tuple(is_right(f, t, self.integers) for f, t in zip(facts, texts, strict=True))
        documents = RagSummary.of(rows) if rag else None
        return FactRecall(label, tuple(facts), texts, right, documents)


def _with_documents(
    rag: Rag,
    facts: Sequence[Fact],
    rows: Sequence[int],
    memory: str,
    paths: Sequence[ClusterPath] | None,
) -> Iterator[list[dict[str, Any]]]:
    """What is kept of those ``rows`` of ``facts``, a batch at a time."""
    tokenizer = rag.model.tokenizer
    prompts, new = encode_prompts(rag.model, facts)
    plain = [[Candidate(prompts[i], [])] for i in rows]
    room = (rag.model.context or LONGEST) - new
    shown = rag.show_all([facts[i].prompt for i in rows], plain, room)
    ids = [each.candidates[0].context for each in shown]
    some = None if paths is None else [paths[i] for i in rows]
    for batch in continue_greedily(rag.model, ids, new, memory, some):
        yield [
            {
                "row": rows[i],
                "text": tokenizer.decode(tokens),
                **shown[i].kept(plain[i], new),
                "holds_answer": _holds(facts[rows[i]], rag.index.text(shown[i].found.document)),
            }
            for i, tokens in batch
        ]


def _holds(fact: Fact, text: str) -> bool:
    """Whether an answer stands in the text, as a word or words of its own."""
    answers = "|".join(map(re.escape, (fact.answer, *fact.aliases)))
    return re.search(rf"(?<!\w)(?:{answers})(?!\w)", text) is not None


def _digest(values: Any) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, ensure_ascii=False).encode())


@dataclass(frozen=True)
class CountBucket(Proportion):
    """Recall of the facts whose names stand ``least`` to ``most`` times in the corpus."""

    least: int
    most: int
    right: int
    total: int

    @property
    def name(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least:,}–{self.most:,}"


def count_buckets(result: FactRecall) -> list[CountBucket]:
    """The result by decades of counts: 0, 1 to 9, 10 to 99 and so on, those that hold facts."""
    decades: dict[int, list[bool]] = {}
    for fact, right in zip(result.facts, result.right, strict=True):
        decades.setdefault(len(str(fact.times)) if fact.times else 0, []).append(right)
    return [
        CountBucket(10 ** (d - 1) if d else 0, 10**d - 1, sum(right), len(right))
        for d, right in sorted(decades.items())
    ]
