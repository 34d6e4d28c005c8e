"""Reads the blocks of one cluster path out of a bank of any size.

Opening validates the manifest and every header and touches no block. A block is one contiguous run,
read with ``preadv`` straight into MLX buffers, one for each of its parts: nothing is copied, no
other block's pages are brought in, and a file that shrinks is a short read rather than a bus error,
as it would be under mmap. The price is that a block is copied out of the page cache once, 4 ms for
36 MB.

Resident memory is ``cache_bytes``, plus the visited blocks of ``resident_levels``, whatever the
size of the bank. Blocks are kept as they are stored, and a quantised one is dequantised on every
fetch: of 16-bit memory the same budget then holds two to seven times the blocks. The price is work,
10 to 70 ns a value on one busy Linux core; on Metal it has not been measured.
"""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import mlx.core as mx

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
from mlx_hmem.bank.shards import OpenShard, StoredBlock, open_shard
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory

CACHE_BYTES = 256 << 20


@dataclass(frozen=True)
class BlockRead:
    """Where a block of a fetched memory came from; level 0 is the generic memory."""

    level: int
    cluster: int
    bytes: int
    source: Literal["disk", "cache", "resident"]


class Bank:
    """An open memory bank. Use :meth:`open`; close it, or use it as a context manager.

    ``last_fetch`` lists the blocks of the latest fetch; ``bytes_read`` counts the bytes that all
    fetches so far have read from files.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: dict[int, list[OpenShard]],
        files: ExitStack,
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
        self._shards, self._files, self._lock = shards, files, threading.Lock()
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
    ) -> "Bank":
        """Opens the bank in ``folder`` and validates it without touching a block.

        Args:
            resident_levels: levels whose blocks stay in memory once read (1 = coarsest).
            cache_bytes: most bytes of recently used blocks of the other levels to keep; 0 for none.
            level_folders: folders of levels that lie elsewhere than ``folder``.

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
        shards: dict[int, list[OpenShard]] = {}
        with ExitStack() as files:
            for level in manifest.all_levels:
                place = Path(elsewhere.get(level.level, folder))
                row = manifest.row_type(level.level)
                shards[level.level] = [
                    open_shard(place / shard.file, level, shard, row, files)
                    for shard in level.shards
                ]
            return cls(manifest, shards, files.pop_all(), tuple(resident_levels), cache_bytes)

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
        with self._lock:
            self.last_fetch = []
            self._hint([k for k in keys if k not in self._resident and k not in self._cache])
            return [self._block(level, cluster) for level, cluster in keys]

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
            self._files.close()
            self._shards = {}
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

    def _block(self, level: int, cluster: int) -> mx.array:
        key, num_bytes = (level, cluster), self._layouts[level].block_bytes
        source: Literal["disk", "cache", "resident"] = "disk"
        if (block := self._resident.get(key)) is not None:
            source = "resident"
        elif (block := self._cache.get(key)) is not None:
            self._cache.move_to_end(key)
            source = "cache"
        else:
            block = self._read(level, cluster)
            self._keep(key, block)
        self.last_fetch.append(BlockRead(level, cluster, num_bytes, source))
        return self._decode(level, block)

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

    def _place(self, level: int, cluster: int) -> tuple[OpenShard, int]:
        """The shard that holds a block, and the block's row in it."""
        if not self._shards:
            raise UserError("the bank is closed", f"level {level}", "open it again")
        shards = self._shards[level]
        index = bisect_right(shards, cluster, key=lambda s: s.shard.first_cluster) - 1
        return shards[index], cluster - shards[index].shard.first_cluster

    def _hint(self, keys: list[tuple[int, int]]) -> None:
        """Starts reading all blocks before the first is waited for: 10 % off a cold fetch."""
        if not hasattr(os, "posix_fadvise"):
            return
        for level, cluster in keys:
            place, row = self._place(level, cluster)
            layout = self._layouts[level]
            offset = PAGE + row * layout.block_stride
            with suppress(OSError):
                os.posix_fadvise(
                    place.file.fileno(), offset, layout.block_bytes, os.POSIX_FADV_WILLNEED
                )

    def _read(self, level: int, cluster: int) -> StoredBlock:
        """Reads one block from its file and, the first time, verifies its checksum."""
        where = "the generic memory" if level == GENERIC else f"level {level}, cluster {cluster}"
        place, row = self._place(level, cluster)
        offset = PAGE + row * self._layouts[level].block_stride
        try:
            block = StoredBlock.read(place.file, offset, self._parts[level])
        except OSError as error:
            raise UserError(f"cannot read {where} of the bank", error, REMEDY) from None
        if block is None:
            raise UserError(f"{where} of the bank is cut off", place.file.name, REMEDY)
        self.bytes_read += block.nbytes
        if not place.verified[row]:
            if block.checksum() != place.shard.xxh3[16 * row : 16 * row + 16]:
                raise UserError(f"{where} of the bank is damaged", place.file.name, REMEDY)
            place.verified[row] = 1
        return block
