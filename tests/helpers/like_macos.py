"""Takes from Linux what macOS has not: ``pytest -p tests.helpers.like_macos``.

Files past the page cache, advice for files, the choice of cores and ``/proc`` are gone for the
tests' own process; it and what it starts, spawned and not forked, may have 256 files open. What
macOS has in another way stays: room for files, and how much memory the process holds. What Linux
has not, Metal above all, only a Mac can show (docs/metal.md).
"""

import builtins
import io
import multiprocessing
import os
import re
import resource
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

GONE = [
    "O_DIRECT", "posix_fadvise", "POSIX_FADV_DONTNEED", "POSIX_FADV_RANDOM", "POSIX_FADV_WILLNEED",
    "sched_getaffinity", "sched_setaffinity",
]  # fmt: skip
STAY = re.compile(r"/proc/(self|\d+)/(statm|status)")


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(path: Any, *given: Any, **more: Any) -> Any:
        name = os.fsdecode(path) if isinstance(path, str | bytes | Path) else ""
        if name.startswith("/proc") and not STAY.fullmatch(name):
            raise FileNotFoundError(2, "macOS has none", name)
        return function(path, *given, **more)

    return call


for name in GONE:
    if hasattr(os, name):
        delattr(os, name)
for module, names in ((os, ("stat", "lstat", "listdir", "readlink", "open")), (io, ("open",))):
    for name in names:
        setattr(module, name, _without_proc(getattr(module, name)))
builtins.open = io.open
multiprocessing.set_start_method("spawn")
resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
