"""The blocks under training, out of core: weights, moments and steps of every (level, cluster).

On disk they are records of a :class:`.RecordStore`; in memory level 1 stays, unless
``cache_level_1``, and the others go through a cache of ``cache_bytes``, the least recently used
leaving first. A block that no text has touched does not exist on disk: its start values follow from
(seed, level, cluster).

One worker thread fetches the blocks of the next step, and writes those that make room for them,
while MLX computes. It and the caller never use the store at the same time: every public method
first waits for the worker. :meth:`BlockStore.commit` writes all changed blocks and waits for the
disk: the price of a checkpoint.
"""

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Self

import mlx.core as mx
import numpy as np

from mlx_hmem.bank.format import Key
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import initial_block

from .checkpoint import Progress
from .records import TRANSACTION_BYTES, RecordStore
from .sound import check_free_space

CACHE_BYTES = 1 << 30
BLOCK = b"block"  # how the names of their records begin


class Entry(NamedTuple):
    """One block. ``record`` holds the others as they lie on disk, so the weights come first:
    ``states`` (3, *block shape) float32 are weights, first and second moments."""

    record: np.ndarray
    states: np.ndarray
    steps: np.ndarray

    @classmethod
    def empty(cls, shape: tuple[int, ...]) -> "Entry":
        record = np.empty(3 * math.prod(shape) + 1, np.float32)
        return cls(record, record[:-1].reshape(3, *shape), record[-1:].view(np.int32))


class BlockStore:
    """The blocks of ``config`` in ``folder``. Raises UserError: see :class:`RecordStore`.

    Args:
        seed: with level and cluster it gives the start values of a block.
        cache_bytes: memory for the blocks of levels 2 and deeper; what one step and the next need
            is held in any case.
        cache_level_1: those of level 1 go through the cache too, and the blocks of the next step
            are not read ahead where the cache has no room for them.
        map_size: greatest size of the file; None: as the disk has room.
        readonly: to read the last commit.
    """

    def __init__(
        self,
        folder: Path,
        config: MemoryConfig,
        seed: int,
        cache_bytes: int = CACHE_BYTES,
        map_size: int | None = None,
        readonly: bool = False,
        cache_level_1: bool = False,
    ):
        self.cache_level_1 = cache_level_1
        self.folder, self.config, self.seed, self.cache_bytes = folder, config, seed, cache_bytes
        self._cache: OrderedDict[Key, Entry] = OrderedDict()
        self._cached_bytes = 0  # without those that stay
        self._spare: dict[int, list[Entry]] = {}  # of evicted blocks, by level, to be used again
        self._dirty: set[Key] = set()
        self._worker = ThreadPoolExecutor(1, "store")
        self._job: Future[None] | None = None
        self.records = RecordStore(folder, map_size, readonly)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.shutdown()
        self.records.close()

    def record_bytes(self, level: int) -> int:
        return 12 * math.prod(self.config.block_shape(level)) + 4

    def check_disk(self, touched: dict[int, int], between: dict[int, int], arrays: int = 0) -> None:
        """Raises UserError unless the disk has room for so many blocks of each level, ``between``
        of which change from one commit to the next, and for ``arrays`` bytes of named arrays."""
        size = sum((touched[n] + between[n]) * self.record_bytes(n) for n in touched)
        check_free_space(self.folder, size + 2 * arrays + TRANSACTION_BYTES)

    def gather(self, level: int, clusters: np.ndarray, size: int) -> list[mx.array]:
        """Weights, first and second moments (size, *block shape) and steps (size,) of ``clusters``;
        the first of them fills up what is missing to ``size``."""
        self._wait()
        keys = [(level, int(cluster)) for cluster in clusters]
        self._load(keys, set(keys))
        entries = [self._cache[key] for key in keys]
        entries += entries[:1] * (size - len(entries))
        parts = np.empty((3, size, *self.config.block_shape(level)), np.float32)
        for i, entry in enumerate(entries):
            parts[:, i] = entry.states
        steps = np.concatenate([entry.steps for entry in entries])
        return [mx.array(part) for part in (*parts, steps)]

    def scatter(self, level: int, clusters: np.ndarray, updated: list[mx.array]) -> None:
        """Puts back the first ``len(clusters)`` of the updated blocks."""
        self._wait()
        *parts, steps = [np.array(array, copy=False) for array in updated]
        for i, cluster in enumerate(clusters):
            key = (level, int(cluster))
            entry = self._cache[key]
            for state, part in zip(entry.states, parts, strict=True):
                state[:] = part[i]
            entry.steps[0] = steps[i]
            self._dirty.add(key)

    def load(self, keys: Iterable[Key]) -> None:
        """Loads the blocks of a step, which stay until the next ones are loaded."""
        self._wait()
        wanted = list(keys)
        self._load(wanted, set(wanted))

    def prefetch(self, keys: Iterable[Key], keep: Iterable[Key]) -> None:
        """Begins to load the blocks ``keys``; those of ``keep`` stay too."""
        self._wait()
        wanted, kept = list(keys), set(keep)
        if self.cache_level_1:
            size = sum(self.record_bytes(level) for level, _ in {*wanted, *kept})
            if size > self.cache_bytes:
                return
        self._job = self._worker.submit(self._load, wanted, {*wanted, *kept})

    def commit(
        self,
        progress: Progress,
        arrays: dict[str, np.ndarray] | None = None,
        agreed: Callable[[], None] | None = None,
    ) -> None:
        """Makes all blocks, ``progress`` and ``arrays`` (an anchor that is trained along, its
        optimiser) lasting, together.

        ``agreed`` waits until the stores of all ranks are ready to do the same.
        """
        self._wait()
        arrays = arrays or {}
        shapes = {name: [str(a.dtype), a.shape] for name, a in arrays.items()}
        self._write(sorted(self._dirty))
        self.records.write((_array_name(name), a) for name, a in arrays.items())
        values = {
            b"identity": json.dumps(progress.identity).encode(),
            b"step": str(progress.step).encode(),
            b"curve": progress.curve_array().tobytes(),
            b"arrays": json.dumps(shapes).encode(),
        }
        if agreed is None:
            self.records.commit(values)
            return
        self.records.prepare(values)
        agreed()
        self.records.commit_prepared()

    def steps(self) -> tuple[int, int]:
        """The steps of the last commit and of one that was prepared; 0 where there is none."""
        self._wait()
        live, prepared = self.records.value(b"step"), self.records.prepared()
        return int(live or 0), int(prepared.get(b"step", 0))

    def settle(self, live: bool) -> None:
        """Ends a prepared commit: it becomes the last one, or is dropped."""
        self._wait()
        self.records.commit_prepared(live)

    def progress(self) -> Progress | None:
        """That of the last commit, if there is one."""
        self._wait()
        identity, step, curve = map(self.records.value, (b"identity", b"step", b"curve"))
        if identity is None or step is None or curve is None:
            return None
        return Progress.load(identity.decode(), int(step), curve)

    def arrays(self) -> dict[str, np.ndarray]:
        """The named arrays of the last commit."""
        self._wait()
        types = json.loads(self.records.value(b"arrays") or b"{}")
        result = {name: np.empty(shape, dtype) for name, (dtype, shape) in types.items()}
        for name, array in result.items():
            self.records.read(_array_name(name), array)
        return result

    def block(self, level: int, cluster: int) -> np.ndarray:
        """The weights of one block as they were written last: as of the last commit, unless this
        store has made room for others since."""
        self._wait()
        block = np.empty(self.config.block_shape(level), np.float32)
        if not self.records.read(_block_name((level, cluster)), block, whole=False):
            return self._initial((level, cluster))
        return block

    def current(self, level: int, cluster: int) -> np.ndarray:
        """The weights of one block as they are now; the cache stays as it is."""
        self._wait()
        entry = self._cache.get((level, cluster))
        return self.block(level, cluster) if entry is None else entry.states[0].copy()

    def block_steps(self, level: int) -> np.ndarray:
        """How many steps each block of a level had had when it was written last, (clusters,)
        int32."""
        self._wait()
        result = np.zeros(self.config.num_clusters[level - 1], np.int32)
        for cluster in range(len(result)):
            steps = self.records.end_of(_block_name((level, cluster)), 4)
            if steps is not None:
                result[cluster] = np.frombuffer(steps, np.int32)[0]
        return result

    def touched(self) -> list[Key]:
        """The (level, cluster) of the blocks in the last commit."""
        self._wait()
        names = self.records.names(BLOCK)
        return [(name[5], int.from_bytes(name[6:], "big")) for name in names]

    def take(self, other: "BlockStore", keys: Iterable[Key]) -> None:
        """Copies blocks of ``other``'s last commit, weights, moments and steps, to be lasting with
        the next commit. None of them may have been gathered here."""
        self._wait()
        self.records.write((_block_name(key), other._record(key)) for key in keys)

    def _record(self, key: Key) -> np.ndarray:
        record = Entry.empty(self.config.block_shape(key[0])).record
        self.records.read(_block_name(key), record)
        return record

    def _wait(self) -> None:
        """For the worker; what went wrong there is raised here."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def _stays(self, level: int) -> bool:
        return level == 1 and not self.cache_level_1

    def _initial(self, key: Key) -> np.ndarray:
        level, cluster = key
        rng = np.random.default_rng([self.seed, level, cluster])
        return initial_block(self.config, self.config.r[level - 1], rng)

    def _load(self, keys: list[Key], keep: set[Key]) -> None:
        """Brings ``keys`` into memory. Blocks outside ``keep`` may leave it."""
        missing = []
        for key in keys:
            if key in self._cache:
                self._cache.move_to_end(key)
            else:
                missing.append(key)
        room = sum(self.record_bytes(level) for level, _ in missing if not self._stays(level))
        if missing and self._cached_bytes + room > self.cache_bytes:
            # An eighth more, so that the disk is not asked to sync for every block.
            self._evict(self.cache_bytes * 7 // 8 - room, keep)
        for key in missing:
            entry = self._empty_entry(key[0])
            if not self.records.read(_block_name(key), entry.record):
                entry.states[0], entry.states[1:], entry.steps[0] = self._initial(key), 0, 0
            self._cache[key] = entry
        self._cached_bytes += room
        if self.cache_level_1:
            self._spare.clear()  # memory is short

    def _empty_entry(self, level: int) -> Entry:
        if spare := self._spare.get(level):
            return spare.pop()
        self._spare.clear()  # another level has grown
        return Entry.empty(self.config.block_shape(level))

    def _evict(self, most_bytes: int, keep: set[Key]) -> None:
        leaving, size = [], self._cached_bytes
        for key in self._cache:
            if size <= most_bytes:
                break
            if key not in keep and not self._stays(key[0]):
                leaving.append(key)
                size -= self.record_bytes(key[0])
        self._write(key for key in leaving if key in self._dirty)
        for key in leaving:
            self._spare.setdefault(key[0], []).append(self._cache.pop(key))
        self._cached_bytes = size

    def _write(self, keys: Iterable[Key]) -> None:
        keys = list(keys)
        self.records.write((_block_name(key), self._cache[key].record) for key in keys)
        self._dirty.difference_update(keys)


def _block_name(key: Key) -> bytes:
    return BLOCK + key[0].to_bytes(1, "big") + key[1].to_bytes(4, "big")


def _array_name(name: str) -> bytes:
    return b"array" + name.encode()
