"""Programs, in a process of their own or in this one, and what they and the library refuse."""

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import pytest

from mlx_hmem.errors import UserError, run_program
from tests.helpers.places import ROOT


class Said(NamedTuple):
    """How a program ended, and what it wrote."""

    status: int
    out: str
    err: str


def process(*words: object, **options: object) -> Said:
    """``python WORDS…`` in the repository, in a process of its own."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)
    return Said(done.returncode, done.stdout, done.stderr)


def run(
    main: Callable[[Sequence[str]], None], *words: object, stdin: bytes | io.BytesIO = b""
) -> Said:
    """A program's ``main`` in this process, as its face runs it."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    source = io.TextIOWrapper(io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin, "utf-8")
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "stdin", source),
    ):
        try:
            run_program(lambda: main([*map(str, words)]))
        except SystemExit as end:
            status = int(end.code or 0)
    return Said(status, out.getvalue(), err.getvalue())


def assert_refused(said: Said, *words: str) -> None:
    """Status 2 and one line of three parts that holds ``words``; nothing else is said."""
    assert said[:2] == (2, "")
    assert re.fullmatch(r"error: [^\n]+: [^\n]*; [^\n]+\n", said.err)
    for word in words:
        assert word in said.err


@contextlib.contextmanager
def refusing(pattern: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """What is done in it ends in a UserError: one line with a remedy, in which ``pattern`` is."""
    with pytest.raises(UserError, match=pattern or None) as error:
        yield error
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    assert error.value.remedy


def refused(pattern: str, call: Callable[..., object], *args: object, **options: object) -> str:
    """The UserError in which the call ends, as :func:`refusing`."""
    with refusing(pattern) as error:
        call(*args, **options)
    return str(error.value)
