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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import mlx.core as mx

from mlx_hmem.bank.arriving import ArrivingBlock, ArrivingMemory
from mlx_hmem.bank.blocks import StoredBlock
from mlx_hmem.bank.format import (
    GENERIC,
    MANIFEST,
    Manifest,
    num_blocks,
)
from mlx_hmem.bank.kept import KeptBlocks, Key, Source
from mlx_hmem.bank.shards import MOST_OPEN, Obtain, Shards
from mlx_hmem.bank.storage import Missing, Storage
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
        self.last_fetch: list[BlockRead] = []
        self.last_damage: dict[Key, UserError] = {}
        self._storage, self._lock = Storage(manifest, shards), threading.Lock()
        self._shards, self._layouts = shards, self._storage.layouts

    @property
    def bytes_read(self) -> int:
        """Bytes that have been read from the files so far."""
        return self._storage.bytes_read

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
        self,
        path: tuple[int, ...],
        blocked: frozenset[Key] = frozenset(),
        damaged: Literal["stop", "skip"] = "stop",
    ) -> FetchedMemory:
        """The blocks of one cluster path, in the bank's dtype.

        Args:
            path: the global cluster index on each level.
            blocked: (level, cluster) pairs that may not be fetched. The path ends above the first
                that it meets: neither that block nor a deeper one is read (paper, section 6).
            damaged: with "skip" a block that cannot be read, nor at a second try with its file
                opened anew, is left out; ``last_damage`` says which and why.

        Raises:
            UserError: no such path or cluster, or a block is damaged or unreadable.
        """
        keys = self.keys_of(path, blocked)
        found = self.blocks(keys) if damaged == "stop" else self.sound_blocks(keys)
        blocks: list[mx.array | None] = [None] * self.config.num_levels
        for (level, _), block in zip(keys, found, strict=True):
            blocks[level - 1] = block
        return FetchedMemory(tuple(blocks), self.config)

    def begin(
        self,
        path: tuple[int, ...],
        blocked: frozenset[Key] = frozenset(),
        dtype: mx.Dtype = mx.float32,
        above: int = 0,
    ) -> ArrivingMemory | None:
        """As :meth:`fetch`, but does not wait: the layers of the memory, in ``dtype``, are there as
        they are asked for. None if no block may be fetched. The first ``above`` levels are left out
        for who has them already."""
        keys = [key for key in self.keys_of(path, blocked) if key[0] > above]
        self._shards.obtain([k for k in keys if k not in self._kept])
        with self._lock:
            self.last_fetch = []
            found = self._found(keys)
            missing = {m.key: m for m in self._storage.begin([k for k in keys if k not in found])}
            blocks = []
            for key in keys:
                if key in found:
                    block, source = found[key]
                    self._note(key, source)
                    array = self._storage.decode(key[0], block)
                    blocks.append(ArrivingBlock.of(array))
                else:
                    self._note(key, "disk")
                    blocks.append(self._arriving(missing[key]))
        return ArrivingMemory(blocks, self.config, dtype) if blocks else None

    def generic(self, damaged: Literal["stop", "skip"] = "stop") -> FetchedMemory:
        """The generic memory: one block of sum(r) rows, in the bank's dtype."""
        fetch = self.blocks if damaged == "stop" else self.sound_blocks
        return FetchedMemory(tuple(fetch([(GENERIC, 0)])), self.config)

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

    def sound_blocks(self, keys: Sequence[Key]) -> list[mx.array | None]:
        """As :meth:`blocks`, but None for one that cannot be read, nor at a second try with its
        file opened anew: a disk may have been away. ``last_damage`` then
        has its UserError, by key."""
        self.last_damage = {}
        if any(level not in self._layouts for level, _ in keys):
            return list(self.blocks(keys))  # no damage: there never was such a block
        self._shards.obtain([k for k in keys if k not in self._kept])  # nor is what never came
        try:
            return list(self.blocks(keys))
        except UserError:
            pass
        found: list[mx.array | None] = []
        reads: list[BlockRead] = []
        for key in keys:
            found.append(self._sound_block(key))
            reads += [] if found[-1] is None else self.last_fetch
        self.last_fetch = reads
        return found

    def _sound_block(self, key: Key) -> mx.array | None:
        for _ in range(2):
            try:
                return self.blocks([key])[0]
            except UserError as error:
                damage = error
                with self._lock:
                    self._shards.forget(*key)
        self.last_damage[key] = damage
        return None

    def block_bytes(self, level: int) -> int:
        """The bytes of one block of a level as it is stored."""
        return self._layouts[level].block_bytes

    def keeps(self, key: Key) -> bool:
        """Whether a block is in memory."""
        return key in self._kept

    def touch(self, keys: Iterable[Key]) -> int:
        """Counts a use of those blocks that are kept; the bytes of the cache that they take."""
        with self._lock:
            found = [self._kept.get(key) for key in keys]
        return sum(each[0].nbytes for each in found if each is not None and each[1] == "cache")

    def prefetch(self, key: Key) -> int:
        """Reads a block that may be asked for soon, to be kept; the bytes read, which
        ``bytes_read`` counts, ``last_fetch`` does not. 0 for one that is kept, cannot be read, or
        lies in a shard that is not here yet."""
        if key in self._kept or self._shards.away(*key):
            return 0
        try:
            block = self.stored(*key)
        except UserError:
            return 0  # said when it is asked for
        with self._lock:
            self._kept.keep(key, block)
        return block.nbytes

    def stored(self, level: int, cluster: int) -> StoredBlock:
        """A block as it lies in its file, for making another bank of; errors as :meth:`blocks`."""
        self._shards.obtain([(level, cluster)])
        with self._lock:
            return self._storage.finish(*self._storage.begin([(level, cluster)]))

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
            self._storage.close()
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

    def keys_of(self, path: tuple[int, ...], blocked: frozenset[Key]) -> list[Key]:
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
        missing = self._storage.begin([key for key in dict.fromkeys(keys) if key not in found])
        try:
            for each in missing:
                found[each.key] = self._storage.finish(each), "disk"
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
            blocks.append(self._storage.decode(key[0], block))
        return blocks

    def _found(self, keys: Sequence[Key]) -> dict[Key, tuple[StoredBlock, Source]]:
        """The blocks that are kept in memory, and where."""
        pairs = ((key, self._kept.get(key)) for key in keys)
        return {key: found for key, found in pairs if found is not None}

    def _note(self, key: Key, source: Source) -> None:
        self.last_fetch.append(BlockRead(*key, self._layouts[key[0]].block_bytes, source))

    def _arriving(self, missing: Missing) -> ArrivingBlock:
        level = missing.key[0]

        def finish() -> StoredBlock:
            with self._lock:
                block = self._storage.finish(missing)
                self._kept.keep(missing.key, block)
                return block

        whole: list[mx.array] = []  # dequantised once, not for each layer

        def decode(nbytes: int) -> mx.array:
            quantised = self._storage.quantization[level] is not None
            missing.wait_for(missing.reading.nbytes if quantised else nbytes)
            if not whole:
                whole.append(self._storage.decode(level, missing.reading.block))
            return whole[0]

        return ArrivingBlock(missing.reading, decode, finish)
