"""Blocking: what a model still knows while the best-matching part of its bank is withheld.

For every prompt the cluster that it is routed to on one level, 1/k of the bank's clusters on level
1, 1/k² on level 2, is withheld with everything below. The prompt then fetches the best path that is
left, as it would from a bank that never had those blocks. The paper (section 6) does not say
whether its prompts fetch the next best or nothing; nothing, on level 1, is the row of the anchor
alone. A view of a bank (``mlx_hmem.bank block``) ends the path above what it bars.

Beside it: the same with another cluster of that level, drawn by a seed, whose path stays as it was;
and of the facts that the whole bank answers, how many each row still answers, for the anchor alone
and the generic memory too: what has leaked into them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.facts import Fact, FactRecall, Proportion
from mlx_hmem.evaluate.paper.fact_runs import FactRun
from mlx_hmem.evaluate.routing import used_clusters, withhold
from mlx_hmem.model.model import MemoryModel


@dataclass(frozen=True)
class BlockingRow:
    """One way of asking. ``level`` is that of the withheld cluster, 0 where none is; ``withheld``
    the part of the level's clusters; ``moved`` the facts whose path is another than with the whole
    bank; ``known`` the accuracy on the facts that the whole bank answers right."""

    name: str
    level: int
    withheld: float
    moved: int
    accuracy: Proportion
    known: Proportion

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"accuracy": self.accuracy.to_dict(), "known": self.known.to_dict()}


def blocking(run: FactRun, facts: Sequence[Fact], levels: Sequence[int]) -> list[BlockingRow]:
    """The table of the module's docstring; the facts are routed by their prompts."""
    paths = run.paths(facts)
    assert paths is not None  # it is the fetched memory's
    whole = run.recall(facts, "fetched", paths)
    rows = [_row("nothing withheld", 0, 0.0, 0, whole, whole)]
    for other in (False, True):
        for level in sorted(levels, reverse=True):
            rows.append(_withheld_row(run, facts, paths, whole, level, other))
    for memory, name in (("generic", "generic memory"), ("none", "anchor alone")):
        rows.append(_row(name, 0, 1.0, len(facts), run.recall(facts, memory), whole))
    return rows


def _withheld_row(
    run: FactRun,
    facts: Sequence[Fact],
    paths: list[ClusterPath],
    whole: FactRecall,
    level: int,
    other: bool,
) -> BlockingRow:
    prompts, clusters = [f.prompt for f in facts], None
    if other:
        clusters = other_clusters(run.model, paths, level, run.seed)
    left = withhold(run.model, prompts, level, clusters, run.progress)
    count = len(used_clusters(run.model, level))
    name = f"{'another' if other else 'best'} 1/{count} withheld"
    moved = sum(a != b for a, b in zip(left, paths, strict=True))
    found = run.recall(facts, "fetched", left, name)
    return _row(name, level, 1 / count, moved, found, whole)


def _row(
    name: str, level: int, withheld: float, moved: int, found: FactRecall, whole: FactRecall
) -> BlockingRow:
    known = [r for r, before in zip(found.right, whole.right, strict=True) if before]
    parts = Proportion.among(found.right), Proportion.among(known)
    return BlockingRow(name, level, withheld, moved, *parts)


def other_clusters(
    model: MemoryModel, paths: Sequence[ClusterPath], level: int, seed: int
) -> list[int]:
    """For each path a cluster of ``level``, with examples, that it does not take."""
    used = used_clusters(model, level)
    if len(used) < 2:
        raise UserError("the level has one cluster", f"level {level}", "choose a deeper level")
    rng = random.Random(seed)
    return [rng.choice([c for c in used if c != path[level - 1]]) for path in paths]
