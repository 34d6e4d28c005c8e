"""Reads the blocks of one cluster path out of a bank of any size.

Opening validates the manifest and every header and touches no block. A block is one contiguous run,
read with ``preadv`` straight into MLX buffers, one for each of its parts: no other block's pages
are brought in, and a file that shrinks is a short read rather than a bus error, as it would be
under mmap. The price is that a block is copied out of the page cache once.

Resident memory is ``cache_bytes``, plus the visited blocks of ``resident_levels``, whatever the
size of the bank. Blocks are kept as they are stored, and a quantised one is dequantised on every
fetch: work of 10 to 70 ns a value on one busy Linux core; on Metal it has not been measured.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import mlx.core as mx

from mlx_hmem.bank.arriving import ArrivingBlock, ArrivingMemory
from mlx_hmem.bank.blocks import BlockReader, Place, Reading, StoredBlock
from mlx_hmem.bank.format import (
    GENERIC,
    MANIFEST,
    PAGE,
    REMEDY,
    STORED_TYPES,
    Manifest,
    block_parts,
    num_blocks,
)
from mlx_hmem.bank.kept import KeptBlocks, Key, Source
from mlx_hmem.bank.quantization import dequantize_block
from mlx_hmem.bank.shards import MOST_OPEN, Obtain, OpenShard, Shards
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class BlockRead:
    """Where a block of a fetched memory came from; level 0 is the generic memory."""

    level: int
    cluster: int
    bytes: int
    source: Source


class Bank:
    """An open memory bank. Use :meth:`open`; close it, or use it as a context manager.

    ``last_fetch`` lists the blocks of the latest fetch; ``bytes_read`` counts the bytes that all
    fetches so far have read from files.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: Shards,
        resident_levels: tuple[int, ...],
        cache_bytes: int,
    ):
        self.manifest, self.config, self.dtype = manifest, manifest.memory, manifest.dtype
        self.anchor_hash, self.tree_hash = manifest.anchor_hash, manifest.tree_hash
        self.resident_levels, self.cache_bytes = resident_levels, cache_bytes
        self._kept = KeptBlocks(resident_levels, cache_bytes)
        self.bytes_read = 0
        self.last_fetch: list[BlockRead] = []
        self._layouts = {level.level: level for level in manifest.all_levels}
        self._quantization = {n: manifest.quantization_of(n) for n in self._layouts}
        self._parts = {
            n: block_parts(self.config, n, self.dtype, q) for n, q in self._quantization.items()
        }
        self._shards, self._reader, self._lock = shards, BlockReader(), threading.Lock()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        resident_levels: tuple[int, ...] = (),
        cache_bytes: int = CACHE_BYTES,
        level_folders: dict[int, Path] | None = None,
        obtain: Obtain | None = None,
    ) -> "Bank":
        """Opens the bank in ``folder`` and validates it without touching a block.

        Args:
            resident_levels: levels whose blocks stay in memory once read (1 = coarsest).
            cache_bytes: most bytes of recently used blocks of the other levels to keep; 0 for none.
            level_folders: folders of levels that lie elsewhere than ``folder``.
            obtain: shards may be missing; it is called with the names of those that a fetch needs
                and must put them into ``folder``. No thread that needs none of them waits for it.

        Raises:
            UserError: a file is missing or damaged, of a newer format, or not as the manifest says.
        """
        folder, elsewhere = Path(folder), level_folders or {}
        if cache_bytes < 0:
            raise UserError("cache_bytes is negative", cache_bytes, "use 0 for no cache")
        manifest = Manifest.from_file(folder / MANIFEST)
        for number in (*resident_levels, *elsewhere):
            if not 1 <= number <= manifest.memory.num_levels:
                raise UserError(
                    "the bank has no such level", number, f"use 1 to {manifest.memory.num_levels}"
                )
        shards = Shards(manifest, folder, elsewhere, obtain)
        try:
            shards.check()
        except BaseException:
            shards.close()
            raise
        return cls(manifest, shards, tuple(resident_levels), cache_bytes)

    def fetch(self, path: tuple[int, ...], blocked: frozenset[Key] = frozenset()) -> FetchedMemory:
        """The blocks of one cluster path, in the bank's dtype.

        Args:
            path: the global cluster index on each level.
            blocked: (level, cluster) pairs that may not be fetched. The path ends above the first
                that it meets: neither that block nor a deeper one is read (paper, section 6).

        Raises:
            UserError: no such path or cluster, or a block is damaged or unreadable.
        """
        keys = self._keys(path, blocked)
        blocks: list[mx.array | None] = [None] * self.config.num_levels
        for (level, _), block in zip(keys, self.blocks(keys), strict=True):
            blocks[level - 1] = block
        return FetchedMemory(tuple(blocks), self.config)

    def begin(
        self,
        path: tuple[int, ...],
        blocked: frozenset[Key] = frozenset(),
        dtype: mx.Dtype = mx.float32,
    ) -> ArrivingMemory | None:
        """As :meth:`fetch`, but does not wait: the layers of the memory, in ``dtype``, are there as
        they are asked for. None if no block may be fetched."""
        keys = self._keys(path, blocked)
        self._shards.obtain([k for k in keys if k not in self._kept])
        with self._lock:
            self.last_fetch = []
            found = self._found(keys)
            missing = {m.key: m for m in self._begin([k for k in keys if k not in found])}
            blocks = []
            for key in keys:
                if key in found:
                    block, source = found[key]
                    self._note(key, source)
                    array = self._decode(key[0], block)
                    blocks.append(ArrivingBlock.of(array))
                else:
                    self._note(key, "disk")
                    blocks.append(self._arriving(missing[key]))
        return ArrivingMemory(blocks, self.config, dtype) if blocks else None

    def generic(self) -> FetchedMemory:
        """The generic memory: one block of sum(r) rows, in the bank's dtype."""
        return FetchedMemory(tuple(self.blocks([(GENERIC, 0)])), self.config)

    def blocks(self, keys: Sequence[Key]) -> list[mx.array]:
        """Blocks by (level, cluster), in the bank's dtype; (0, 0) is the generic memory.

        Raises:
            UserError: there is no such block, or one is damaged or unreadable.
        """
        for level, cluster in keys:
            if level not in self._layouts or not 0 <= cluster < num_blocks(self.config, level):
                raise UserError("no such block", (level, cluster), "give (level, cluster) pairs")
        self._shards.obtain([k for k in keys if k not in self._kept])
        with self._lock:
            self.last_fetch = []
            # So many that the files of all of them can be open at once.
            groups = (keys[start : start + MOST_OPEN] for start in range(0, len(keys), MOST_OPEN))
            return [block for group in groups for block in self._group(group)]

    def stored(self, level: int, cluster: int) -> StoredBlock:
        """A block as it lies in its file, for making another bank of; errors as :meth:`blocks`."""
        self._shards.obtain([(level, cluster)])
        with self._lock:
            return self._finish(*self._begin([(level, cluster)]))

    def check(self, anchor_hash: str, tree_hash: str) -> None:
        """Raises UserError unless the bank was made for this anchor and this cluster tree."""
        for name, mine, given in (
            ("anchor", self.anchor_hash, anchor_hash),
            ("cluster tree", self.tree_hash, tree_hash),
        ):
            if mine != given:
                raise UserError(
                    f"the memory bank was made for another {name}",
                    f"{mine}, not {given}",
                    f"use the bank that came with this {name}, or train one for it",
                )

    def close(self) -> None:
        """Closes the files and lets go of the kept blocks; fetched memories stay valid."""
        with self._lock:
            self._reader.close()
            self._shards.close()
            self._kept.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _keys(self, path: tuple[int, ...], blocked: frozenset[Key]) -> list[Key]:
        """(level, cluster) of the blocks of a path, as far down as is not blocked."""
        path = self.config.check_path(path)
        self._check_blocked(blocked)
        keys = takewhile(lambda key: key not in blocked, enumerate(path, 1))
        return [key for key in keys if key[0] in self._layouts]

    def _check_blocked(self, blocked: frozenset[Key]) -> None:
        counts = self.config.num_clusters
        for pair in blocked:
            match pair:
                case (int(level), int(cluster)) if (
                    1 <= level <= len(counts) and 0 <= cluster < counts[level - 1]
                ):
                    continue
            raise UserError("no such cluster to block", pair, "give (level, cluster) pairs")

    def _group(self, keys: Sequence[Key]) -> list[mx.array]:
        found = self._found(keys)
        missing = self._begin([key for key in dict.fromkeys(keys) if key not in found])
        try:
            for each in missing:
                found[each.key] = self._finish(each), "disk"
                self._kept.keep(each.key, found[each.key][0])
        finally:
            for each in missing:
                each.reading.release()
        blocks = []
        for key in keys:
            block, source = found[key]
            self._note(key, source)
            if source == "disk":
                found[key] = block, "cache"  # where the same call asks for it again
            blocks.append(self._decode(key[0], block))
        return blocks

    def _found(self, keys: Sequence[Key]) -> dict[Key, tuple[StoredBlock, Source]]:
        """The blocks that are kept in memory, and where."""
        pairs = ((key, self._kept.get(key)) for key in keys)
        return {key: found for key, found in pairs if found is not None}

    def _note(self, key: Key, source: Source) -> None:
        self.last_fetch.append(BlockRead(*key, self._layouts[key[0]].block_bytes, source))

    def _arriving(self, missing: "_Missing") -> ArrivingBlock:
        level = missing.key[0]

        def finish() -> StoredBlock:
            with self._lock:
                block = self._finish(missing)
                self._kept.keep(missing.key, block)
                return block

        def decode(nbytes: int) -> mx.array:
            if self._quantization[level] is not None:
                missing.reading.wait_for(missing.reading.nbytes)
            else:
                missing.reading.wait_for(nbytes)
            return self._decode(level, missing.reading.block)

        return ArrivingBlock(missing.reading, decode, finish)

    def _decode(self, level: int, block: StoredBlock) -> mx.array:
        dtype, quantization = STORED_TYPES[self.dtype].dtype, self._quantization[level]
        arrays = block.arrays(self._parts[level])
        if quantization is None:
            return arrays[0]
        return dequantize_block(arrays, self.config, dtype, quantization)

    def _begin(self, keys: Sequence[Key]) -> list["_Missing"]:
        """Begins to read blocks from their files."""
        found = [self._shards.find(*key) for key in keys]
        places = [
            Place(shard.file, PAGE + row * self._layouts[level].block_stride, self._parts[level])
            for (level, _), (shard, row) in zip(keys, found, strict=True)
        ]
        first_time = [not shard.verified[row] for shard, row in found]
        readings = self._reader.begin(places, first_time)
        return [
            _Missing(key, *place, reading)
            for key, place, reading in zip(keys, found, readings, strict=True)
        ]

    def _finish(self, missing: "_Missing") -> StoredBlock:
        """The block when all of it is read and, the first time, its checksum found right."""
        (level, cluster), shard, row, reading = missing
        where = "the generic memory" if level == GENERIC else f"level {level}, cluster {cluster}"
        try:
            checksum = reading.result()
        except OSError as error:
            raise UserError(f"cannot read {where} of the bank", error, REMEDY) from None
        if checksum is None:
            raise UserError(f"{where} of the bank is cut off", shard.file.name, REMEDY)
        if reading.with_checksum:
            if checksum != shard.shard.xxh3[16 * row : 16 * row + 16]:
                raise UserError(f"{where} of the bank is damaged", shard.file.name, REMEDY)
            shard.verified[row] = 1
        self.bytes_read += reading.nbytes
        return reading.block


class _Missing(NamedTuple):
    """A block that is being read: (level, cluster), and where it lies."""

    key: Key
    shard: OpenShard
    row: int
    reading: Reading
