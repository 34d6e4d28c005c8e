"""What the benchmarks count and time: seconds, bytes read from the disk, memory, files.

On Linux the kernel counts the bytes that a process caused to be read from the disk; that is how a
cold read is proven cold. Elsewhere pages cannot be dropped by a program, and cold rows are left
out.
"""

import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

import mlx.core as mx
from tqdm import trange

from mlx_hmem.budget.resident import resident_bytes
from mlx_hmem.errors import UserError

IO, STATUS, FILES = (Path("/proc/self") / name for name in ("io", "status", "fd"))
T = TypeVar("T")
CAN_DROP = hasattr(os, "posix_fadvise") and IO.exists()
HEATS = ("cold", "warm") if CAN_DROP else ("warm",)


def io_counts() -> dict[str, int]:
    """The kernel's counts for this process, threads included: bytes asked of files (``rchar``) and
    bytes read from the disk (``read_bytes``). Empty where there is no /proc."""
    if not IO.exists():
        return {}
    pairs = (line.split(": ") for line in IO.read_text().splitlines())
    return {key: int(value) for key, value in pairs if key in ("rchar", "read_bytes")}


def disk_bytes() -> int:
    """Bytes read from the disk so far, 0 where the kernel does not say."""
    return io_counts().get("read_bytes", 0)


def evict(files: Iterable[Path]) -> None:
    """Syncs files and drops their pages out of the page cache, where a program can do that."""
    for path in files if CAN_DROP else ():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def forget_peak() -> None:
    """Lets ``VmHWM`` start anew, where Linux permits it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def open_files() -> int:
    return len(os.listdir(FILES)) if FILES.exists() else 0


class Timed(NamedTuple):
    ms: float
    cpu_ms: float  # of all threads of this process
    disk_bytes: int = 0


def returned(work: Callable[[], T], times: int = 1) -> tuple[T, Timed]:
    """What ``work`` returns, and the time of one call; with ``times`` that of each of its parts."""
    before, cpu, start = disk_bytes(), time.process_time(), time.perf_counter()
    result = work()
    ms, cpu_ms = (time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3
    return result, Timed(ms / times, cpu_ms / times, disk_bytes() - before)


def timed(work: Callable[[], object], times: int = 1) -> Timed:
    """The time alone. What ``work`` returns is let go of only after the clock has stopped."""
    return returned(work, times)[1]


Found = dict[str, list[Timed]]


def in_turns(
    contenders: Mapping[str, Callable[[int], T]], rounds: int, what: str, warm_up: bool = True
) -> dict[str, list[T]]:
    """Each contender is called with the number of the round, another one first each time, so that
    other load on the machine hits all alike. ``warm_up``: a round before counts for nothing."""
    names, found = list(contenders), {name: list[T]() for name in contenders}
    for number in trange(-warm_up, rounds, desc=what, leave=False, delay=2):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            one = contenders[name](max(number, 0))
            if number >= 0:
                found[name].append(one)
    return found


def compared(found: Found, first: str, *others: str) -> dict[str, dict[str, Any]]:
    """Medians over the rounds, also of the ratios to a contender within a round: to ``first`` by
    the clock and by CPU time, which hardly sees other work on the machine, to ``others`` by the
    clock."""

    def ratio(times: list[Timed], base: str, clock: int = 0) -> float:
        pairs = zip(times, found[base], strict=True)
        return median(t[clock] / max(b[clock], 1e-9) for t, b in pairs)

    return {
        name: {
            "ms": median(t.ms for t in times),
            **{f"of_{base}": ratio(times, base) for base in (first, *others)},
            "cpu_ms": median(t.cpu_ms for t in times),
            f"of_{first}_by_cpu": ratio(times, first, 1),
            "disk_mb": [f(t.disk_bytes for t in times) / 1e6 for f in (min, max)],
        }
        for name, times in found.items()
    }


def _print_beside() -> None:
    sys.stdout = sys.stderr


def in_own_process(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work``, a function of a module, returns in a fresh interpreter; what it prints goes to
    standard error."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, _print_beside) as pool:
        return pool.submit(work, *arguments).result()


def status_of(text: str) -> dict[str, int]:
    """The sizes of /proc/PID/status, in bytes."""
    pairs = (line.split(":") for line in text.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def anonymous_bytes() -> int:
    """Resident memory of this process that is no page of a file; elsewhere than on Linux, all."""
    return status_of(STATUS.read_text())["RssAnon"] if STATUS.exists() else resident_bytes()


def watched(process: subprocess.Popen[Any], most: int | None) -> dict[str, int]:
    """The most that a program has held until its end: resident memory, and on Linux what is asked
    for and what is no page of a file, in bytes. Beyond ``most`` resident bytes it is killed there.

    Asked of Linux while the program runs: its count for a program that has ended also has what the
    one that started it held.
    """
    if not STATUS.exists():
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return {"VmHWM": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)}
    peaks = dict.fromkeys(("VmHWM", "RssAnon", "VmData"), 0)
    while process.poll() is None:
        with suppress(OSError):  # it has ended
            now = status_of(Path(f"/proc/{process.pid}/status").read_text())
            peaks = {name: max(peak, now.get(name, 0)) for name, peak in peaks.items()}
            if most is not None and now.get("VmRSS", 0) > most:
                process.kill()
        time.sleep(0.01)
    return peaks


def run(command: Sequence[str], **how: Any) -> tuple[str, int]:
    """What another program says, and the most resident memory that it held, in bytes. ``how`` is
    Popen's. Raises UserError if the program fails."""
    said, status, peaks = ended(command, **how)
    if status:
        raise UserError("a program failed", " ".join(command), "see above")
    return said, peaks["VmHWM"]


def ended(
    command: Sequence[str], output: str = "stdout", most: int | None = None, **how: Any
) -> tuple[str, int, dict[str, int]]:
    """What another program says on ``output``, its status, and what it is :func:`watched` for."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, **how | {output: said})
        peaks = watched(process, most)
        said.seek(0)
        return said.read(), process.returncode, peaks


def bare() -> dict[str, int]:
    """What the interpreter holds with MLX imported."""
    if not STATUS.exists():
        raise UserError("this counts with /proc", "this system has none", "run it on Linux")
    program = f"import mlx.core; print(open('{STATUS}').read())"
    return status_of(run([sys.executable, "-c", program])[0])


def machine() -> dict[str, Any]:
    """The machine and the versions, for the head of a result."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{mx.default_device()}",
        "versions": f"Python {platform.python_version()}, mlx {version('mlx')}",
    }
