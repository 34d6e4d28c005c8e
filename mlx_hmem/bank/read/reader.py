"""Reads the blocks of one cluster path out of a bank of any size.

Opening validates the manifest and every header and touches no block. A block is one contiguous run,
read with ``preadv`` straight into MLX buffers, one for each of its parts: no other block's pages
are brought in, and a file that shrinks is a short read rather than a bus error, as it would be
under mmap. The price is that a block is copied out of the page cache once.

Resident memory is ``cache_bytes``, plus the visited blocks of ``resident_levels``, whatever the
size of the bank. Blocks are kept as they are stored, and a quantised one is given out packed: it is
made floats where a program asks for those (:mod:`mlx_hmem.memory.packed`).
"""

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Literal, Self

import mlx.core as mx

from mlx_hmem.bank.format import GENERIC, MANIFEST, REMEDY, STORED_TYPES, Key, Manifest, num_blocks
from mlx_hmem.bank.quantization import is_finite
from mlx_hmem.bank.read.arriving import ArrivingMemory
from mlx_hmem.bank.read.blocks import StoredBlock
from mlx_hmem.bank.read.cache import KeptBlocks
from mlx_hmem.bank.read.shards import Obtain, Shards
from mlx_hmem.bank.read.sources import Sources
from mlx_hmem.bank.read.storage import Storage
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Block, BlockRead, FetchedMemory, float_block

CACHE_BYTES = 256 << 20
Damaged = Literal["stop", "skip"]  # what a block that cannot be read does to a fetch


class Bank:
    """An open memory bank. Use :meth:`open`; close it, or use it as a context manager.

    ``bytes_read`` counts the bytes that all fetches so far have read from files; ``barred`` are
    clusters, as (level, cluster), of which it neither reads nor gives out the block or any below,
    whatever it is asked.
    """

    def __init__(
        self, manifest: Manifest, shards: Shards, resident_levels: tuple[int, ...], cache_bytes: int
    ):
        self.manifest, self.config, self.dtype = manifest, manifest.memory, manifest.dtype
        self.anchor_hash, self.tree_hash = manifest.anchor_hash, manifest.tree_hash
        self.resident_levels, self.cache_bytes = resident_levels, cache_bytes
        self._kept = KeptBlocks(resident_levels, cache_bytes)
        self.barred: frozenset[Key] = frozenset()
        storage = Storage(manifest, shards)
        self._sources, self._layouts = Sources(storage, shards, self._kept), storage.layouts

    @property
    def bytes_read(self) -> int:
        """Bytes that have been read from the files so far."""
        return self._sources.storage.bytes_read

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

    def view(self, blocked: Collection[ClusterPath]) -> "Bank":
        """The same open bank, its files and kept blocks, for someone who may not fetch all of it.

        ``blocked``: clusters, each as the path that leads to it, that are barred beside those that
        are already. A route through one ends above it. Closing a view closes the bank.
        """
        view = copy.copy(self)
        view.barred = self.barred | self.config.check_blocked(blocked)
        return view

    def bars(self, level: int, cluster: int) -> bool:
        """Whether this cluster, or one above it, is barred."""
        while self.barred and level > 0:
            if (level, cluster) in self.barred:
                return True
            level, cluster = level - 1, cluster // self.config.branching[level - 1]
        return False

    def fetch(
        self, path: ClusterPath, blocked: frozenset[Key] = frozenset(), damaged: Damaged = "stop"
    ) -> FetchedMemory:
        """The blocks of one cluster path, in the bank's dtype.

        Args:
            path: the global cluster index on each level.
            blocked: (level, cluster) pairs that may not be fetched. The path ends above the first
                that it meets: neither that block nor a deeper one is read (paper, section 6).
            damaged: with "skip" a block that cannot be read, nor at a second try with its file
                opened anew, is left out; the memory's ``damage`` says which and why.

        Raises:
            UserError: no such path or cluster, or a block is damaged or unreadable.
        """
        memory = self._fetch(self.keys_of(path, blocked), damaged)
        blocks: list[Block | None] = [None] * self.config.num_levels
        for read, block in zip(memory.reads, memory.stored, strict=True):
            blocks[read.level - 1] = block
        return replace(memory, stored=tuple(blocks))

    def begin(
        self,
        path: ClusterPath,
        blocked: frozenset[Key] = frozenset(),
        dtype: mx.Dtype = mx.float32,
        above: int = 0,
    ) -> ArrivingMemory | None:
        """As :meth:`fetch`, but does not wait: the layers of the memory, in ``dtype``, are there as
        they are asked for. None if no block may be fetched. The first ``above`` levels are left out
        for who has them already."""
        keys = [key for key in self.keys_of(path, blocked) if key[0] > above]
        found = self._sources.begin(keys)
        return ArrivingMemory(found, self.config, dtype) if found else None

    def generic(self, damaged: Damaged = "stop") -> FetchedMemory:
        """The generic memory: one block of sum(r) rows, in the bank's dtype."""
        memory = self._fetch([(GENERIC, 0)], damaged)
        return replace(memory, stored=memory.stored or (None,))

    def blocks(self, keys: Sequence[Key]) -> list[mx.array]:
        """Blocks by (level, cluster), as floats in the bank's dtype; (0, 0) is the generic memory.

        Raises:
            UserError: there is no such block, or one is barred, damaged or unreadable.
        """
        return [float_block(block) for block in self.packed_blocks(keys)]

    def packed_blocks(self, keys: Sequence[Key]) -> list[Block]:
        """As :meth:`blocks`, quantised ones as their groups of rows, packed."""
        self._check_keys(keys)
        return [block for block, _ in self._sources.blocks(keys)]

    def _fetch(self, keys: Sequence[Key], damaged: Damaged) -> FetchedMemory:
        """The blocks of ``keys``, as many as there are reads; errors as of :meth:`fetch`."""
        self._check_keys(keys)  # no damage: there never was such a block, or it may not be read
        self._sources.obtain(keys)  # nor is what never came
        damage: list[str] = []
        try:
            found = self._sources.blocks(keys)
        except UserError:
            if damaged == "stop":
                raise
            found = [each for key in keys for each in self._sound(key, damage)]
        blocks, reads = tuple(block for block, _ in found), tuple(read for _, read in found)
        return FetchedMemory(blocks, self.config, reads, tuple(damage))

    def _sound(self, key: Key, damage: list[str]) -> list[tuple[Block, BlockRead]]:
        """A block, or none and a line more of ``damage`` where it cannot be read, nor at a second
        try with its file opened anew: a disk may have been away."""
        error: UserError | None = None
        for _ in range(2):
            try:
                return self._sources.blocks([key])
            except UserError as found:
                error = found
                self._sources.forget(key)
        name = f"level {key[0]}" if key[0] else "generic memory"
        damage.append(f"without {name}: {error}")
        return []

    def block_bytes(self, level: int) -> int:
        """The bytes of one block of a level as it is stored."""
        return self._layouts[level].block_bytes

    def keeps(self, key: Key) -> bool:
        """Whether a block is in memory."""
        return key in self._kept

    def obtain(self, keys: Iterable[Key]) -> None:
        """Has the files brought here that blocks lie in and that are not here yet, but for those
        that are barred. Without MLX, for a thread beside. UserError: they cannot be had."""
        self._sources.obtain([key for key in keys if not self.bars(*key)])

    def read_ahead(self, key: Key) -> Iterator[int]:
        """Reads a block that may be asked for soon, but not one that is barred, and yields the
        bytes of each piece (:meth:`Sources.read_ahead`). Without MLX, for a thread beside."""
        return iter(()) if self.bars(*key) else self._sources.read_ahead(key)

    def stored(self, level: int, cluster: int) -> StoredBlock:
        """A block as it lies in its file, for making another bank of; errors as :meth:`blocks`."""
        self._check_keys([(level, cluster)])
        return self._sources.stored((level, cluster))

    def whole(self, level: int, cluster: int) -> StoredBlock:
        """As :meth:`stored`; UserError, too, where a value is not finite, which a checksum does not
        tell."""
        block, manifest = self.stored(level, cluster), self.manifest
        arrays, how = block.arrays(manifest.parts(level)), manifest.quantization_of(level)
        if not is_finite(arrays, self.config, STORED_TYPES[self.dtype].dtype, how):
            where = f"level {level}, cluster {cluster}" if level else "the generic memory"
            raise UserError(f"{where} of the bank is not finite", f"stored as {self.dtype}", REMEDY)
        return block

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

    def let_go(self) -> None:
        """Lets go of the kept blocks; fetched memories stay valid."""
        self._sources.let_go()

    def close(self) -> None:
        """Closes the files and lets go of the kept blocks; fetched memories stay valid."""
        self._sources.close()

    def __repr__(self) -> str:
        clusters = " × ".join(map(str, self.config.branching))
        return f"Bank({self.config.kind}, {clusters} clusters, r {self.config.r}, {self.dtype})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def keys_of(self, path: ClusterPath, blocked: frozenset[Key] = frozenset()) -> list[Key]:
        """(level, cluster) of the blocks of a path, as far down as is not blocked."""
        path = self.config.check_path(path)
        self._check_blocked(blocked)
        barred = blocked | self.barred
        keys = takewhile(lambda key: key not in barred, enumerate(path, 1))
        return [key for key in keys if key[0] in self._layouts]

    def _check_keys(self, keys: Iterable[Key]) -> None:
        for level, cluster in keys:
            if level not in self._layouts or not 0 <= cluster < num_blocks(self.config, level):
                raise UserError("no such block", (level, cluster), "give (level, cluster) pairs")
            if self.bars(level, cluster):
                raise UserError(
                    "this view may not fetch the block",
                    f"level {level}, cluster {cluster}",
                    "route with this bank, or open another view of it",
                )

    def _check_blocked(self, blocked: frozenset[Key]) -> None:
        counts = self.config.num_clusters
        for pair in blocked:
            match pair:
                case (int(level), int(cluster)) if (
                    1 <= level <= len(counts) and 0 <= cluster < counts[level - 1]
                ):
                    continue
            raise UserError("no such cluster to block", pair, "give (level, cluster) pairs")
