"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

GO_ON = "stopped; the same command goes on where it was"
# Packages that not everybody needs, by the name that Python imports: the extra that brings each.
EXTRAS = {
    "lmdb": "train",
    "yaml": "train",
    "pypdf": "remember",
    "pyarrow": "corpora",
    "zstandard": "corpora",
    "matplotlib": "plot",
    "lm_eval": "harness",
}


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


def nearest(word: str, known: Iterable[str]) -> str:
    """A remedy for a word that is none of ``known``."""
    found = difflib.get_close_matches(word, known, 1)
    return f"did you mean {found[0]}?" if found else f"use one of {', '.join(known)}"


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
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        _end(2, f"error: a package is missing: {error.name}; pip install 'mlx-hmem[{extra}]'")
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
