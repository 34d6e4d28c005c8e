"""Hierarchical memories for language models on MLX (arXiv 2510.02375)."""

from typing import TYPE_CHECKING, Any

from mlx_hmem._blas import prefer_openblas

prefer_openblas()

if TYPE_CHECKING:
    from mlx_hmem.loading import load
    from mlx_hmem.model import MemoryModel

__all__ = ["MemoryModel", "load"]


def __getattr__(name: str) -> Any:
    # mlx-lm takes seconds to import; programs that need only the bank or the tree skip it.
    if name in __all__:
        from mlx_hmem import loading

        return getattr(loading, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
