"""Folders that are whole or not there, and locks that die with their process.

Everything goes into ``NAME.part`` beside the destination, which also says in ``unfinished.json``
what it is made of. Files in it are written atomically, so one that is there is whole: a run that
was stopped goes on behind the last of them, provided that it is the same one (same source files,
same options); what is left of another one is deleted. At the end the folder is renamed and
``unfinished.json`` removed; if that last step was cut off, the same command makes up for it.
"""

import contextlib
import fcntl
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mlx_hmem.errors import UserError
from mlx_hmem.files import copy_file, lies_at, sync, sync_folder, take_lock, write_atomic
from mlx_hmem.reading import read_json

RECORD = "unfinished.json"
REPLACED = "replaced"  # the folder of before, while the new one takes its place
# Files of which a folder that may be overwritten has at least one.
MARKS = (
    "config.json", "hmem.json", "hmem_pytorch.json", "bundle.json", "adapter_config.json", RECORD,
)  # fmt: skip


@contextlib.contextmanager
def locked(path: Path, taken: UserError | None = None, wait: str = "") -> Iterator[Any]:
    """The file ``path``, made where it is missing and open at its end, for this process alone.

    Where another one has it: raises ``taken``, or prints ``wait`` and waits, or gives None.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        got = take_lock(file)
        if not got and taken is not None:
            raise taken
        if not got and wait:
            print(wait, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file if got or wait else None


@contextlib.contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Waits until no other program has a folder that is there, and keeps it for this one."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def whole_lines(file: BinaryIO) -> list[bytes]:
    """The lines of a file that grows; what a kill left of an unfinished one is cut off."""
    file.seek(0)
    data = file.read()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        file.truncate(whole)
    return data[:whole].splitlines()


def add_lines(file: BinaryIO, lines: Iterable[str]) -> None:
    """Adds lines at the end of a file that was opened so, and puts them on the disk."""
    file.write("".join(f"{line}\n" for line in lines).encode())
    sync(file)


def copy_missing(
    files: Mapping[Any, Path], folder: Path, copy: Callable[[Path, Path], None] = copy_file
) -> None:
    """Copies files into a folder, by their names there; one that is there is whole."""
    for name, source in files.items():
        if not (folder / name).exists():
            copy(source, folder / name)


def lies_in(path: Path, folder: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies below it, by whatever name: links are followed, and
    names that differ in case or in how accents are composed may be one, as on macOS they are."""
    inner, outer = path.resolve(), folder.resolve()
    if inner.is_relative_to(outer):
        return True
    alike = [Path(unicodedata.normalize("NFC", str(p)).casefold()) for p in (inner, outer)]
    if not alike[0].is_relative_to(alike[1]) or not outer.exists():
        return alike[0].is_relative_to(alike[1])
    return any(p.exists() and p.samefile(outer) for p in (inner, *inner.parents))


def identity_of(files: Iterable[Path], **options: Any) -> dict[str, Any]:
    """What a folder is made of: source files and options."""
    return {"sources": {str(f.resolve()): _state(f) for f in sorted(set(files))}, **options}


def _state(file: Path) -> list[int]:
    info = file.stat()
    return [info.st_size, info.st_mtime_ns]


@contextlib.contextmanager
def whole_folder(
    path: Path,
    identity: dict[str, Any] | None = None,
    *,
    replace: bool = False,
    need_bytes: int = 0,
) -> Iterator[Path]:
    """A folder to write into that becomes ``path`` only when the block ends without an error.

    Args:
        path: the folder to make; its parents are made too.
        identity: a JSON object; what an earlier call with an equal one has left is gone on with,
            so whoever writes skips the files that exist. None: each call begins anew, and leaves
            nothing where it fails.
        replace: whether a model that lies there may be replaced.
        need_bytes: what will be written, altogether.

    Raises UserError if ``path`` exists and may not be replaced, if the disk has too little room, if
    another program is writing there, or if a source changes meanwhile.
    """
    path = Path(os.path.abspath(path))  # the folder may be named "."
    part = path.with_name(f"{path.name}.part")
    anew = identity is None
    remedy = "choose another" if anew else "choose another or add --overwrite"
    identity = json.loads(json.dumps(identity or {}))
    renamed = _record(path) == identity and not part.exists()
    if not renamed:
        _check_existing(path, replace, identity, remedy)
        part.mkdir(parents=True, exist_ok=True)
    with _claimed(path if renamed else part, part):
        if renamed:
            if _record(path) != identity:  # whoever was at it has just ended
                raise UserError("the destination exists", path, "choose another")
            os.rename(path, part)  # only the last step is missing: it is done again
        if anew or _record(part) != identity:
            _clear(part, path)
        _check_existing(path, replace, identity, remedy)
        there = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        check_room(path.parent, need_bytes - there)
        write_atomic(part / RECORD, json.dumps(identity, indent=2) + "\n")
        try:
            yield part
            check_sources(identity)
        except BaseException:
            if anew:
                _clear(part, path)
            raise
        _finish(part, path)


def _record(folder: Path) -> Any:
    """What ``unfinished.json`` in the folder says; None where there is none."""
    with contextlib.suppress(UserError):
        return read_json(folder / RECORD)
    return None


def _check_existing(path: Path, replace: bool, identity: dict[str, Any], remedy: str) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not replace:
        raise UserError("the destination exists", path, remedy)
    if not path.is_dir() or path.is_symlink():
        raise UserError("the destination is not a folder", path, "choose another")
    if any(path.iterdir()) and not any((path / mark).exists() for mark in MARKS):
        raise UserError("the destination holds no model", path, "choose another")
    for source in identity.get("sources", {}):
        if lies_in(Path(source), path):
            raise UserError("the source lies in the destination", source, "choose another")


@contextlib.contextmanager
def _claimed(folder: Path, part: Path) -> Iterator[None]:
    """Keeps other programs out of a folder, also when it is renamed; removes an empty one."""
    other = UserError("another program writes here", folder, "wait for it to end")
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # that one has just renamed it
        raise other from None
    try:
        # Or it was renamed before it could be locked.
        if not take_lock(handle) or not lies_at(handle, folder):
            raise other
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if lies_at(handle, part):
                    part.rmdir()  # nothing was begun
    finally:
        os.close(handle)


def check_sources(identity: dict[str, Any]) -> None:
    """That what was read is what was there at the beginning."""
    for name, before in identity.get("sources", {}).items():
        if not os.path.exists(name) or _state(Path(name)) != before:
            raise UserError(
                "a source changed while it was read", name, "run the same command again"
            )


def _clear(part: Path, path: Path) -> None:
    """Empties the folder of what another run has left."""
    strays = set(os.listdir(part)) - {f".{RECORD}.part"}
    if strays and _record(part) is None:
        raise UserError("something else lies in the way", part, "move it away")
    if (part / REPLACED).exists() and not path.exists():
        os.rename(part / REPLACED, path)
    for entry in part.iterdir():
        if entry.name != RECORD:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (part / RECORD).unlink(missing_ok=True)  # last: without it the folder is a stranger's


def check_room(folder: Path, need_bytes: int) -> None:
    """Raises UserError unless so many bytes are free where ``folder`` lies."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise UserError(
            "no room on the disk",
            f"{need_bytes:,} bytes are needed, {free:,} are free",
            f"make room, or choose a destination elsewhere than {folder}",
        )


def _finish(part: Path, path: Path) -> None:
    for stray in part.rglob(".*.part"):  # of a write that was killed
        stray.unlink()
    for folder in (part, *(f for f in part.rglob("*") if f.is_dir())):
        sync_folder(folder)
    if path.exists():
        if (part / REPLACED).exists():  # killed here before, and then another one came to lie there
            shutil.rmtree(part / REPLACED)
        os.rename(path, part / REPLACED)
    os.rename(part, path)
    sync_folder(path.parent)
    shutil.rmtree(path / REPLACED, ignore_errors=True)
    (path / RECORD).unlink()
    sync_folder(path)
