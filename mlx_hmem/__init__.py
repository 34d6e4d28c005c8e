"""Hierarchical memories for language models on MLX (arXiv 2510.02375)."""

import importlib
from typing import TYPE_CHECKING, Any

from mlx_hmem._blas import prefer_openblas

prefer_openblas()

if TYPE_CHECKING:
    from mlx_hmem.generation.batch import batch_generate
    from mlx_hmem.generation.conversation import Conversation
    from mlx_hmem.model.load import load
    from mlx_hmem.model.model import MemoryModel

__all__ = ["Conversation", "MemoryModel", "batch_generate", "load"]

# mlx-lm takes seconds to import; programs that need only the bank or the tree skip it.
_HOMES = {
    "Conversation": "generation.conversation",
    "MemoryModel": "model.model",
    "batch_generate": "generation.batch",
    "load": "model.load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
