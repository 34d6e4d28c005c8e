"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """A wrong input. Its text is one line: what is wrong, the value, the remedy."""

    def __init__(self, what: str, value: object, remedy: str):
        text = f"{what}: {value}; {remedy}"
        super().__init__(" ".join(text.split()))
        self.what, self.value, self.remedy = what, value, remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Pickled as what it was made of, so that it comes back from another process."""
        return type(self), (self.what, str(self.value), self.remedy)


class ArgumentParser(argparse.ArgumentParser):
    """A wrong command line is a :class:`UserError` like every other wrong input."""

    def error(self, message: str) -> NoReturn:
        raise UserError("wrong command line", message, f"see {self.prog} --help")


def run_program(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Runs a program's ``main``; a wrong input ends in one line and exit status 2, Ctrl-C in 130.

    ``stopped`` is what Ctrl-C prints. A reader of the output that goes away, as ``head`` does, ends
    the program quietly with 141, as its signal would. A programming error keeps its traceback: it
    is ours to mend, not the user's.
    """
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk shows here rather than at the interpreter's exit
    except UserError as error:
        _end(2, f"error: {error}")
    except BrokenPipeError:
        _end(141)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _end(2, f"error: {error.strerror or error}{where}; check the path and the disk")
    except KeyboardInterrupt:
        _end(130, stopped)


def _end(status: int, line: str = "") -> NoReturn:
    if line:
        print(line, file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Else the interpreter tries again at its end and prints a traceback of its own.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(status) from None
