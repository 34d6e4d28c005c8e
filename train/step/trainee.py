"""What the training loop drives."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..data.buckets import Buckets
from ..store.checkpoint import Progress


class Trainee(Protocol):
    """What a training stage brings: a step on some sequences, and where its state is kept."""

    @property
    def tokens(self) -> np.ndarray | Buckets:
        """All sequences, (n, context + 1)."""

    @property
    def sizes(self) -> dict[str, Any]:
        """JSON values that the shapes of the state follow from."""

    def step(
        self, rows: np.ndarray, learning_rate: float, next_rows: np.ndarray | None = None
    ) -> tuple[float, float]:
        """Trains on the sequences numbered ``rows``; returns the mean loss in nats per token and
        the norm of the gradient before clipping. If either is not finite, the state stays as it
        was. ``next_rows``: those of the step after, for what can be fetched meanwhile."""

    def resume(self, folder: Path, identity: dict[str, Any]) -> Progress:
        """Takes up the state saved in ``folder``; it must be of the same ``identity``."""

    def save(self, folder: Path, progress: Progress) -> None:
        """Saves the state and ``progress`` so that ``folder`` holds either both or the last."""
