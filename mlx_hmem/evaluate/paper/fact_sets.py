"""The facts that a command asks for: training's JSON lines, a user's CSV, the atomic numbers."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.facts import Fact, FactRecall, read_facts
from mlx_hmem.evaluate.paper.counting import corpus_files, count_names
from mlx_hmem.evaluate.paper.fact_runs import count_buckets
from mlx_hmem.evaluate.paper.fact_tables import atomic_numbers, read_fact_table
from mlx_hmem.evaluate.rag.rag import in_json


@dataclass(frozen=True)
class FactSet:
    """Facts with the names that each is counted by, none for those of training, which say how often
    they were stated. ``corpus`` is what was counted, "" for none; ``integers`` the rule of numbers:
    the paper's for tables, training's own is stricter."""

    name: str
    facts: tuple[Fact, ...]
    keys: tuple[tuple[str, ...], ...] = ()
    corpus: str = ""

    @property
    def is_table(self) -> bool:
        return bool(self.keys)

    @property
    def integers(self) -> str:
        return "any" if self.is_table else "first"

    def to_dict(self, results: Sequence[FactRecall]) -> dict[str, Any]:
        """The results of a table, by buckets and fact by fact."""
        rows: list[dict[str, Any]] = [
            {
                "prompt": fact.prompt,
                "answers": [fact.answer, *fact.aliases],
                **({"count": fact.times} if self.corpus else {}),
                "continuations": {r.memory: r.continuations[i] for r in results},
                "right": {r.memory: r.right[i] for r in results},
            }
            for i, fact in enumerate(self.facts)
        ]
        of_memory = [
            {
                "memory": r.memory,
                "all": r.bucket().to_dict(),
                **in_json(r.documents, r.flops),
                **({"buckets": [b.to_dict() for b in count_buckets(r)]} if self.corpus else {}),
            }
            for r in results
        ]
        return {"name": self.name, "corpus": self.corpus, "results": of_memory, "facts": rows}


def fact_sets(
    path: Path | None, elements: bool, corpus: Path | None, limit: int | None
) -> list[FactSet]:
    """The sets of a command, ``limit`` facts of each; ``corpus`` is checked, not yet counted."""
    sets = []
    if elements:
        facts, keys = atomic_numbers()
        sets.append(FactSet("atomic numbers", tuple(facts), tuple(keys)))
    if path is not None and path.suffix == ".csv":
        facts, keys = read_fact_table(path)
        sets.append(FactSet(path.name, tuple(facts), tuple(keys)))
    elif path is not None:
        sets.append(FactSet(path.name, tuple(read_facts(path))))
        if not sets[-1].facts:
            raise UserError(f"{path} has no facts", "an empty file", "write one into each line")
    if corpus is not None:
        corpus_files(corpus)
        if not any(each.is_table for each in sets):
            what = "facts as JSON lines say how often they were stated"
            raise UserError(what, path, "leave --corpus out, or give a CSV")
    return [_limited(each, limit) for each in sets]


def _limited(each: FactSet, limit: int | None) -> FactSet:
    if limit is None or len(each.facts) <= limit:
        return each
    # At random: the first would share few topics.
    some = random.Random(0).sample(range(len(each.facts)), limit)
    keys = tuple(each.keys[i] for i in some) if each.keys else ()
    return replace(each, facts=tuple(each.facts[i] for i in some), keys=keys)


def counted(each: FactSet, corpus: Path | None, out: Path) -> FactSet:
    """A table whose facts have the counts of their names in ``corpus`` for ``times``."""
    if corpus is None or not each.is_table:
        return each
    counts = count_names(each.keys, corpus, out)
    facts = tuple(replace(f, times=n) for f, n in zip(each.facts, counts, strict=True))
    return replace(each, facts=facts, corpus=str(corpus))
