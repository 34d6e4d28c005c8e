"""Reading a corpus: JSON lines (plain, gzip, zstd), parquet, and folders of plain text.

Every reader streams: a line, or a slice of a parquet row group, is in memory at a time. What cannot
be read is passed over, counted by its reason and named; the rest of a file that breaks off is one
fault. Order is by path, so it is the same on every machine; which documents a sample takes does
not depend on it.

zstandard and pyarrow are not needed by anything else and are large, so they are optional.
"""

import contextlib
import gzip
import importlib
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

from tqdm import tqdm

from mlx_hmem.errors import UserError

MAX_LINE = 1 << 26  # bytes; a longer line, or text file, is no document
MAX_NAMED = 20  # faults printed; the report file holds more
MAX_KEPT = 1000
ZSTD_PIECE = 1 << 12  # bytes of a zstd file at a time: they may stand for 30,000 times as many
PARQUET_ROWS = 256
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow.parquet"}
FOLDER_HELP = (
    "folder of *.jsonl, *.jsonl.gz, *.jsonl.zst or *.parquet files with id, title and text; where "
    "the folder itself has none, those in its subfolders are read; where these have none either, "
    "every *.txt and *.md file in it or below is one document"
)

Document = tuple[str, str, str]  # id, title, text


@dataclass
class Faults:
    """What was passed over: counted by reason, the first ones named."""

    counts: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def add(self, where: str, reason: str) -> None:
        self.counts[reason] += 1
        if len(self.named) < MAX_KEPT:
            self.named.append(f"{where}: {reason}")

    def to_dict(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "named": self.named}

    def extend(self, values: dict[str, Any]) -> None:
        """Adds those of other files, as :meth:`to_dict` gives them."""
        self.counts.update(values["counts"])
        self.named += values["named"][: MAX_KEPT - len(self.named)]

    def print(self) -> None:
        for line in self.named[:MAX_NAMED]:
            print(f"passed over {line}", file=sys.stderr)
        if (more := sum(self.counts.values()) - MAX_NAMED) > 0:
            print(f"passed over {more} more", file=sys.stderr)


class CorpusFile(NamedTuple):
    """A file to read; ``name`` is its path below the corpus folder."""

    path: Path
    name: str


def _printable(name: str) -> str:
    return name.encode(errors="replace").decode()


class _ZstdFile(io.RawIOBase):
    """The content of a zstd file. The library's own reader takes a truncated file for a whole one;
    this raises ``EOFError`` there, as gzip does."""

    def __init__(self, path: Path, zstandard: ModuleType):
        # The most that `zstd --long=31` asks for.
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._file, self._frame, self._left = path.open("rb"), None, b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = self._file.read(ZSTD_PIECE)
            if not piece:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._left = self._decompress(piece)
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count

    def _decompress(self, piece: bytes) -> bytes:
        parts = []
        while piece:
            frame = self._frame or self._new()
            parts.append(frame.decompress(piece))
            self._frame, piece = (None, frame.unused_data) if frame.eof else (frame, b"")
        return b"".join(parts)


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"reading {path.name} needs the package {name.partition('.')[0]}",
            "it is not installed",
            "pip install 'mlx-hmem[corpora]'",
        ) from None


def _open_lines(path: Path) -> tuple[BinaryIO, str, tuple[type[Exception], ...]]:
    """(file, name of its compression, errors by which damage shows)."""
    if path.suffix == ".zst":
        zstandard = _package("zstandard", path)
        file = io.BufferedReader(_ZstdFile(path, zstandard), 1 << 16)
        return file, "zstd", (EOFError, zstandard.ZstdError)
    if path.suffix == ".gz":
        return gzip.open(path), "gzip", (EOFError, gzip.BadGzipFile, zlib.error)  # type: ignore[return-value]
    return path.open("rb"), "file", ()


def _lines(source: CorpusFile, faults: Faults) -> Iterator[tuple[int, bytes]]:
    """(line number, line) of a plain or compressed file; an unreadable rest is one fault."""
    number = 0
    file, compression, broken = _open_lines(source.path)
    with file:
        while True:
            number += 1
            try:
                line = file.readline(MAX_LINE)
                if too_long := len(line) == MAX_LINE and not line.endswith(b"\n"):
                    while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                        pass
            except broken as error:
                faults.add(f"{source.name}:{number}", f"broken {compression} ({error})")
                return
            if not line:
                if number == 1:
                    faults.add(source.name, "an empty file")
                return
            if too_long:
                faults.add(f"{source.name}:{number}", f"a line over {MAX_LINE} bytes")
            elif line.strip():
                yield number, line


def _document(record: dict[str, Any]) -> Document:
    """The document of a record; a ``ValueError`` names the fault."""
    for key in ("id", "text"):
        if key not in record:
            raise ValueError(f"no `{key}`")
    if not isinstance(record["text"], str):
        raise ValueError("`text` is not a text")
    title = record.get("title")
    return str(record["id"]), title if isinstance(title, str) else "", record["text"]


def _parse(line: bytes) -> Document:
    try:
        record = json.loads(line.decode("utf-8"))
        if isinstance(record, dict):
            json.dumps(record, ensure_ascii=False).encode("utf-8")  # lone surrogates fail here
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return _document(record)


def _read_lines(source: CorpusFile, faults: Faults) -> Iterator[Document]:
    for number, line in _lines(source, faults):
        try:
            yield _parse(line)
        except ValueError as error:
            faults.add(f"{source.name}:{number}", str(error))


def _read_text(source: CorpusFile, faults: Faults) -> Iterator[Document]:
    """A text file is one document: its path is the id, its name without suffix the title."""
    with source.path.open("rb") as file:
        data = file.read(MAX_LINE + 1)
    try:
        if len(data) > MAX_LINE:
            raise ValueError(f"a text file over {MAX_LINE} bytes")
        if not data.strip():
            raise ValueError("an empty file")
        source.name.encode()  # names are bytes on Linux
        text = data.decode("utf-8-sig")
    except ValueError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
        faults.add(_printable(source.name), reason)
        return
    yield source.name, source.path.stem, text


def _parquet_rows(file: BinaryIO, path: Path) -> Iterator[dict[str, Any]]:
    """id, title and text of every row, those that are null left out."""
    # A buffered stream: else pyarrow holds the columns of a whole row group.
    table = _package("pyarrow.parquet", path).ParquetFile(file, buffer_size=1 << 20)
    names = set(table.schema_arrow.names)
    for column in ("id", "text"):
        if column not in names:
            raise ValueError(f"no column `{column}`")
    columns = [column for column in ("id", "title", "text") if column in names]
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(PARQUET_ROWS, [group], columns, use_threads=False):
            for row in range(batch.num_rows):
                record = {}
                for column in columns:
                    # A broken value counts as missing.
                    with contextlib.suppress(UnicodeError):
                        record[column] = batch.column(column)[row].as_py()
                yield {name: value for name, value in record.items() if value is not None}


def _read_parquet(source: CorpusFile, faults: Faults) -> Iterator[Document]:
    number, broken = 0, _package("pyarrow", source.path).ArrowException
    with source.path.open("rb") as file:
        rows = _parquet_rows(file, source.path)
        while True:
            number += 1
            try:
                record = next(rows, None)
            except (broken, ValueError, KeyError, OSError) as error:
                text = " ".join(str(error).split())[:120]
                reason = text if text.startswith("no column") else f"broken parquet ({text})"
                faults.add(f"{source.name}:{number}", reason)
                return
            if record is None:
                if number == 1:
                    faults.add(source.name, "an empty file")
                return
            try:
                yield _document(record)
            except ValueError as error:
                faults.add(f"{source.name}:{number}", str(error))


Reader = Callable[[CorpusFile, Faults], Iterator[Document]]
RECORDS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".jsonl.gz": _read_lines,
    ".jsonl.zst": _read_lines,
    ".parquet": _read_parquet,
}
TEXTS: dict[str, Reader] = {".txt": _read_text, ".md": _read_text}


def documents_of(file: CorpusFile, faults: Faults) -> Iterator[Document]:
    """(id, title, text) of each good document, in order; the others go to ``faults``."""
    reader = next(r for end, r in (RECORDS | TEXTS).items() if file.name.endswith(end))
    yield from reader(file, faults)


def read_documents(files: Iterable[CorpusFile], faults: Faults) -> Iterator[Document]:
    """:func:`documents_of` several files, with a progress bar."""
    with tqdm(unit=" documents") as progress:
        for file in files:
            progress.set_description_str(_printable(file.name), refresh=False)
            for document in documents_of(file, faults):
                progress.update()
                yield document


def listing(folder: Path) -> list[CorpusFile]:
    """Every regular file in ``folder`` and below, by path; nothing that is hidden."""
    names: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(root).relative_to(folder)
        names += [(inside / name).as_posix() for name in files if not name.startswith(".")]
    return [CorpusFile(folder / n, n) for n in sorted(names) if (folder / n).is_file()]


def corpus_files(source: Path | None) -> list[CorpusFile]:
    """The files of a corpus folder, in order of path; ``source`` may also be one file.

    Records, if there are any, are the corpus: a README beside them is no document. Those in the
    folder itself come before those in subfolders, which often hold what the former were made of.
    """
    if source is None:
        raise UserError(
            "the recipe samples documents but no corpus is given",
            "--corpus",
            "give the folder of *.jsonl or *.jsonl.gz files, or set corpus.documents to 0",
        )
    found = [CorpusFile(source, source.name)] if source.is_file() else listing(source)
    records = [file for file in found if file.name.endswith(tuple(RECORDS))]
    files = [file for file in records if "/" not in file.name] or records
    files = files or [file for file in found if file.name.endswith(tuple(TEXTS))]
    if not files:
        kinds = ", ".join(f"*{end}" for end in (RECORDS | TEXTS))
        raise UserError(f"no {kinds} file", source, "give the corpus folder")
    if left := len(records) - len(files) if records else 0:
        print(f"corpus: {left} files in subfolders of {source} are not read", file=sys.stderr)
    for file in files:  # asked before an hour of reading
        if package := PACKAGES.get(file.path.suffix):
            _package(package, file.path)
    return files
