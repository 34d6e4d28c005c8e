"""Ctrl-C and SIGTERM end a training where two steps meet, once it has saved."""

import os
import signal
import threading
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
TOLD = (
    b"\nstopping after this step; once more stops at once and loses the steps since the last save\n"
)


class Stopping:
    """Within the block the first signal only sets ``asked``; a second one ends what runs.

    Unless ``alone``, signals do what they did: they reach ranks at different steps, of which no
    common state could be saved.
    """

    def __init__(self, alone: bool):
        self.alone, self.asked = alone, False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self.alone and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        os.write(2, TOLD)  # a print would disturb the bar in the middle of its own
