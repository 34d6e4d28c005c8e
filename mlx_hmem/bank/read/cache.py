"""Blocks that stay in memory: all of some levels once they are read, of the others those used last.

Blocks are kept as they are stored: of a quantised bank the same budget holds two to seven times as
many.
"""

from collections import OrderedDict
from collections.abc import Collection

from mlx_hmem.bank.format import Key
from mlx_hmem.bank.read.blocks import StoredBlock
from mlx_hmem.memory import Source


class KeptBlocks:
    """At most ``cache_bytes`` of recently used blocks, and beside them those of
    ``resident_levels``."""

    def __init__(self, resident_levels: Collection[int], cache_bytes: int):
        self.resident_levels, self.cache_bytes = tuple(resident_levels), cache_bytes
        self._resident: dict[Key, StoredBlock] = {}
        self._cache: OrderedDict[Key, StoredBlock] = OrderedDict()
        self._cached_bytes = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._resident or key in self._cache

    def get(self, key: Key) -> tuple[StoredBlock, Source] | None:
        """The block, if it is kept, and where; the cache counts that as a use."""
        if (block := self._resident.get(key)) is not None:
            return block, "resident"
        if (block := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            return block, "cache"
        return None

    def lasting(self, sizes: dict[Key, int]) -> set[Key]:
        """Which of some blocks, given with their bytes, will be here when all of them have come
        in this order."""
        lasting, room = set(), self.cache_bytes
        for key in reversed(sizes):
            if key[0] in self.resident_levels:
                lasting.add(key)
            elif sizes[key] <= room:
                lasting.add(key)
                room -= sizes[key]
        return lasting

    def keep(self, key: Key, block: StoredBlock) -> None:
        if key in self:
            return  # two threads have read it at the same time
        if key[0] in self.resident_levels:
            self._resident[key] = block
        elif block.nbytes <= self.cache_bytes:
            self._cached_bytes += block.nbytes
            while self._cached_bytes > self.cache_bytes:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= oldest.nbytes
            self._cache[key] = block

    def clear(self) -> None:
        self._resident.clear()
        self._cache.clear()
        self._cached_bytes = 0
