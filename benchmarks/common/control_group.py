"""A limit on a program's memory that is held from outside: a Linux control group, version 1 or 2.

Whatever the program maps, copies or lets the kernel keep of its files counts. At the limit the
kernel first lets go of pages that it can read again, then ends the program.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlx_hmem.errors import UserError

ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
LIMITS = ("memory.max", "memory.limit_in_bytes")
PEAKS = ("memory.peak", "memory.max_usage_in_bytes")
EVENTS = ("memory.events", "memory.oom_control")


def _first(folder: Path, names: Sequence[str]) -> Path:
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        raise UserError("not a control group of memory", folder, f"it must have {names[0]}")
    return found


class ControlGroup:
    """A group with a limit. ``command`` runs another command inside it."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        _first(folder, LIMITS).write_text(str(limit))

    def command(self, command: Sequence[str]) -> list[str]:
        return ["sh", "-c", ENTER, str(self.folder), *command]

    def counted(self) -> dict[str, int]:
        """The limit, the most that was counted, in bytes, and how many programs were ended."""
        events = _first(self.folder, EVENTS).read_text().split()
        kills = int(events[events.index("oom_kill") + 1]) if "oom_kill" in events else 0
        peak = int(_first(self.folder, PEAKS).read_text())
        return {"limit_bytes": self.limit, "peak_bytes": peak, "kills": kills}


@contextlib.contextmanager
def control_group(parent: Path, limit: int) -> Iterator[ControlGroup]:
    """A child of the group ``parent``, a folder of the control group file system, that holds its
    programs to ``limit`` bytes; it is gone at the end."""
    folder = parent / f"mlx-hmem-{os.getpid()}"
    try:
        folder.mkdir()
        group = ControlGroup(folder, limit)
    except OSError as error:
        raise UserError("cannot make a control group", error, "name one of your own") from None
    try:
        yield group
    finally:
        folder.rmdir()
