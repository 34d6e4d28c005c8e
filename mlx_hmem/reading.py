"""Reading what somebody brings: regular files alone, whole, and JSON that is JSON."""

import codecs
import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from mlx_hmem.errors import UserError

Source = str | os.PathLike[str]

RESTORE = "fetch or make the file again"
MOST_DIGITS = 4300  # of a number: Python reads no more into an int


def require_file(path: Path, remedy: str) -> None:
    """Raises UserError, which ends in ``remedy``, unless ``path`` is a file."""
    if not path.is_file():
        wrong = "not a file but a folder" if path.is_dir() else "a file is missing"
        raise UserError(wrong, path, remedy)


def lies_there(path: Path) -> bool:
    """Whether anything lies at ``path``, be it a link that leads nowhere. Absent is only what the
    system says is missing: where it does not say, a UserError."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"cannot see whether {path} is there", error, "check the path") from None
    return True


@contextlib.contextmanager
def open_regular(path: Source) -> Iterator[BinaryIO]:
    """Opens a regular file for reading, unbuffered; anything else is a :class:`UserError`."""
    try:
        # Asked first: opening a pipe would wait for a writer.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError("not a file", path, "give the path of a file")
        file = open(path, "rb", buffering=0)  # noqa: SIM115
    except FileNotFoundError:
        raise UserError("a file is missing", path, "fetch or make it again") from None
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise UserError(f"cannot read {path}", error, "check the path") from None
    with file:
        yield file


def read_exactly(file: BinaryIO, length: int, path: Source) -> bytes:
    """The next ``length`` bytes, or a :class:`UserError`: the file shrank while it was read."""
    parts = []
    while length:
        part = file.read(length)
        if not part:
            raise UserError(f"{path} ends too early", f"{length} bytes are missing", RESTORE)
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def read_json(
    path: Path, most_bytes: int = 1 << 28, parse: Callable[[bytes], Any] = json.loads
) -> Any:
    """Reads a JSON file of at most ``most_bytes``, behind a byte order mark or not.

    Other people's files may hold what ``json.loads`` lets through, such as Infinity.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise UserError(f"{path} is too large for JSON", f"{size} bytes", "restore the file")
        text = read_exactly(file, size, path)
    try:
        return parse(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON", error, "restore the file") from None


class FieldError(ValueError):
    """A value that JSON does not have; ``place``: where, as ``messages[0].content``."""

    def __init__(self, place: str, why: str):
        super().__init__(f"{place}: {why}" if place else why)
        self.place = place


class _Odd(str):
    """Why a value is none, in its place until it is known where that is."""


def strict_json(text: bytes) -> Any:
    """Parses UTF-8 JSON, behind a byte order mark or not; repeated names, NaN, lone surrogates and
    numbers of thousands of digits are a :class:`FieldError`, all else that is no JSON a
    ValueError."""
    odd: list[_Odd] = []

    def note(why: str) -> _Odd:
        odd.append(_Odd(why))
        return odd[-1]

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            result[Counter(name for name, _ in pairs).most_common(1)[0][0]] = note("occurs twice")
        return result

    def whole(digits: str) -> Any:
        fits = len(digits) <= MOST_DIGITS
        return int(digits) if fits else note(f"is a number of {len(digits)} digits")

    try:
        found = json.loads(
            text.decode("utf-8-sig"),
            object_pairs_hook=members,
            parse_constant=lambda name: note(f"is {name}, which is not JSON"),
            parse_int=whole,
        )
        if odd or (b"\\u" in text and not _is_text(json.dumps(found, ensure_ascii=False))):
            _check_fields(found, "")
        return found
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _check_fields(value: Any, place: str) -> None:
    """Raises FieldError for the first value that is none."""
    if isinstance(value, _Odd):
        raise FieldError(place, value)
    if isinstance(value, str) and not _is_text(value):
        raise FieldError(place, "has a lone surrogate, which is no character")
    if isinstance(value, list):
        for number, each in enumerate(value):
            _check_fields(each, f"{place}[{number}]")
    elif isinstance(value, dict):
        for name, each in value.items():
            shown = name[:80].encode(errors="backslashreplace").decode()
            inside = f"{place}.{shown}" if place else shown
            _check_fields(name, inside)
            _check_fields(each, inside)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum: a bit that flips in it would be taken for what it says."""
    return values | {"xxh3": _checksum(values)}


def unsealed(values: Any) -> dict[str, Any]:
    """What was :func:`sealed`, without the checksum; what is of before has none. Raises ValueError
    if it is another."""
    if not isinstance(values, dict):
        raise ValueError(f"not a JSON object: {repr(values)[:80]}")
    rest = {key: value for key, value in values.items() if key != "xxh3"}
    if values.get("xxh3") not in (None, _checksum(rest)):
        raise ValueError(f"checksum {values['xxh3']}")
    return rest


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """The object of a JSON file, :func:`unsealed`; UserError if it is damaged."""
    try:
        return unsealed(read_json(path))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is damaged", error, remedy) from None


def read_sealed_lines(path: Path, remedy: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, each :func:`unsealed`; UserError with the number of the
    line if one is damaged."""
    with open_regular(path) as opened:
        lines, found = opened.read().splitlines(), list[dict[str, Any]]()
    for number, line in enumerate(lines, 1):
        try:
            found.append(unsealed(strict_json(line)))
        except ValueError as error:
            raise UserError(f"{path}, line {number}, is damaged", error, remedy) from None
    return found


def _checksum(values: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(values, sort_keys=True).encode())


def check_mark(path: Path) -> None:
    """Raises UserError for a file that begins with a byte order mark. What we alone read may have
    one, as editors on Windows write it; mlx-lm, transformers and tokenizers do not read such."""
    with open_regular(path) as file:
        begin = file.read(3)
    for mark in (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        if begin.startswith(mark):
            what = f"{path} begins with a byte order mark, which mlx-lm does not read"
            raise UserError(what, mark.hex(" "), "save it as UTF-8 without one")


def check_version(values: Any, version: int, path: Path, remedy: str) -> None:
    """Raises UserError unless the JSON object ``values`` is of the format version we read."""
    found = values.get("format_version") if isinstance(values, dict) else None
    if type(found) is not int or found != version:
        raise UserError(
            f"{path} has a format version this program does not read",
            repr(found)[:40],
            f"it reads version {version}; update mlx_hmem or {remedy}",
        )
