"""Does a thing again whenever some folders have changed and then rested for a while."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import DEFAULT
from mlx_hmem.errors import UserError

from .listed import files_of, source_of

LOOK_EVERY = 2.0  # seconds


def state_of(sources: Sequence[Path]) -> str:
    """What names the folders as they are now; a fault is a state too."""
    with contextlib.redirect_stderr(io.StringIO()):  # what is passed over is said when it is read
        try:
            return source_of(files_of(sources, Faults()), None, DEFAULT)
        except UserError as error:
            return str(error)


def watch(
    sources: Sequence[Path],
    rest: float,
    do: Callable[[], None],
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Does it now, and again after each change, until it is stopped; ``rest``: seconds. A wrong
    input is said, and the next change waited for."""
    while True:
        done = state_of(sources)
        try:
            do()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        while (seen := state_of(sources)) == done:
            sleep(LOOK_EVERY)
        rested = 0.0
        while rested < rest:
            sleep(min(rest, LOOK_EVERY))
            rested = rested + LOOK_EVERY if (now := state_of(sources)) == seen else 0.0
            seen = now
