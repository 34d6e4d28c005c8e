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

LMDB trusts its file. So each record has a checksum beside its place, the values of a commit and all
places have one together, and :func:`.sound.check_store` walks a file's trees. A store of before
there were checksums opens unchecked.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

import lmdb
import numpy as np
import xxhash

from mlx_hmem.errors import UserError
from mlx_hmem.folders import locked

from .sound import RESTORE, damaged

TRANSACTION_BYTES = 64 << 20
FIRST_MAP = 4 * TRANSACTION_BYTES
# Pages touched through the map count as resident until it is made anew. A commit touches pages of
# every block that it replaces: file-backed, so the system can take them back at any time.
REMAP_BYTES = 8 << 20
WRITER = "wait for it, or stop it first"
INTACT = "the last commit is intact"
PLACES, SUM = b"sum of places", b"sum"  # the values that are checksums


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
        # Written since the last commit, each with its place and checksum, 1 + 8 bytes.
        self._staged: dict[bytes, bytes] = {}
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
            self._check()
        except lmdb.MemoryError as error:
            self._held.close()
            raise self._no_address_space(error) from None
        except UserError:
            self.close()
            raise
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
            found = self._record(transaction, name)
            if found is None:
                return False
            record, checksum = found
            size = len(record)
            if size != target.nbytes and (whole or size < target.nbytes):
                raise UserError(
                    f"{self.folder} holds a record of another size",
                    f"{name!r}: {size} bytes, not {target.nbytes}",
                    RESTORE,
                )
            if checksum and xxhash.xxh3_64_digest(record) != checksum:
                raise damaged(self.folder, f"record {name!r}")
            target.reshape(-1).view(np.uint8)[:] = np.frombuffer(record, np.uint8, target.nbytes)
        self._used(size)
        return True

    def end_of(self, name: bytes, size: int) -> bytes | None:
        """The last ``size`` bytes of the record ``name``, if there is one."""
        with self._begin(buffers=True) as transaction:
            found = self._record(transaction, name)
            result = None if found is None else bytes(found[0][-size:])
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
                if (before := self._staged.get(name)) is not None:
                    place = before[0]
                else:
                    live = transaction.get(name, db=self._places)
                    place = 0 if live is None else 1 - live[0]
                view = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
                transaction.put(_key(name, place), view, db=self._records)
                staged[name] = bytes([place]) + xxhash.xxh3_64_digest(view)

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
                transaction.put(name, place, db=places)
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
            staged = dict(transaction.cursor(places))
            if live:
                self._make_live(transaction, staged, values)
            for database in self._prepared:
                transaction.drop(database, delete=False)

        self._change(settle)
        self._staged = {}

    def _make_live(
        self, transaction: Any, staged: dict[bytes, bytes], values: dict[bytes, bytes]
    ) -> None:
        known = transaction.get(PLACES, db=self._values)
        total = int.from_bytes(known, "big") if known else self._sum_of_places(transaction)
        for name, place in staged.items():
            total ^= xxhash.xxh3_64_intdigest(name + place)
            if (before := transaction.replace(name, place, db=self._places)) is not None:
                total ^= xxhash.xxh3_64_intdigest(name + before)
                transaction.delete(_key(name, 1 - place[0]), db=self._records)
        for name, value in {**values, PLACES: total.to_bytes(8, "big")}.items():
            transaction.put(name, value, db=self._values)
        transaction.put(SUM, self._sum_of_values(transaction), db=self._values)

    def _sum_of_places(self, transaction: Any) -> int:
        """That of all records' names, places and checksums, in any order."""
        total = 0
        for name, place in transaction.cursor(self._places):
            total ^= xxhash.xxh3_64_intdigest(name + place)
        return total

    def _sum_of_values(self, transaction: Any) -> bytes:
        digest = xxhash.xxh3_64()
        for name, value in transaction.cursor(self._values):
            if name != SUM:
                digest.update(b"%d %s %d %s" % (len(name), name, len(value), value))
        return digest.digest()

    def _check(self) -> None:
        """Raises UserError unless the last commit is what was written."""
        with self._begin() as transaction:
            known = transaction.get(SUM, db=self._values)
            if known is None:
                return
            if known != self._sum_of_values(transaction):
                raise damaged(self.folder, "the values of its last commit")
            places = transaction.get(PLACES, db=self._values)
            if int.from_bytes(places, "big") != self._sum_of_places(transaction):
                raise damaged(self.folder, "the list of its records")

    def _record(self, transaction: Any, name: bytes) -> tuple[Any, bytes] | None:
        """As it was written last, with its checksum, empty in a store of before there were any;
        None if there is none."""
        place = self._staged.get(name) or transaction.get(name, db=self._places)
        if place is None:
            return None
        record = transaction.get(_key(name, place[0]), db=self._records)
        if record is None:
            raise damaged(self.folder, f"record {name!r} is missing")
        return record, bytes(place[1:])

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


def _key(name: bytes, place: int) -> bytes:
    return name + bytes([place])
