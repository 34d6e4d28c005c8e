"""Which files are read as documents, and what was passed over, counted by its reason and named.

Read are regular files inside the folder that was named, and nothing that a link leads to beyond it.
"""

import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlx_hmem.errors import printable
from mlx_hmem.reading import open_regular

from .ignored import Ignored

MAX_LINE = 1 << 26  # bytes; a longer line, or text file, is no document
MAX_NAMED = 20  # faults printed; the report file holds more
MAX_KEPT, MAX_SHOWN = 1000, 300  # faults, and characters of each name: a stranger's id is one
Document = tuple[str, str, str]  # id, title, text


@dataclass
class Faults:
    """What was passed over: counted by reason, the first ones named."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        reason = reason[:MAX_SHOWN]
        self.counts[reason] += 1
        if len(self.named) < MAX_KEPT:
            self.named.append(f"{where[:MAX_SHOWN]}: {reason}")

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "named": self.named}

    def extend(self, values: dict[str, Any]) -> None:
        """Adds those of other files, as :meth:`to_dict` gives them."""
        self.counts.update(values["counts"])
        self.named += values["named"][: MAX_KEPT - len(self.named)]

    def print(self) -> None:
        for line in self.named[:MAX_NAMED]:
            print(f"passed over {printable(line)}", file=sys.stderr)
        if (more := sum(self.counts.values()) - MAX_NAMED) > 0:
            print(f"passed over {more} more", file=sys.stderr)


class CorpusFile(NamedTuple):
    """A file to read; ``name`` is its path below the corpus folder."""

    path: Path
    name: str

    @property
    def state(self) -> tuple[int, int]:
        """Its bytes and time of change; zeros where it is gone, which is said when it is read."""
        try:
            found = self.path.stat()
        except OSError:
            return 0, 0
        return found.st_size, found.st_mtime_ns


def file_bytes(path: Path, most: int = MAX_LINE) -> bytes:
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"a file over {most} bytes")
    return data


def listing(folder: Path, ends: Iterable[str], all_kinds: bool = False) -> list[CorpusFile]:
    """The regular files in ``folder`` and below whose names end so, by path; nothing that is
    hidden. Or the one file that ``folder`` is. What is left out for another reason, as a link that
    leads out of the folder, is named on standard error; with ``all_kinds`` also how many files of
    which other endings there are, and what is :mod:`.ignored` is left out."""
    ends, found, faults, others = tuple(ends), list[CorpusFile](), Faults(), Counter[str]()
    if folder.is_file():
        return [CorpusFile(folder, folder.name)] if folder.name.lower().endswith(ends) else []

    def unread(error: OSError) -> None:
        faults.add(str(error.filename), "a folder that cannot be read")

    rules = Ignored(folder)
    for root, folders, files in os.walk(folder, onerror=unread):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [name for name in files if not name.startswith(".")]
        if all_kinds:
            folders[:] = rules.left(Path(root), folders, folders=True)
            files = rules.left(Path(root), files, folders=False)
        others.update(Path(n).suffix.lower() for n in files if not n.lower().endswith(ends))
        files = [name for name in files if name.lower().endswith(ends)]
        for path in (Path(root, name) for name in folders + files):
            name = path.relative_to(folder).as_posix()
            if wrong := _wrong(path, folder):
                faults.add(name, wrong)
            elif not path.is_dir():
                found.append(CorpusFile(path, name))
    often = sorted(others.items(), key=lambda each: (-each[1], each[0]))
    for end, count in often if all_kinds else ():
        what = f"*{end}" if end else "without an ending"
        faults.add(f"{count} file{'s' * (count > 1)} {what}", "a kind that is not read")
    if rules.count:
        faults.add(f"{rules.count} files or folders", "ignored")
    faults.print()
    return sorted(found, key=lambda file: file.name)


def _wrong(path: Path, folder: Path) -> str:
    """Why a path in a folder is not read, if it is not; links to folders are not followed."""
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(folder.resolve()):
            return "a link that leads out of the folder"
        if path.is_symlink() and path.is_dir():
            return "a link to a folder"
        return "" if path.is_file() or path.is_dir() else "not a file"
    except (OSError, RuntimeError) as error:  # a link in a circle
        return f"it cannot be read ({getattr(error, 'strerror', 'a circle of links')})"
