"""Routing of many texts at once, for each kind of memory."""

from collections.abc import Sequence

from tqdm import tqdm

from mlx_hmem.config import ClusterPath
from mlx_hmem.model.fetch import check_mode
from mlx_hmem.model.model import MemoryModel


def route_texts(
    model: MemoryModel, texts: Sequence[str], memory: str, progress: bool = False, withheld: int = 0
) -> list[ClusterPath] | None:
    """The cluster path of each text, or None where ``memory`` needs no path.

    ``withheld`` is a level whose best cluster, the one that a text is routed to, and all below it
    are taken from that text's tree; 0 for none.
    """
    if check_mode(memory) != "none":
        model.require_bank()
    if memory != "fetched":
        return None
    if not withheld:
        return model.require_retriever().route_many(texts, progress)
    return withhold(model, texts, withheld, progress=progress)


def used_clusters(model: MemoryModel, level: int) -> list[int]:
    """The clusters of ``level`` that have examples."""
    return model.require_retriever().tree.counts[level - 1].nonzero()[0].tolist()


def withhold(
    model: MemoryModel,
    texts: Sequence[str],
    level: int,
    others: Sequence[int] | None = None,
    progress: bool = False,
) -> list[ClusterPath]:
    """The best path of each text that avoids its own best cluster on ``level``; with ``others``,
    a cluster of that level per text, that one instead."""
    retriever = model.require_retriever()
    tree, vectors = retriever.tree, retriever.vectors(texts, progress)
    if others is None:
        others = tree.route_batch(vectors)[:, level - 1].tolist()
    pairs = zip(vectors, others, strict=True)
    bar = tqdm(pairs, desc="routing", total=len(texts), unit="text", disable=not progress)
    return [tree.route(vector, barred=[(level, cluster)]) for vector, cluster in bar]
