"""What the benchmarks of the memory bank count and time: bytes read from the disk, memory, files.

On Linux the kernel counts the bytes that a process caused to be read from the disk; that is how a
cold read is proven cold. Elsewhere pages cannot be dropped by a program, and cold rows are left
out.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

IO, STATUS, FILES = (Path("/proc/self") / name for name in ("io", "status", "fd"))
CAN_DROP = hasattr(os, "posix_fadvise") and IO.exists()


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
    """Drops the pages of files that have been synced out of the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def forget_peak() -> None:
    """Lets ``VmHWM`` start anew, where Linux permits it."""
    if STATUS.exists():
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def open_files() -> int:
    return len(os.listdir(FILES)) if FILES.exists() else 0


class Timed(NamedTuple):
    ms: float
    cpu_ms: float  # of all threads of this process
    disk_bytes: int


def timed(work: Callable[[], object]) -> Timed:
    """One call. What ``work`` returns is let go of only after the clock has stopped."""
    before, cpu, start = disk_bytes(), time.process_time(), time.perf_counter()
    result = work()
    ms, cpu_ms = (time.perf_counter() - start) * 1e3, (time.process_time() - cpu) * 1e3
    del result
    return Timed(ms, cpu_ms, disk_bytes() - before)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def machine() -> dict[str, str]:
    """The machine and the versions, for the head of a result."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
        f"{mx.default_device()}",
        "versions": f"Python {platform.python_version()}, mlx {version('mlx')}",
    }
