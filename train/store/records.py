"""Records on disk that change together: LMDB, one writer, memory bounded by a small transaction.

LMDB keeps the pages that a transaction wrote in memory until it commits (measured: 400 MB written
grow the process by 400 MB), so the many blocks of a checkpoint cannot go into one transaction.
Every record therefore has two places. :meth:`RecordStore.write` writes to the one that is not live,
in transactions of at most ``TRANSACTION_BYTES`` which change nothing that a reader after a crash
would see; :meth:`RecordStore.commit` makes all of them live in one small transaction and frees the
old places. A kill at any moment leaves the last commit; what was written since is overwritten.

Several stores that must change together commit in two phases: :meth:`RecordStore.prepare` makes the
next commit lasting beside the last one; when all have done so, each calls ``commit``. Whoever was
killed in between finds his ``prepared`` values again and commits them, or drops them.

The file grows by the records ever written, those written between two commits and one transaction:
freed pages are used again, never given back. Each transaction is synced to the disk. Its map begins
small and doubles when it is full, so that address space is asked for as it is needed.
"""

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import lmdb
import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.folders import locked

TRANSACTION_BYTES = 64 << 20
FIRST_MAP = 4 * TRANSACTION_BYTES
# Pages touched through the map count as resident until it is made anew. A commit touches pages of
# every block that it replaces: file-backed, so the system can take them back at any time.
REMAP_BYTES = 8 << 20
WRITER = "wait for it, or stop it first"
RESTORE = "move the folder of this stage away and run it again"
INTACT = "the last commit is intact"


class RecordStore:
    """Named arrays in ``folder``, and small values that belong to the commit as a whole.

    Args:
        map_size: greatest size of the file in bytes, None: as the disk has room.
        readonly: for reading beside a writer; sees the last commit.

    Raises:
        UserError: another writer has it open, it is no store, or it is missing and ``readonly``.
    """

    def __init__(self, folder: Path, map_size: int | None = None, readonly: bool = False):
        self.folder, self.map_size = folder, map_size
        self._staged: dict[bytes, int] = {}  # written since the last commit, with their places
        self._read_bytes = 0
        if readonly and not (folder / "data.mdb").exists():
            raise UserError("a training store is missing", folder, "run the stage that makes it")
        self._held = contextlib.ExitStack()
        if not readonly:
            taken = UserError("the training store has a writer already", folder, WRITER)
            self._held.enter_context(locked(folder / "writer.lock", taken))
        first = min(map_size or FIRST_MAP, FIRST_MAP)  # a larger file is mapped whole
        try:
            self._env = lmdb.open(os.fspath(folder), map_size=first, max_dbs=5, readonly=readonly)
            names = [b"records", b"places", b"values"]
            names += [] if readonly else [b"prepared places", b"prepared values"]
            databases = [self._env.open_db(name, create=not readonly) for name in names]
            self._records, self._places, self._values, *self._prepared = databases
        except lmdb.MemoryError as error:
            self._held.close()
            raise self._no_address_space(error) from None
        except lmdb.Error as error:
            self._held.close()
            remedy = f"close it elsewhere, or {RESTORE}"
            raise UserError(f"cannot open the training store {folder}", error, remedy) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._env.close()
        self._held.close()

    def value(self, name: bytes) -> bytes | None:
        with self._begin(self._values) as transaction:
            return transaction.get(name)

    def read(self, name: bytes, target: np.ndarray, whole: bool = True) -> bool:
        """Fills the contiguous ``target`` with the record ``name``, or with its beginning unless
        ``whole``; False if there is none."""
        with self._begin(buffers=True) as transaction:
            record = self._record(transaction, name)
            if record is None:
                return False
            size = len(record)
            if size != target.nbytes and (whole or size < target.nbytes):
                raise UserError(
                    f"{self.folder} holds a record of another size",
                    f"{name!r}: {size} bytes, not {target.nbytes}",
                    RESTORE,
                )
            target.reshape(-1).view(np.uint8)[:] = np.frombuffer(record, np.uint8, target.nbytes)
        self._used(target.nbytes)
        return True

    def end_of(self, name: bytes, size: int) -> bytes | None:
        """The last ``size`` bytes of the record ``name``, if there is one."""
        with self._begin(buffers=True) as transaction:
            record = self._record(transaction, name)
            result = None if record is None else bytes(record[-size:])
        self._used(4096)  # a page
        return result

    def names(self, start: bytes) -> list[bytes]:
        """The records of the last commit whose names begin with ``start``."""
        with self._begin(self._places) as transaction:
            cursor = transaction.cursor()
            cursor.set_range(start)
            names = cursor.iternext(keys=True, values=False)
            return list(itertools.takewhile(lambda name: name.startswith(start), names))

    def write(self, records: Iterable[tuple[bytes, np.ndarray]]) -> None:
        """Writes contiguous arrays; they are read at once and become lasting with ``commit``."""
        group: list[tuple[bytes, np.ndarray]] = []
        size = 0
        for name, data in records:
            if group and size + data.nbytes > TRANSACTION_BYTES:
                self._write(group)
                group, size = [], 0
            group.append((name, data))
            size += data.nbytes
        if group:
            self._write(group)

    def _write(self, group: list[tuple[bytes, np.ndarray]]) -> None:
        staged = {}

        def put(transaction: Any) -> None:
            for name, data in group:
                place = self._staged.get(name)
                if place is None:
                    live = transaction.get(name, db=self._places)
                    place = 0 if live is None else 1 - live[0]
                view = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
                transaction.put(_key(name, place), view, db=self._records)
                staged[name] = place

        self._change(put)
        self._staged |= staged
        self._used(sum(data.nbytes for _, data in group))

    def commit(self, values: dict[bytes, bytes]) -> None:
        """Makes everything written since the last commit live, together with ``values``."""
        self._change(lambda transaction: self._make_live(transaction, self._staged, values))
        self._staged = {}

    def prepare(self, values: dict[bytes, bytes]) -> None:
        """Makes everything written since the last commit, and ``values``, ready to go live."""
        places, prepared = self._prepared

        def put(transaction: Any) -> None:
            for name, place in self._staged.items():
                transaction.put(name, bytes([place]), db=places)
            for name, value in values.items():
                transaction.put(name, value, db=prepared)

        self._change(put)

    def prepared(self) -> dict[bytes, bytes]:
        """The values of a prepared commit, if there is one."""
        with self._begin(self._prepared[1]) as transaction:
            return dict(transaction.cursor())

    def commit_prepared(self, live: bool = True) -> None:
        """Makes a prepared commit live, or drops it."""
        places, _ = self._prepared
        values = self.prepared()

        def settle(transaction: Any) -> None:
            staged = {name: place[0] for name, place in transaction.cursor(places)}
            if live:
                self._make_live(transaction, staged, values)
            for database in self._prepared:
                transaction.drop(database, delete=False)

        self._change(settle)
        self._staged = {}

    def _make_live(
        self, transaction: Any, staged: dict[bytes, int], values: dict[bytes, bytes]
    ) -> None:
        for name, place in staged.items():
            if transaction.replace(name, bytes([place]), db=self._places) is not None:
                transaction.delete(_key(name, 1 - place), db=self._records)
        for name, value in values.items():
            transaction.put(name, value, db=self._values)

    def _record(self, transaction: Any, name: bytes) -> Any:
        """As it was written last; None if there is none."""
        place = self._staged.get(name)
        if place is None:
            live = transaction.get(name, db=self._places)
            if live is None:
                return None
            place = live[0]
        return transaction.get(_key(name, place), db=self._records)

    def _used(self, size: int) -> None:
        self._read_bytes += size
        if self._read_bytes >= REMAP_BYTES:
            self._map(self._env.info()["map_size"])
            self._read_bytes = 0

    def _map(self, size: int) -> None:
        try:
            self._env.set_mapsize(size)
        except lmdb.Error as error:
            raise self._no_address_space(error) from None

    def _no_address_space(self, error: Exception) -> UserError:
        remedy = f"{INTACT}: allow the program more address space (ulimit -v) and run again"
        return UserError(f"the training store {self.folder} cannot be mapped", error, remedy)

    def _begin(self, *database: Any, **options: Any) -> Any:
        """Begins to read; the map is made larger where another process has made the file so."""
        try:
            return self._env.begin(*database, **options)
        except lmdb.MapResizedError:
            self._map(0)
            return self._env.begin(*database, **options)

    def _change(self, work: Callable[[Any], None]) -> None:
        """Calls ``work`` with a transaction; again with a larger map where this one was full."""
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    work(transaction)
                return
            except lmdb.MapFullError:
                size = self._env.info()["map_size"]
                if self.map_size is not None and size >= self.map_size:
                    remedy = f"{INTACT}: free space there and run again"
                    full, value = (
                        f"the training store {self.folder} is full",
                        f"map size {size} bytes",
                    )
                    raise UserError(full, value, remedy) from None
                self._map(min(2 * size, self.map_size or 2 * size))
            except lmdb.Error as error:
                remedy = f"{INTACT}: check the disk and run again"
                wrong = f"cannot write the training store {self.folder}"
                raise UserError(wrong, error, remedy) from None


def check_free_space(folder: Path, size: int) -> None:
    """Raises UserError if the disk has no room for ``folder`` to grow to ``size`` bytes."""
    file = folder / "data.mdb"
    present = file.stat().st_blocks * 512 if file.exists() else 0
    free = shutil.disk_usage(folder).free
    if size - present > free:
        raise UserError(
            f"too little disk space for the training store {folder}",
            f"it may grow by {(size - present) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            "free space there or give another --out",
        )


def _key(name: bytes, place: int) -> bytes:
    return name + bytes([place])
