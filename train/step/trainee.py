"""What the training loop drives."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..ranks import Ranks
from ..store.checkpoint import Progress


class Sequences(Protocol):
    """Sequences of tokens by number: an array, or buckets of several lengths, the longest first."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(sequences, longest + 1)."""

    def __getitem__(self, rows: np.ndarray, /) -> np.ndarray:
        """The sequences numbered ``rows``, which are of one length."""


class Trainee(Protocol):
    """What a training stage brings: a step on some sequences, and where its state is kept."""

    ranks: Ranks

    @property
    def tokens(self) -> Sequences:
        """All sequences, (n, context + 1)."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values: ``sizes``, which the shapes of the state follow from, and how it trains
        beside the configuration of the training."""

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
