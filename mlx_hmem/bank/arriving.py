"""A memory that is used while it is still being read, layer by layer.

The first layers of the anchor need only the first bytes of each block. What has been read is handed
out before the checksum of its block is known; the last layer waits for it, so that no token comes
of a damaged block.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_hmem.bank.blocks import Reading
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import Rows, join_blocks


@dataclass
class ArrivingBlock:
    """A block that is being read. ``decode`` gives the block as far as it has been read, or waits
    for all of it where it is quantised; ``finish`` waits, verifies and keeps it. Both raise
    UserError. A block that was kept before has no ``reading``."""

    reading: Reading | None
    decode: Callable[[int], mx.array]
    finish: Callable[[], object]

    @classmethod
    def of(cls, array: mx.array) -> "ArrivingBlock":
        """A block that is here."""
        return cls(None, lambda nbytes: array, lambda: None)


class ArrivingMemory:
    """The blocks of one cluster path; what MemorySlot calls ArrivingRows. For one thread."""

    def __init__(self, blocks: Sequence[ArrivingBlock], config: MemoryConfig, dtype: mx.Dtype):
        self._blocks, self._config, self._dtype = blocks, config, dtype
        self._rows: list[Rows] = []
        self._begun = time.perf_counter()
        self.arrived_ms = 0.0  # from the beginning until all of it was there, once it is

    def is_here(self, place: int) -> bool:
        """Whether the layer at this place need not be waited for."""
        readings = [b.reading for b in self._blocks if b.reading is not None]
        return place < len(self._rows) or all(
            r.is_here(self._needed(r.nbytes, place)) for r in readings
        )

    def __getitem__(self, place: int) -> Rows:
        """The rows of the layer at this place, (rows, R, width) for each group, in ``dtype``.

        Raises UserError where a block is damaged or unreadable.
        """
        while len(self._rows) <= place:
            self._rows.append(self._layer(len(self._rows)))
        return self._rows[place]

    def wait(self) -> None:
        """Waits for all layers."""
        self[self._config.num_memory_layers - 1]

    def take(self) -> list[Rows | None]:
        """The rows of each layer, all waited for and given away: not to be used again."""
        self.wait()
        rows, self._rows = self._rows, []
        return list(rows)

    def _layer(self, place: int) -> Rows:
        parts = []
        for block in self._blocks:
            nbytes = 0 if block.reading is None else self._needed(block.reading.nbytes, place)
            parts.append(block.decode(nbytes)[place])
        if place == self._config.num_memory_layers - 1:
            for block in self._blocks:
                block.finish()
            self.arrived_ms = (time.perf_counter() - self._begun) * 1e3
        return tuple(group.astype(self._dtype) for group in join_blocks(parts, self._config))

    def _needed(self, nbytes: int, place: int) -> int:
        """The bytes of a block up to the end of a layer."""
        return -(-nbytes * (place + 1) // self._config.num_memory_layers)
