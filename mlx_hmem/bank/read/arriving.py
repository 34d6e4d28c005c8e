"""A memory that is used while it is still being read, layer by layer.

The first layers of the anchor need only the first bytes of each block. What has been read is handed
out before the checksum of its block is known; the last layer waits for it, so that no token comes
of a damaged block.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_hmem.bank.read.blocks import StoredBlock
from mlx_hmem.bank.read.storage import Missing, Storage
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import Block, BlockRead, join_blocks
from mlx_hmem.memory.packed import Rows, ready, replaced_end


@dataclass
class ArrivingBlock:
    """A block that ``storage`` is reading. ``finish`` waits for all of it and verifies it; that and
    waiting raise UserError."""

    storage: Storage
    missing: Missing
    finish: Callable[[], object]

    def is_here(self, place: int) -> bool:
        """Whether the layer at this place need not be waited for."""
        return self.missing.reading.is_here(self._needed(place))

    def wait_for(self, place: int) -> None:
        """Waits for the layer at this place; where the block is quantised, for all of it."""
        self.missing.wait_for(self._needed(place))

    def layer(self, place: int) -> Block:
        """The layer at this place, which has been waited for; each is asked for once, in order."""
        if self.missing.in_layers:
            return self.storage.take_layer(self.missing)
        return self.storage.layer(self.missing.key[0], self.missing.reading.block, place)

    def _needed(self, place: int) -> int:
        """The bytes of the block up to the end of a layer."""
        nbytes = self.missing.reading.nbytes
        if self.storage.quantization[self.missing.key[0]] is not None:
            return nbytes
        return -(-nbytes * (place + 1) // self.storage.config.num_memory_layers)


@dataclass
class KeptBlock:
    """A block that is kept in memory as it is stored."""

    storage: Storage
    level: int
    block: StoredBlock

    def layer(self, place: int) -> Block:
        """The layer at this place, in the bank's dtype."""
        return self.storage.layer(self.level, self.block, place)


class RowsByLayer:
    """The rows of each layer, made in order when they are first asked for; what MemorySlot calls
    ArrivingRows. For one thread."""

    arrived_ms = 0.0  # from the beginning until all of it was there, once it is

    def __init__(self, num_layers: int):
        self._num_layers, self._rows = num_layers, list[Rows]()

    def is_here(self, place: int) -> bool:
        """Whether the layer at this place need not be waited for."""
        return place < len(self._rows) or self._has_come(place)

    def __getitem__(self, place: int) -> Rows:
        """The rows of the layer at this place, (rows, R, width) for each group, waited for.

        Raises UserError where a block is damaged or unreadable.
        """
        while len(self._rows) <= place:
            self._rows.append(self._layer(len(self._rows)))
        return self._rows[place]

    def wait(self) -> None:
        """Waits for all layers."""
        self[self._num_layers - 1]

    def take(self) -> list[Rows | None]:
        """The rows of each layer, all waited for and given away: not to be used again."""
        self.wait()
        rows, self._rows = self._rows, []
        return list(rows)

    def _has_come(self, place: int) -> bool:
        raise NotImplementedError

    def _layer(self, place: int) -> Rows:
        raise NotImplementedError


class ArrivingMemory(RowsByLayer):
    """The blocks of one cluster path, those that are being read and those that are here, as rows in
    ``dtype``; ``reads`` says where each comes from."""

    def __init__(
        self,
        found: Sequence[tuple[ArrivingBlock | KeptBlock, BlockRead]],
        config: MemoryConfig,
        dtype: mx.Dtype,
    ):
        super().__init__(config.num_memory_layers)
        self.reads = tuple(read for _, read in found)
        self._blocks, self._config, self._dtype = [block for block, _ in found], config, dtype
        self._begun = time.perf_counter()

    @property
    def _arriving(self) -> list[ArrivingBlock]:
        return [block for block in self._blocks if isinstance(block, ArrivingBlock)]

    def _has_come(self, place: int) -> bool:
        return all(block.is_here(place) for block in self._arriving)

    def _layer(self, place: int) -> Rows:
        last = place == self._num_layers - 1
        for block in self._arriving:
            block.finish() if last else block.wait_for(place)
        parts = [block.layer(place) for block in self._blocks]
        if last:
            self._blocks = []
            self.arrived_ms = (time.perf_counter() - self._begun) * 1e3
        return ready(join_blocks(parts, self._config), self._dtype)


class ReplacingMemory(RowsByLayer):
    """``before``, the rows of each layer, with the last ones taken from ``deeper`` levels.

    Writing one level into the joined rows moves that level's bytes only; joining all levels again
    moves all of them (docs/chat.md has both times). It empties the list: of arrays that nobody else
    holds, MLX writes into the memory itself.
    """

    def __init__(self, before: list[Rows | None], deeper: ArrivingMemory):
        super().__init__(len(before))
        self._before, self._deeper = before, deeper

    def _has_come(self, place: int) -> bool:
        return self._deeper.is_here(place)

    def _layer(self, place: int) -> Rows:
        new = self._deeper[place]
        old, self._before[place] = self._before[place], None
        assert old is not None
        self.arrived_ms = self._deeper.arrived_ms  # of what is new
        return tuple(replaced_end(*pair) for pair in zip(old, new, strict=True))
