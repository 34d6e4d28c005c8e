"""Errors a person can act on: one line that says what is wrong, the value, and what to do."""

import argparse
import contextlib
import difflib
import importlib
import io
import itertools
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NoReturn

GO_ON = "stopped; the same command goes on where it was"
# Packages that not everybody needs, by the name that Python imports: the extra that brings each.
EXTRAS = {
    "lmdb": "train",
    "yaml": "train",
    "pypdf": "remember",
    "pathspec": "remember",
    "striprtf": "remember",
    "pyarrow": "corpora",
    "zstandard": "corpora",
    "matplotlib": "plot",
    "lm_eval": "harness",
    "gguf": "gguf",
    "starlette": "server",
    "uvicorn": "server",
    "h11": "server",
}


# Of each program within a program its module, which has a ``main``, and what it does.
Verbs = Mapping[str, tuple[str, str]]


# What a terminal obeys (control characters, those that turn the direction of text or end a line),
# and halves of characters, which are no text.
OBEYED = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: object, keep: str = "") -> str:
    """A name, a title or any other text of somebody else, fit for a terminal and for one line: what
    a terminal would obey is written as its escape, ``\\x1b``, but for the characters ``keep``."""
    return OBEYED.sub(
        lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], str(text)
    )


class UserError(ValueError):
    """A wrong input. Its text is one line: what is wrong, the value, the remedy."""

    def __init__(self, what: str, value: object, remedy: str):
        text = f"{what}: {value}; {remedy}"
        super().__init__(printable(" ".join(text.split())))
        self.what, self.value, self.remedy = what, value, remedy

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        """Pickled as what it was made of, so that it comes back from another process."""
        return type(self), (self.what, str(self.value), self.remedy)


class ArgumentParser(argparse.ArgumentParser):
    """A wrong command line is a :class:`UserError` like every other wrong input.

    Of a description the paragraphs stay apart, and lines that begin with a space stay as they are.
    ``verbs``: programs of their own by their first word, for :func:`run_verb`.
    """

    def __init__(self, verbs: Verbs | None = None, **options: Any):
        if verbs:
            options["epilog"] = "programs of their own, each with --help:\n" + "\n".join(
                f"  {verb:<10}{about}" for verb, (_, about) in verbs.items()
            )
        super().__init__(**{"formatter_class": _Help} | options)
        self.add_argument("--version", action=_Version, nargs=0, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        remedy = f"see {self.prog} --help"
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            for option in difflib.get_close_matches(unknown[1], self._option_string_actions, 1):
                remedy = f"did you mean {option}? {remedy}"
            if unknown[1] == "--revision":
                remedy = "write it behind the Hub id: user/name@REVISION"
        raise UserError("wrong command line", message, remedy)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = "/".join(action.option_strings) or action.dest
            raise UserError(f"no such {what}", repr(value), nearest(str(value), action.choices))


class _Help(argparse.HelpFormatter):
    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for stays, part in itertools.groupby(text.splitlines(), lambda s: not s[:1].strip()):
            given = list(part)
            lines += given if stays else textwrap.wrap(" ".join(given), width)
        return "\n".join(lines)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *given: Any) -> None:
        print(version())
        parser.exit()


@contextlib.contextmanager
def foreign(what: str, remedy: str) -> Iterator[None]:
    """For what another library makes of somebody's file: whatever it raises, a panic of Rust's too,
    is the UserError ``what`` with the first line of what it said."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(what, (said or [type(error).__name__])[0][:300], remedy) from None


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nothing reaches standard error meanwhile: Rust tells of a panic there, in many lines, before
    it is raised."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # it may be closed
            before, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.close, before)
            stack.callback(os.dup2, before, 2)
            os.dup2(nothing, 2)
            os.close(nothing)
        yield


def version() -> str:
    """Of the package, as it is installed."""
    from importlib import metadata  # slow, and seldom asked for

    try:
        return metadata.version("mlx-hmem")
    except metadata.PackageNotFoundError:
        return "unknown: mlx-hmem is not installed here"


def nearest(word: str, known: Iterable[Any]) -> str:
    """A remedy for a word that is none of ``known``."""
    names = [str(each) for each in known]
    found = difflib.get_close_matches(word, names, 1)
    return f"did you mean {found[0]}?" if found else f"use one of {', '.join(names)}"


def verb_of(words: Sequence[str], verbs: Iterable[str]) -> str | None:
    """The first word, if it is one of ``verbs``: a program of its own within a program.

    Raises UserError: it is no file, and one of them but for a slip.
    """
    word, verbs = words[0] if words else "", [*verbs]
    if word in verbs:
        return word
    if (close := difflib.get_close_matches(word, verbs, 1, 0.7)) and not os.path.exists(word):
        raise UserError("no such file or program", word, f"did you mean {close[0]}?")
    return None


def first_as_model(words: Sequence[str]) -> Sequence[str]:
    """A command line whose first word may be the model, as it was before it took ``--model``."""
    return ["--model", *words] if words and not words[0].startswith("-") else words


def run_verb(words: Sequence[str], verbs: Verbs, package: str | None = None) -> bool:
    """Runs the program that the first word is, with the others; whether it is one."""
    if verb := verb_of(words, verbs):
        importlib.import_module(verbs[verb][0], package).main(words[1:])
    return verb is not None


def needed(module: str, what: str) -> ModuleType:
    """A module of a package that not everybody needs; UserError where that is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(
            f"{what} needs the package {package}",
            "it is not installed",
            f"pip install 'mlx-hmem[{EXTRAS[package]}]'",
        ) from None


def run_program(main: Callable[[], None], stopped: str = "stopped") -> None:
    """Runs a program's ``main``; a wrong input ends in one line and exit status 2, Ctrl-C in 130.

    ``stopped`` is what Ctrl-C prints. A reader of the output that goes away, as ``head`` does, ends
    the program quietly with 141, as its signal would. A programming error keeps its traceback: it
    is ours to mend, not the user's.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal may know ASCII alone; a file or pipe is to have each line at once.
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
        if sys.stdout is not None:
            sys.stdout.flush()  # a full disk shows here rather than at the interpreter's exit
    except UserError as error:
        _end(2, f"error: {error}")
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        missing = isinstance(error, ModuleNotFoundError) and error.name == package
        said = package if missing else " ".join(str(error).split())
        what = "a package is missing" if missing else f"the package {package} cannot be loaded"
        _end(2, f"error: {what}: {said}; pip install 'mlx-hmem[{EXTRAS[package]}]'")
    except BrokenPipeError:
        _end(141)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _end(2, f"error: {error.strerror or error}{where}; check the path and the disk")
    except KeyboardInterrupt:
        _end(130, stopped)


def _end(status: int, line: str = "") -> NoReturn:
    if line:
        print(printable(line), file=sys.stderr)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Else the interpreter tries again at its end and prints a traceback of its own.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(status) from None
