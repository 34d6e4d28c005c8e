"""The files of a bank, and in which of them a block lies: what it means, the reader knows.

A shard that is not there yet may be obtained from elsewhere when a block of it is first needed; by
what means, the bank does not know. It is then checked like any other file.
"""

import io
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple
from weakref import WeakSet

from mlx_hmem.bank.format import Level, Manifest, Shard
from mlx_hmem.bank.header import check_shard
from mlx_hmem.errors import UserError
from mlx_hmem.reading import open_regular

MOST_OPEN = 128  # shards of all banks: macOS lets a process have 256 files open
Obtain = Callable[[Sequence[str]], None]  # puts the named files into the bank's folder


class ShardFile(io.FileIO):
    """A shard open for reading, which closes when nobody holds it any more: from one that has made
    room for another somebody may still be reading."""

    def __init__(self, path: Path):
        with open_regular(path) as file:
            super().__init__(os.dup(file.fileno()))
        self.name = os.fspath(path)

    def __del__(self) -> None:
        self.close()


class OpenShard(NamedTuple):
    shard: Shard
    file: ShardFile
    verified: bytearray  # one byte per block: 1 once its checksum has been found right
    used: int  # when it was, last; more is later


_all = WeakSet["Shards"]()  # in this process
_room = threading.Lock()  # for who changes what is open
_uses = count()


def most_open() -> int:
    """How many shards may be open at once: half of what the system allows the process at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_OPEN if soft == resource.RLIM_INFINITY else max(1, min(MOST_OPEN, soft // 2))


def _num_open() -> int:
    return sum(len(each.open) for each in _all)


def _make_room() -> None:
    """Lets go of the shards used least lately, whatever bank they are of."""
    while _num_open() >= most_open():
        banks = (each for each in _all if each.open)
        min(banks, key=lambda each: next(iter(each.open.values())).used).open.popitem(last=False)


class Shards:
    """The shards of a bank. Of all banks together at most :func:`most_open` are open at once, those
    used last: ``open``, by level and number.

    One that is opened again is checked anew, its blocks too: another file may lie there now.
    Only :meth:`obtain` may be called by several threads at a time.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        elsewhere: Mapping[int, Path],
        obtain: Obtain | None = None,
    ):
        self._manifest, self._folder, self._elsewhere = manifest, folder, elsewhere
        self._levels = {level.level: level for level in manifest.all_levels}
        self._obtain, self._obtaining = obtain, threading.Lock()
        self.open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()
        self._closed = False
        with _room:
            _all.add(self)

    def check(self) -> None:
        """Validates every file that is there; one that is not must be one that can be obtained."""
        for level in self._manifest.all_levels:
            for index, shard in enumerate(level.shards):
                if self._obtain is not None and not self._path(level, shard).exists():
                    continue
                if _num_open() < most_open():
                    self._open_shard(level, index)
                else:
                    self._check_shard(level, shard)

    def obtain(self, keys: Iterable[tuple[int, int]]) -> None:
        """Obtains the files that the blocks of ``keys``, (level, cluster), lie in and that are
        not here yet: each once, however many threads ask."""
        if self._obtain is None or self._closed:
            return
        wanted = {self._index(level, cluster): None for level, cluster in keys}
        if not self._missing(wanted):
            return
        with self._obtaining:
            if missing := self._missing(wanted):
                self._obtain(missing)

    def find(self, level: int, cluster: int) -> tuple[OpenShard, int]:
        """The open shard that holds a block, and the block's row in it."""
        if self._closed:
            raise UserError("the bank is closed", f"level {level}", "open it again")
        key = self._index(level, cluster)
        with _room:
            found = self.open.pop(key, None)
            if found is not None:
                self.open[key] = found = found._replace(used=next(_uses))
        if found is None:
            found = self._open_shard(self._levels[level], key[1])
        return found, cluster - found.shard.first_cluster

    def forget(self, level: int, cluster: int) -> None:
        """Closes the file that a block lies in; the next :meth:`find` opens and checks it anew."""
        with _room:
            self.open.pop(self._index(level, cluster), None)

    def away(self, level: int, cluster: int) -> bool:
        """Whether the file that a block lies in is not here."""
        return bool(self._missing([self._index(level, cluster)]))

    def close(self) -> None:
        self._closed = True
        with _room:
            self.open.clear()

    def _index(self, level: int, cluster: int) -> tuple[int, int]:
        """Level and number of the shard that holds a block."""
        return level, self._levels[level].shard_of(cluster)

    def _missing(self, wanted: Iterable[tuple[int, int]]) -> list[str]:
        shards = [(self._levels[n], self._levels[n].shards[i]) for n, i in wanted]
        return [shard.file for level, shard in shards if not self._path(level, shard).exists()]

    def _path(self, level: Level, shard: Shard) -> Path:
        return Path(self._elsewhere.get(level.level, self._folder)) / shard.file

    def _check_shard(self, level: Level, shard: Shard) -> Path:
        path = self._path(level, shard)
        check_shard(path, self._manifest, level.level, shard)
        return path

    def _open_shard(self, level: Level, index: int) -> OpenShard:
        shard = level.shards[index]
        file = ShardFile(self._check_shard(level, shard))
        if hasattr(os, "posix_fadvise"):
            # Read-ahead beyond a block read 1.2 times the bytes.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        found = OpenShard(shard, file, bytearray(shard.num_clusters), next(_uses))
        with _room:
            _make_room()
            self.open[level.level, index] = found
        return found
