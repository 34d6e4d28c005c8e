"""Where the turns of a conversation are routed, each by itself and by the words before it."""

from collections.abc import Collection, Sequence

import numpy as np

from mlx_hmem.bank.views import Barred
from mlx_hmem.config import ClusterPath
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever.steady import steady_route

# Measured on conversations made of articles (docs/chat.md).
WINDOW = 32  # words
WEIGHT = 0.7  # of the turn itself; the rest is the window's
MARGIN = 0.1  # L2 beyond a cluster's boundary


def window_of(turns: Sequence[tuple[str, str]], text: str) -> str | None:
    """The last words of a conversation of ``turns``, each what was said and answered, and of
    ``text``, which is said now; None for the first turn."""
    said = [part for turn in turns for part in turn]
    return " ".join(" ".join([*said, text]).split()[-WINDOW:]) if turns else None


class Topic:
    """The path in use, ``present``, and its ``bank``.

    A turn goes to the document that turn and window are about. Else it goes to the clusters that no
    known document has taught, where a level changes only when the topic has clearly left its
    cluster.
    """

    def __init__(self, model: MemoryModel, blocked: Collection[Barred], margin: float):
        self._model, self._blocked, self._margin = model, blocked, margin
        self.present: ClusterPath | None = None
        self.bank = ""

    def route(self, text: str, window: str | None) -> tuple[np.ndarray, str, ClusterPath | None]:
        """The vector of a turn, and the bank and the path of its memory, None where nothing is
        near. ``window``: the last words of the conversation, the turn's among them; None for the
        first turn."""
        banks, vector = self._model.require_banks(), self._vector(text, window)
        near = banks.near(text, window)
        bank, path = near or banks.nearest(vector, self._blocked)
        present = self.present if bank == self.bank else None
        rest = None if near is not None else banks.retriever(bank).rest
        if rest is not None and present is not None and rest.counts[0][present[0]]:
            path = steady_route(rest, vector, present, self._margin)
        self.bank, self.present = bank, path
        return vector, bank, path

    def _vector(self, text: str, window: str | None) -> np.ndarray:
        """Turn and window as one vector."""
        own, around = self._model.require_retriever().encoder.encode([text, window or text])
        if window is None:
            return own
        vector = WEIGHT * own + (1 - WEIGHT) * around
        return vector / max(float(np.linalg.norm(vector)), 1e-12)
