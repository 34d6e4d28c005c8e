"""Blocks by (level, cluster) from wherever they are: kept in memory, or read from their file.

Where a path leads, who may fetch what and what is said of it afterwards, the reader knows.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from mlx_hmem.bank.format import Key
from mlx_hmem.bank.read.arriving import ArrivingBlock, KeptBlock
from mlx_hmem.bank.read.blocks import StoredBlock, pieces_read
from mlx_hmem.bank.read.cache import KeptBlocks
from mlx_hmem.bank.read.shards import Shards, most_open
from mlx_hmem.bank.read.storage import Missing, Storage
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Block, BlockRead, Source


class Sources:
    """The blocks of ``storage``, and those of them that are kept. For several threads."""

    def __init__(self, storage: Storage, shards: Shards, kept: KeptBlocks):
        self.storage, self.kept = storage, kept
        self._shards, self._lock = shards, threading.Lock()

    def obtain(self, keys: Iterable[Key]) -> None:
        """Has the files of blocks that are not kept brought here, if they are not here yet."""
        self._shards.obtain([key for key in keys if key not in self.kept])

    def blocks(self, keys: Sequence[Key]) -> list[tuple[Block, BlockRead]]:
        """Blocks in the bank's dtype, quantised ones packed, and where each came from; UserError as
        of the bank."""
        self.obtain(keys)
        with self._lock:
            # So many that the files of all of them can be open at once.
            most = most_open()
            groups = (keys[start : start + most] for start in range(0, len(keys), most))
            return [found for group in groups for found in self._group(group)]

    def begin(self, keys: Sequence[Key]) -> list[tuple[ArrivingBlock | KeptBlock, BlockRead]]:
        """As :meth:`blocks`, but those that are not kept have only begun to be read."""
        self.obtain(keys)
        with self._lock:
            found = self._found(keys)
            sizes = {k: self.storage.layouts[k[0]].block_bytes for k in keys if k not in found}
            # What the cache will not hold need not be there as a whole beside the joined layers.
            passing = sizes.keys() - self.kept.lasting(sizes)
            missing = self.storage.begin(list(sizes), in_layers=passing)
            arriving = {each.key: self._arriving(each) for each in missing}
            blocks: list[tuple[ArrivingBlock | KeptBlock, BlockRead]] = []
            for key in keys:
                if key in found:
                    block, source = found[key]
                    kept = KeptBlock(self.storage, key[0], block)
                    blocks.append((kept, self._read(key, source)))
                else:
                    blocks.append((arriving[key], self._read(key, "disk")))
            return blocks

    def stored(self, key: Key) -> StoredBlock:
        """A block as it lies in its file."""
        self._shards.obtain([key])
        with self._lock:
            return self.storage.finish(*self.storage.begin([key]))

    def read_ahead(self, key: Key) -> Iterator[int]:
        """Reads a block for the system's page cache, and yields the bytes of each piece; none if it
        is kept, cannot be read, or lies in a file that is not here."""
        if key in self.kept or self._shards.away(*key):
            return
        with suppress(UserError, OSError):  # said when it is asked for
            with self._lock:
                place = self.storage.place(key)
            for count in pieces_read(place):
                with self._lock:
                    self.storage.bytes_read += count
                yield count

    def forget(self, key: Key) -> None:
        """Closes the file that a block lies in; it is opened and checked anew when needed."""
        with self._lock:
            self._shards.forget(*key)

    def let_go(self) -> None:
        """Lets go of the kept blocks."""
        with self._lock:
            self.kept.clear()

    def close(self) -> None:
        """Closes the files, and lets go of the kept blocks."""
        with self._lock:
            self.storage.close()
            self.kept.clear()

    def _group(self, keys: Sequence[Key]) -> list[tuple[Block, BlockRead]]:
        found = self._found(keys)
        missing = self.storage.begin([key for key in dict.fromkeys(keys) if key not in found])
        try:
            for each in missing:
                found[each.key] = self.storage.finish(each), "disk"
                self.kept.keep(each.key, found[each.key][0])
        finally:
            for each in missing:
                each.reading.release()
        blocks = []
        for key in keys:
            block, source = found[key]
            if source == "disk":
                found[key] = block, "cache"  # where the same call asks for it again
            blocks.append((self.storage.block(key[0], block), self._read(key, source)))
        return blocks

    def _read(self, key: Key, source: Source) -> BlockRead:
        return BlockRead(*key, self.storage.layouts[key[0]].block_bytes, source)

    def _found(self, keys: Sequence[Key]) -> dict[Key, tuple[StoredBlock, Source]]:
        """The blocks that are kept in memory, and where."""
        pairs = ((key, self.kept.get(key)) for key in keys)
        return {key: found for key, found in pairs if found is not None}

    def _arriving(self, missing: Missing) -> ArrivingBlock:
        def finish() -> None:
            with self._lock:
                block = self.storage.finish(missing)
                if not missing.in_layers:
                    self.kept.keep(missing.key, block)

        return ArrivingBlock(self.storage, missing, finish)
