"""Damage to files, processes that end half-way, threads, and any input Hypothesis thinks of."""

import itertools
import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.places import ROOT


def flip(path: Path, *places: int, bit: int = 0) -> None:
    """Flips a bit of the bytes at ``places``, in the file that others may have open."""
    data = bytearray(path.read_bytes())
    for at in places:
        data[at] ^= 1 << bit
    with path.open("r+b") as file:
        file.write(data)


def flip_blocks(shard: Path) -> None:
    """Damages every block of a shard."""
    flip(shard, *range(16384, shard.stat().st_size, 16384))


def kill_half_way(program: str, *arguments: object) -> None:
    """Runs ``program``, which says ``half`` and waits, as far as that."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as child:
        assert child.stdout.readline() == b"half\n"
        child.kill()


def killed(target: Callable[..., None], *arguments: object) -> None:
    """Runs a function in a process of its own, in which SIGKILL ends it."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def stop_at(patch: pytest.MonkeyPatch, owner: object, name: str, *numbers: int) -> list[tuple]:
    """Ctrl-C in place of these calls of ``owner.name``, counted from 1; a list of what every call
    is given."""
    own, count, calls = getattr(owner, name), itertools.count(1), []

    def counted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if next(count) in numbers:
            raise KeyboardInterrupt
        return own(*arguments, **options)

    patch.setattr(owner, name, counted)
    return calls


def in_threads(work: Callable[[int], None], count: int) -> None:
    """``work(number)`` in so many threads at once."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def any_input(examples: int) -> settings:
    unchanged = [HealthCheck.function_scoped_fixture]
    return settings(max_examples=examples, deadline=None, suppress_health_check=unchanged)
