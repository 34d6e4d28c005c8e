"""How well a model routes: another encoder beside its own, prompts beside statements, and the
first words of a document beside the whole.

Another encoder's vectors go through the model's own tree, so it must work in the same space, as
"minilm" and "static" do. A route is right on a level when it reaches there the cluster of the
statement (of the whole document, of the other encoder).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.facts import Fact, Proportion
from mlx_hmem.evaluate.paper.fact_runs import FactRun
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import Encoder, Retriever

FIRST_WORDS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class RoutingRow:
    """``shares``: of some texts, on each level, how many were routed (or answered) right."""

    group: str
    name: str
    shares: tuple[Proportion, ...]

    def to_dict(self) -> dict[str, Any]:
        levels = [share.to_dict() for share in self.shares]
        return {"group": self.group, "name": self.name, "levels": levels}


def same_cluster(first: np.ndarray, second: np.ndarray) -> tuple[Proportion, ...]:
    """On each level the share of equal clusters of two arrays of paths (n, depth)."""
    return tuple(Proportion.among(column) for column in (first == second).T.tolist())


def document_rows(model: MemoryModel, texts: Sequence[str], other: Encoder | None = None,
                  progress: bool = True) -> list[RoutingRow]:  # fmt: skip
    """Agreement with another encoder, and of the first words with the whole text: of the texts
    that have more words than that."""
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UserError("there is no text to route", "no document", "give some text")
    retriever = model.require_retriever()
    tree = retriever.tree
    whole = tree.route_batch(retriever.vectors(texts, progress))
    rows = []
    if other is not None:
        rows += encoder_rows(retriever, other, texts, whole, progress)
    words = [text.split() for text in texts]
    for count in FIRST_WORDS:
        longer = [i for i, some in enumerate(words) if len(some) > count]
        if longer:
            starts = [" ".join(words[i][:count]) for i in longer]
            found = tree.route_batch(retriever.vectors(starts))
            shares = same_cluster(found, whole[longer])
            rows.append(RoutingRow("as the whole document", f"first {count} words", shares))
    return rows


def encoder_rows(retriever: Retriever, other: Encoder, texts: Sequence[str], whole: np.ndarray,
                 progress: bool = True) -> list[RoutingRow]:  # fmt: skip
    """Agreement of two encoders on whole texts and on their first 8 words."""
    own = retriever.encoder
    if other.dim != own.dim:
        dims = f"{other.dim} dimensions, not {own.dim}"
        raise UserError("another space than the model's encoder", dims, "choose another --encoder")
    group = f"{own.name} as {other.name}"
    found = retriever.tree.route_batch(other.encode(texts, progress=progress))
    rows = [RoutingRow(group, "documents", same_cluster(whole, found))]
    starts = [" ".join(text.split()[:8]) for text in texts]
    paths = [retriever.tree.route_batch(each.encode(starts)) for each in (own, other)]
    return [*rows, RoutingRow(group, "first 8 words", same_cluster(*paths))]


def fact_rows(run: FactRun, facts: Sequence[Fact]) -> list[RoutingRow]:
    """Which prompts reach their statement's cluster, and the accuracy of those that do and do not;
    the facts are routed by their prompts."""
    route = run.model.require_retriever().route_many
    paths = route([fact.prompt for fact in facts], run.progress)
    prompts, statements = (
        np.array(paths),
        np.array(route([f.statement for f in facts], run.progress)),
    )
    right = np.array(run.recall(facts, "fetched", paths).right)
    reached = prompts == statements
    rows = [RoutingRow("facts", "prompt reaches its statement", same_cluster(prompts, statements))]
    for name, chosen in (("answered where it does", reached), ("answered where not", ~reached)):
        shares = tuple(Proportion.among(right[column].tolist()) for column in chosen.T)
        rows.append(RoutingRow("facts", name, shares))
    return rows
