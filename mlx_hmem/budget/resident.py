"""The memory that this process holds, asked of the system, and what keeps it within a budget.

A budget is measured as resident memory above what the interpreter with MLX imported holds. That
part differs between machines and nobody can change it; on Linux it was 21 MB, and ``IMPORTS`` more
when all that generation needs had been imported.
"""

import ctypes
import os
import re
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from mlx_hmem.errors import UserError

IMPORTS = 64_000_000  # bytes of mlx-lm, its tokenizers and this package, imported
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
SIZE_HELP = "as 400MB, 1.5GB or plain bytes; it counts resident memory above that of Python with "
SIZE_HELP += "nothing but MLX imported"
STATM, STATUS = Path("/proc/self/statm"), Path("/proc/self/status")
LARGE = 1 << 20  # an allocation of so many bytes is a map of its own, which goes back when freed
# 64-bit words of macOS' rusage_info_v4: ri_phys_footprint and ri_lifetime_max_phys_footprint.
RUSAGE_INFO_V4, WORDS, NOW, MOST = 4, 37, 9, 30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # glibc's malloc.h


def parse_bytes(text: str, name: str = "--memory-budget") -> int:
    """Bytes of a size as people write it; MB is a million, MiB 2**20."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS:
        raise UserError(f"{name} is not a size", repr(text), "write 400MB, 1.5GB or plain bytes")
    return int(float(found[1]) * UNITS[found[2].upper()])


def bytes_text(number: float) -> str:
    """As :func:`parse_bytes` reads it: the bytes, whole MB (rounded up), GB or TB."""
    if number >= 10**12:
        return f"{number / 1e12:.1f}TB"
    if number >= 10**10:
        return f"{number / 1e9:.1f}GB"
    return f"{-(-int(number) // 10**6)}MB" if abs(number) >= 10**6 else f"{int(number)} bytes"


def resident_bytes() -> int:
    """Resident memory now; on macOS the footprint, by which the system judges a process."""
    if STATM.exists():
        return int(STATM.read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return _footprint(NOW) or IMPORTS + mx.get_active_memory() + mx.get_cache_memory()


def peak_resident_bytes() -> int:
    """The most :func:`resident_bytes` of this process so far."""
    if STATUS.exists():  # Linux's getrusage counts what the parent held before this program began
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    if footprint := _footprint(MOST):
        return footprint
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _footprint(word: int) -> int:
    """What macOS charges this process with, now or at most; 0 elsewhere."""
    info = (ctypes.c_uint64 * WORDS)()
    if sys.platform != "darwin":
        return 0
    failed = ctypes.CDLL(None).proc_pid_rusage(os.getpid(), RUSAGE_INFO_V4, ctypes.byref(info))
    return 0 if failed else int(info[word])


def base_bytes() -> int:
    """What a budget does not count: resident memory before anything is loaded, with MLX's device,
    which Metal makes when it is first used."""
    mx.eval(mx.zeros(1))
    return resident_bytes() - IMPORTS


def machine_bytes() -> int:
    """Bytes of memory, or of what the GPU may use of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(total, int(mx.device_info().get("max_recommended_working_set_size") or total))


def give_back_freed() -> None:
    """Makes glibc's allocator give memory back when it is freed: left to itself it keeps freed
    blocks of up to 32 MB for later. What it costs is page faults, 0.3 ms for each MB."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((M_MMAP_THRESHOLD, LARGE), (M_TRIM_THRESHOLD, LARGE)):
            libc.mallopt(option, value)
        libc.mallopt(M_ARENA_MAX, 2)


def trim() -> None:
    """Gives back what MLX and the allocator keep of freed memory."""
    mx.clear_cache()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def limit_buffers() -> None:
    """Has MLX keep no more freed buffers than an eighth of the machine's memory. On Metal it keeps
    them without a limit: steps of other lengths then grow until all memory is taken."""
    most = machine_bytes() // 8
    if (before := mx.set_cache_limit(most)) < most:
        mx.set_cache_limit(before)


class OverBudgetError(UserError):
    """The memory budget is used up."""


class Watch:
    """Called between steps, looks whether the process is within its budget: 10 to 20 µs on Linux.

    Args:
        budget: bytes above ``base``.
        base: resident bytes of the interpreter with MLX.
        drop: lets go of what can be had again, the kept blocks of a bank.
        wired: bytes that Metal may wire; None elsewhere.
    """

    def __init__(
        self,
        budget: int,
        base: int,
        drop: Callable[[], None],
        remedy: str,
        wired: int | None = None,
    ):
        self.budget, self.base, self._drop, self._remedy = budget, base, drop, remedy
        self.wired = wired

    def __call__(self) -> None:
        """Over the budget, drops what it can; if that is not enough, raises OverBudgetError."""
        if self.wired is not None:
            mx.set_wired_limit(self.wired)  # mlx-lm has set the most at the beginning of its stream
        if resident_bytes() - self.base <= self.budget:
            return
        self._drop()
        trim()
        if (used := resident_bytes() - self.base) > self.budget:
            what = f"{bytes_text(used)} of {bytes_text(self.budget)}"
            raise OverBudgetError("the memory budget is used up", what, self._remedy)
