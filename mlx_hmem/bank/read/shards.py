"""The files of a bank, and in which of them a block lies: what it means, the reader knows.

A shard that is not there yet may be obtained from elsewhere when a block of it is first needed; by
what means, the bank does not know. It is then checked like any other file.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mlx_hmem.bank.format import Level, Manifest, Shard
from mlx_hmem.bank.header import check_shard
from mlx_hmem.errors import UserError
from mlx_hmem.reading import open_regular

MOST_OPEN = 128  # macOS lets a process have 256 files open
Obtain = Callable[[Sequence[str]], None]  # puts the named files into the bank's folder


class OpenShard(NamedTuple):
    shard: Shard
    file: BinaryIO
    files: ExitStack  # holds ``file``; closing it closes the file
    verified: bytearray  # one byte per block: 1 once its checksum has been found right


class Shards:
    """The shards of a bank. At most ``MOST_OPEN`` are open at once, those used last.

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
        self._open: OrderedDict[tuple[int, int], OpenShard] = OrderedDict()
        self._closed = False

    def check(self) -> None:
        """Validates every file that is there; one that is not must be one that can be obtained."""
        for level in self._manifest.all_levels:
            for index, shard in enumerate(level.shards):
                if self._obtain is not None and not self._path(level, shard).exists():
                    continue
                if len(self._open) < MOST_OPEN:
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
        if key not in self._open:
            self._open_shard(self._levels[level], key[1])
        self._open.move_to_end(key)
        return self._open[key], cluster - self._open[key].shard.first_cluster

    def forget(self, level: int, cluster: int) -> None:
        """Closes the file that a block lies in; the next :meth:`find` opens and checks it anew."""
        if (shard := self._open.pop(self._index(level, cluster), None)) is not None:
            shard.files.close()

    def away(self, level: int, cluster: int) -> bool:
        """Whether the file that a block lies in is not here."""
        return bool(self._missing([self._index(level, cluster)]))

    def close(self) -> None:
        self._closed = True
        while self._open:
            self._open.popitem()[1].files.close()

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

    def _open_shard(self, level: Level, index: int) -> None:
        shard = level.shards[index]
        path = self._check_shard(level, shard)
        while len(self._open) >= MOST_OPEN:
            self._open.popitem(last=False)[1].files.close()
        with ExitStack() as files:
            file = files.enter_context(open_regular(path))
            if hasattr(os, "posix_fadvise"):
                # Read-ahead beyond a block read 1.2 times the bytes.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            verified = bytearray(shard.num_clusters)
            self._open[level.level, index] = OpenShard(shard, file, files.pop_all(), verified)
