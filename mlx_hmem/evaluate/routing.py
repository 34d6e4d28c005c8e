"""Routing of many texts at once, for each kind of memory."""

from collections.abc import Sequence

from mlx_hmem.model import MemoryModel, check_mode


def route_texts(
    model: MemoryModel, texts: Sequence[str], memory: str, progress: bool = False
) -> list[tuple[int, ...]] | None:
    """The cluster path of each text, or None where ``memory`` needs no path."""
    if check_mode(memory) != "none":
        model.require_bank()
    if memory != "fetched":
        return None
    assert model.retriever is not None  # load() makes both or neither
    return model.retriever.route_many(texts, progress)
