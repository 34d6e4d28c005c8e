"""Which files are read as documents, and what was passed over, counted by its reason and named.

Read are regular files inside the folder that was named, and nothing that a link leads to beyond it.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlx_hmem.documents.ignored import Ignored
from mlx_hmem.errors import printable
from mlx_hmem.folders import RECORD
from mlx_hmem.reading import open_regular

MAX_LINE = 1 << 26  # bytes; a longer line, or text file, is no document
MAX_NAMED = 20  # faults printed; the report file holds more
MAX_KEPT, MAX_SHOWN = 1000, 300  # faults, and characters of each name: a stranger's id is one
# Folders that programs fill, by their names; BUILT only beside one of PROJECTS.
PACKAGES = {"node_modules", "bower_components", "site-packages", "__pypackages__"}
CACHES = {"__pycache__", "__MACOSX"}
BUILT = {"build", "dist", "target", "out", "bin", "obj", "vendor", "coverage", "htmlcov"}
PROJECTS = {"package.json", "pyproject.toml", "setup.py", "Cargo.toml", "pom.xml", "build.gradle",
            "build.gradle.kts", "CMakeLists.txt", "Makefile", "go.mod"}  # fmt: skip
# What models and the runs beside them are told by, from the first moment that they are written.
MODEL = ("hmem.json", RECORD)
RUN, OF_RUN = "documents.jsonl", ("settings.json", "lock")
Document = tuple[str, str, str]  # id, title, text


@dataclass
class Faults:
    """What was passed over: counted by reason, the first ones named. ``kinds``: how many files of
    which kinds are none to read, and the names of the first in ``others``; ``encodings``: of the
    files that were read and are not UTF-8, how many have which."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    others: list[str] = field(default_factory=list)
    encodings: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str) -> None:
        reason = reason[:MAX_SHOWN]
        self.counts[reason] += 1
        if len(self.named) < MAX_KEPT:
            self.named.append(f"{where[:MAX_SHOWN]}: {reason}")

    def leave(self, where: str, kind: str) -> None:
        """Counts a file or folder that is none to read."""
        self.kinds[kind[:MAX_SHOWN]] += 1
        if len(self.others) < MAX_KEPT:
            self.others.append(f"{where[:MAX_SHOWN]}: {kind[:MAX_SHOWN]}")

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "named": self.named}

    def extend(self, values: dict[str, Any]) -> None:
        """Adds those of other files, as :meth:`to_dict` gives them."""
        self.counts.update(values["counts"])
        self.named += values["named"][: MAX_KEPT - len(self.named)]

    def print(self, every: bool = False) -> None:
        """The first that were passed over; with ``every`` all that are kept, and each file that is
        none to read."""
        shown = [*self.named, *self.others] if every else self.named[:MAX_NAMED]
        for line in shown:
            print(f"passed over {printable(line)}", file=sys.stderr)
        total = sum(self.counts.values()) + (sum(self.kinds.values()) if every else 0)
        if (more := total - len(shown)) > 0:
            print(f"passed over {more} more", file=sys.stderr)

    def said(self) -> str:
        """All in a line, the most frequent first."""
        often = sorted((self.counts + self.kinds).items(), key=lambda each: (-each[1], each[0]))
        return ", ".join(f"{count} {what}" for what, count in often)


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


def listing(
    folder: Path,
    faults: Faults,
    ends: Iterable[str] = ("",),
    kind_of: Callable[[Path], str] | None = None,
) -> list[CorpusFile]:
    """The regular files in ``folder`` and below whose names end so, by path; nothing that is
    hidden. Or the one file that ``folder`` is. What is left out for another reason, as a link that
    leads out of the folder, goes to ``faults``.

    ``kind_of``, for a person's own files, says of which kind one is that is none to read, or
    nothing; such are counted then, as are hidden ones, what is :mod:`.ignored`, and folders that
    programs have filled, unless an ignore file takes them back.
    """
    ends, found = tuple(ends), list[CorpusFile]()

    def unread(error: OSError) -> None:
        faults.add(str(error.filename), "a folder that cannot be read")

    def take(path: Path, name: str) -> None:
        if wrong := _wrong(path, folder):
            faults.add(name, wrong)
        elif not path.is_dir():
            if kind_of is not None and (kind := kind_of(path)):
                faults.leave(name, kind)
            else:
                found.append(CorpusFile(path, name))

    if folder.is_file():
        if folder.name.lower().endswith(ends):
            take(folder, folder.name)
        return found
    rules = Ignored(folder)
    for root, folders, files in os.walk(folder, onerror=unread):
        here, below = Path(root), Path(root).relative_to(folder)
        left = {name: "hidden" for name in folders + files if name.startswith(".")}
        if kind_of is not None:
            rules.enter(here)
            for name, is_folder in [*((n, True) for n in folders), *((n, False) for n in files)]:
                out = rules.out(here / name, is_folder)
                made = _made(here / name, files) if is_folder and out is None else ""
                if what := "ignored" if out else made:
                    left.setdefault(name, what)
            for name, what in sorted(left.items()):
                faults.leave((below / name).as_posix(), what)
        folders[:] = [name for name in folders if name not in left]
        files = [name for name in files if name.lower().endswith(ends) and name not in left]
        for name in folders + files:
            take(here / name, (below / name).as_posix())
    return sorted(found, key=lambda file: file.name)


def _made(path: Path, beside: Collection[str]) -> str:
    """What a folder holds that programs, this one too, have filled, if it is one; ``beside``: files
    next to it."""
    if path.name in PACKAGES or (path / "pyvenv.cfg").is_file():
        return "packages"
    if path.name in CACHES or (path / "CACHEDIR.TAG").is_file():
        return "a cache"
    if any((path / name).is_file() for name in MODEL):
        return "a model"
    if (path / RUN).is_file() and any((path / name).is_file() for name in OF_RUN):
        return "what a model was taught from"  # a text that is gone would stay learned
    built = path.name in BUILT and any(name in PROJECTS for name in beside)
    return "build output" if built or path.name.endswith((".egg-info", ".dist-info")) else ""


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
