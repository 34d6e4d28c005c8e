"""Reads blocks that may be asked for soon, in a thread of its own, while nobody waits for one."""

import threading
from collections.abc import Sequence

from mlx_hmem.bank import Bank
from mlx_hmem.bank.read.cache import Key


class Prefetch:
    """At most one thread at a time; :meth:`stop` waits for no more than the block in hand.

    What is read goes into the bank's cache and stays within its bytes: first come the blocks that
    must stay, then those wanted, as far as there is room for all of them; only others make way.
    """

    def __init__(self, bank: Bank):
        self.bank = bank
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.bytes_read = 0

    def begin(self, wanted: Sequence[Key], in_use: Sequence[Key]) -> None:
        """Begins to read the ``wanted`` blocks, the first first, without losing those ``in_use``.

        ``wanted`` may name a block twice.
        """
        self.stop()
        self._stop.clear()
        self._thread = threading.Thread(
            target=self._run, args=(list(dict.fromkeys(wanted)), in_use), daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends it; what has been read stays in the cache."""
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """Waits until all is read."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, wanted: list[Key], in_use: Sequence[Key]) -> None:
        bank = self.bank
        room = bank.cache_bytes - bank.touch(in_use)
        for key in wanted:
            if self._stop.is_set():
                return
            room -= bank.touch([key]) if bank.keeps(key) else bank.block_bytes(key[0])
            if room < 0:
                return
            self.bytes_read += bank.prefetch(key)
