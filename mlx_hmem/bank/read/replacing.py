"""A memory of which the deeper levels are replaced, layer by layer as they arrive.

Writing one level into the joined rows moves that level's bytes only; joining all levels again moves
all of them (docs/chat.md has both times).
"""

import mlx.core as mx

from mlx_hmem.bank.read.arriving import ArrivingMemory
from mlx_hmem.memory import Rows


class ReplacingMemory:
    """``before``, the rows of each layer, with those from ``start`` on taken from ``deeper``.

    It empties the list: of arrays that nobody else holds, MLX writes into the memory itself. For
    one thread.
    """

    def __init__(self, before: list[Rows | None], deeper: ArrivingMemory, start: int):
        self._before, self._deeper, self._start = before, deeper, start
        self._rows: list[Rows] = []

    @property
    def arrived_ms(self) -> float:
        """As of :class:`ArrivingMemory`, of what is new."""
        return self._deeper.arrived_ms

    def is_here(self, place: int) -> bool:
        """Whether the layer at this place need not be waited for."""
        return place < len(self._rows) or self._deeper.is_here(place)

    def __getitem__(self, place: int) -> Rows:
        """The rows of the layer at this place, (rows, R, width) for each group."""
        while len(self._rows) <= place:
            self._rows.append(self._layer(len(self._rows)))
        return self._rows[place]

    def wait(self) -> None:
        """Waits for all layers."""
        self[len(self._before) - 1]

    def take(self) -> list[Rows | None]:
        """As :meth:`ArrivingMemory.take`."""
        self.wait()
        rows, self._rows = self._rows, []
        return list(rows)

    def _layer(self, place: int) -> Rows:
        new = self._deeper[place]
        old, self._before[place] = self._before[place], None
        assert old is not None
        start = mx.array([self._start])
        return tuple(
            mx.slice_update(group, part, start, axes=[group.ndim - 2])
            for group, part in zip(old, new, strict=True)
        )
