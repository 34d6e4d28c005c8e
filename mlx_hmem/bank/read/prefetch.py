"""Reads blocks that may be asked for soon, in a thread of its own, while nobody waits for one.

They are read for the system's page cache, from which a fetch copies them as fast as from memory of
ours. So the thread holds nothing of MLX's: one that does stops a program for ever, or ends it by
SIGABRT, when MLX waits for its own work meanwhile.
"""

import threading
from collections.abc import Sequence

from mlx_hmem.bank.format import Key
from mlx_hmem.bank.read.reader import Bank


class Prefetch:
    """At most one thread at a time; :meth:`stop` waits for a piece of some MB at most, and so does
    the end of the program. ``bytes_read`` counts what has been read."""

    def __init__(self, bank: Bank):
        self.bank = bank
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lately = set[Key]()  # wanted the time before, and read
        self.bytes_read = 0

    def begin(self, wanted: Sequence[Key]) -> None:
        """Begins to read the ``wanted`` blocks, the first first, as many as the bank's cache would
        hold; one that was wanted the time before, too, is not read again."""
        self.stop()
        self._stop.clear()
        self._lately &= set(wanted)
        self._thread = threading.Thread(target=self._run, args=(list(dict.fromkeys(wanted)),))
        self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """Waits until all is read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, wanted: list[Key]) -> None:
        room = self.bank.cache_bytes
        for key in wanted:
            room -= self.bank.block_bytes(key[0])
            if room < 0:
                return
            if key in self._lately:
                continue
            for count in self.bank.read_ahead(key):
                self.bytes_read += count
                if self._stop.is_set() or not threading.main_thread().is_alive():
                    return
            self._lately.add(key)
