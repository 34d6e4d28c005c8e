"""Reads the blocks of one cluster path out of a bank of any size.

Opening validates the manifest and every header and touches no block. A block is one contiguous run,
read with ``preadv`` straight into MLX buffers, one for each of its parts: no other block's pages
are brought in, and a file that shrinks is a short read rather than a bus error, as it would be
under mmap. The price is that a block is copied out of the page cache once.

Resident memory is ``cache_bytes``, plus the visited blocks of ``resident_levels``, whatever the
size of the bank. Blocks are kept as they are stored, and a quantised one is dequantised on every
fetch: of 16-bit memory the same budget then holds two to seven times the blocks. The price is work,
10 to 70 ns a value on one busy Linux core; on Metal it has not been measured.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import mlx.core as mx

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
from mlx_hmem.bank.quantization import dequantize_block
from mlx_hmem.bank.shards import MOST_OPEN, Obtain, OpenShard, Shards
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory

CACHE_BYTES = 256 << 20
Source = Literal["disk", "cache", "resident"]


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
        self.bytes_read = 0
        self.last_fetch: list[BlockRead] = []
        self._layouts = {level.level: level for level in manifest.all_levels}
        self._quantization = {n: manifest.quantization_of(n) for n in self._layouts}
        self._parts = {
            n: block_parts(self.config, n, self.dtype, q) for n, q in self._quantization.items()
        }
        self._shards, self._reader, self._lock = shards, BlockReader(), threading.Lock()
        self._resident: dict[tuple[int, int], StoredBlock] = {}
        self._cache: OrderedDict[tuple[int, int], StoredBlock] = OrderedDict()
        self._cached_bytes = 0

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

    def fetch(
        self, path: tuple[int, ...], blocked: frozenset[tuple[int, int]] = frozenset()
    ) -> FetchedMemory:
        """The blocks of one cluster path, in the bank's dtype.

        Args:
            path: the global cluster index on each level.
            blocked: (level, cluster) pairs that may not be fetched. The path ends above the first
                that it meets: neither that block nor a deeper one is read (paper, section 6).

        Raises:
            UserError: no such path or cluster, or a block is damaged or unreadable.
        """
        path = self.config.check_path(path)
        self._check_blocked(blocked)
        blocks: list[mx.array | None] = [None] * len(path)
        keys = list(takewhile(lambda key: key not in blocked, enumerate(path, 1)))
        keys = [key for key in keys if key[0] in self._layouts]
        for (level, _), block in zip(keys, self.blocks(keys), strict=True):
            blocks[level - 1] = block
        return FetchedMemory(tuple(blocks), self.config)

    def generic(self) -> FetchedMemory:
        """The generic memory: one block of sum(r) rows, in the bank's dtype."""
        return FetchedMemory(tuple(self.blocks([(GENERIC, 0)])), self.config)

    def blocks(self, keys: Sequence[tuple[int, int]]) -> list[mx.array]:
        """Blocks by (level, cluster), in the bank's dtype; (0, 0) is the generic memory.

        Raises:
            UserError: there is no such block, or one is damaged or unreadable.
        """
        for level, cluster in keys:
            if level not in self._layouts or not 0 <= cluster < num_blocks(self.config, level):
                raise UserError("no such block", (level, cluster), "give (level, cluster) pairs")
        self._shards.obtain([k for k in keys if not self._kept(k)])
        with self._lock:
            self.last_fetch = []
            # So many that the files of all of them can be open at once.
            groups = (keys[start : start + MOST_OPEN] for start in range(0, len(keys), MOST_OPEN))
            return [block for group in groups for block in self._group(group)]

    def stored(self, level: int, cluster: int) -> StoredBlock:
        """A block as it lies in its file, for making another bank of; errors as :meth:`blocks`."""
        self._shards.obtain([(level, cluster)])
        with self._lock:
            return next(self._read([(level, cluster)]))[1]

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
            self._resident.clear()
            self._cache.clear()
            self._cached_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_blocked(self, blocked: frozenset[tuple[int, int]]) -> None:
        counts = self.config.num_clusters
        for pair in blocked:
            match pair:
                case (int(level), int(cluster)) if (
                    1 <= level <= len(counts) and 0 <= cluster < counts[level - 1]
                ):
                    continue
            raise UserError("no such cluster to block", pair, "give (level, cluster) pairs")

    def _group(self, keys: Sequence[tuple[int, int]]) -> list[mx.array]:
        found: dict[tuple[int, int], tuple[StoredBlock, Source]] = {}
        for key in keys:
            if (block := self._resident.get(key)) is not None:
                found[key] = block, "resident"
            elif (block := self._cache.get(key)) is not None:
                self._cache.move_to_end(key)
                found[key] = block, "cache"
        for key, block in self._read([key for key in dict.fromkeys(keys) if key not in found]):
            self._keep(key, block)
            found[key] = block, "disk"
        blocks = []
        for key in keys:
            block, source = found[key]
            self.last_fetch.append(BlockRead(*key, self._layouts[key[0]].block_bytes, source))
            if source == "disk":
                found[key] = block, "cache"  # where the same call asks for it again
            blocks.append(self._decode(key[0], block))
        return blocks

    def _decode(self, level: int, block: StoredBlock) -> mx.array:
        dtype, quantization = STORED_TYPES[self.dtype].dtype, self._quantization[level]
        arrays = block.arrays(self._parts[level])
        if quantization is None:
            return arrays[0]
        return dequantize_block(arrays, self.config, dtype, quantization)

    def _keep(self, key: tuple[int, int], block: StoredBlock) -> None:
        if key[0] in self.resident_levels:
            self._resident[key] = block
        elif block.nbytes <= self.cache_bytes:
            self._cached_bytes += block.nbytes
            while self._cached_bytes > self.cache_bytes:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= oldest.nbytes
            self._cache[key] = block

    def _kept(self, key: tuple[int, int]) -> bool:
        return key in self._resident or key in self._cache

    def _read(
        self, keys: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], StoredBlock]]:
        """Reads blocks from their files and, the first time, verifies their checksums."""
        found = [self._shards.find(*key) for key in keys]
        places = [
            Place(shard.file, PAGE + row * self._layouts[level].block_stride, self._parts[level])
            for (level, _), (shard, row) in zip(keys, found, strict=True)
        ]
        readings = list(self._reader.begin(places))
        try:
            for key, (shard, row), reading in zip(keys, found, readings, strict=True):
                block = self._finish(key, shard, row, reading)
                self.bytes_read += block.nbytes
                yield key, block
        finally:
            for reading in readings:
                reading.release()

    def _finish(
        self, key: tuple[int, int], shard: OpenShard, row: int, reading: Reading
    ) -> StoredBlock:
        level, cluster = key
        where = "the generic memory" if level == GENERIC else f"level {level}, cluster {cluster}"
        try:
            result = reading.result(with_checksum=not shard.verified[row])
        except OSError as error:
            raise UserError(f"cannot read {where} of the bank", error, REMEDY) from None
        if result is None:
            raise UserError(f"{where} of the bank is cut off", shard.file.name, REMEDY)
        block, checksum = result
        if not shard.verified[row]:
            if checksum != shard.shard.xxh3[16 * row : 16 * row + 16]:
                raise UserError(f"{where} of the bank is damaged", shard.file.name, REMEDY)
            shard.verified[row] = 1
        return block
