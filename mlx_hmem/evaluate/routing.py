"""Routing of many texts at once, for each kind of memory."""

from collections.abc import Sequence

from mlx_hmem.errors import UserError
from mlx_hmem.model import MODES, MemoryModel


def route_texts(
    model: MemoryModel, texts: Sequence[str], memory: str, progress: bool = False
) -> list[tuple[int, ...]] | None:
    """The cluster path of each text, or None where ``memory`` needs no path."""
    if memory not in MODES:
        raise UserError("unknown memory mode", repr(memory), f"use one of {', '.join(MODES)}")
    if memory != "none" and (model.bank is None or model.retriever is None):
        raise UserError("this model has no memory bank", f"memory {memory}", "use memory none")
    if memory != "fetched":
        return None
    assert model.retriever is not None
    return model.retriever.route_many(texts, progress)
