"""Reading files record by record: JSON lines, plain or packed, and texts that are one document.

Every reader streams: a line is in memory at a time. The rest of a file that breaks off is one
fault. What is packed with zstd needs zstandard, which nothing else does.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from mlx_hmem.documents.encodings import decoded
from mlx_hmem.documents.files import MAX_LINE, CorpusFile, Document, Faults, file_bytes
from mlx_hmem.errors import UserError, needed, printable
from mlx_hmem.reading import open_regular

ZSTD_PIECE = 1 << 12  # bytes of a zstd file at a time: they may stand for 30,000 times as many
PACKAGES = {".zst": "zstandard", ".parquet": "pyarrow.parquet", ".pdf": "pypdf",
            ".rtf": "striprtf.striprtf"}  # fmt: skip
Declared = Callable[[bytes], str]
Reader = Callable[[CorpusFile, Faults], Iterator[Document]]


def _from_zstd(file: BinaryIO, zstandard: Any) -> Iterator[bytes]:
    """The content of a zstd file. The library's own reader takes a truncated file for a whole one;
    this raises ``EOFError`` there, as gzip does."""
    # The most that `zstd --long=31` asks for.
    decompressor, frame = zstandard.ZstdDecompressor(max_window_size=1 << 31), None
    while piece := file.read(ZSTD_PIECE):
        while piece:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(piece)
            frame, piece = (None, frame.unused_data) if frame.eof else (frame, b"")
    if frame is not None:
        raise EOFError("the file ends within a frame")


def package_for(path: Path) -> ModuleType | None:
    """The package that reading ``path`` needs, if it needs one."""
    name = PACKAGES.get(path.suffix.lower())
    return needed(name, f"reading {path.name}") if name else None


def good_ones(
    source: CorpusFile,
    faults: Faults,
    records: Iterable[Any],
    parse: Callable[[Any, int], Document | None],
    kind: str,
    broken: tuple[type[Exception], ...],
) -> Iterator[Document]:
    """The documents of ``records``, which count from 1, as ``parse`` gives them; damage, which
    shows by an error of ``broken``, ends them."""
    number = 0
    try:
        for number, record in enumerate(records, 1):
            try:
                if (document := parse(record, number)) is not None:
                    yield document
            except ValueError as error:
                faults.add(f"{source.name}:{number}", str(error))
    except broken as error:
        text = " ".join(str(error).split())[:120]
        reason = text if text.startswith("no column") else f"broken {kind} ({text})"
        faults.add(f"{source.name}:{number + 1}", reason)
        return
    if not number:
        faults.add(source.name, "an empty file")


def document_of(record: dict[str, Any], number: int) -> Document:
    """The document of a record; a ``ValueError`` names the fault."""
    for key in ("id", "text"):
        if key not in record:
            raise ValueError(f"no `{key}`")
    if not isinstance(record["text"], str):
        raise ValueError("`text` is not a text")
    title = record.get("title")
    return str(record["id"]), title if isinstance(title, str) else "", record["text"]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in a line of JSON, if the line is not empty."""
    if len(line) == MAX_LINE and not line.endswith(b"\n"):
        raise ValueError(f"a line over {MAX_LINE} bytes")
    if not line.strip():
        return None
    try:
        record = json.loads(line.decode("utf-8-sig"))
        if isinstance(record, dict):
            json.dumps(record, ensure_ascii=False).encode("utf-8")  # lone surrogates fail here
    except UnicodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def lines_of(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The lines that pieces of a file make, of one longer than ``MAX_LINE`` its beginning."""
    line = bytearray()
    for piece in pieces:
        start = 0
        while start < len(piece):
            end = piece.find(b"\n", start) + 1 or len(piece)
            line += piece[start : min(end, start + MAX_LINE - len(line))]
            if piece.endswith(b"\n", start, end):
                yield bytes(line)
                line.clear()
            start = end
    if line:
        yield bytes(line)


def read_lines(
    source: CorpusFile,
    faults: Faults,
    document: Callable[[dict[str, Any], int], Document] = document_of,
) -> Iterator[Document]:
    """The documents of JSON lines, packed or not; ``document`` makes one of an object and the
    number of its line."""

    def parse(line: bytes, number: int) -> Document | None:
        record = _parsed(line)
        return None if record is None else document(record, number)

    kind, broken = "file", tuple[type[Exception], ...]()
    with open_regular(source.path) as stored:
        file: Any = io.BufferedReader(stored)
        if source.path.suffix.lower() == ".gz":
            file = gzip.GzipFile(fileobj=file)
            kind, broken = "gzip", (EOFError, gzip.BadGzipFile, zlib.error)
        pieces = iter(lambda: file.read1(io.DEFAULT_BUFFER_SIZE), b"")
        if source.path.suffix.lower() == ".zst":
            zstandard: Any = package_for(source.path)
            pieces = _from_zstd(stored, zstandard)
            kind, broken = "zstd", (EOFError, zstandard.ZstdError)
        yield from good_ones(source, faults, lines_of(pieces), parse, kind, broken)


def one_document(text_of: Callable[[CorpusFile, Faults], str]) -> Reader:
    """Reads files that are one document each: the path is its id, the name without suffix its
    title. ``text_of`` raises a ``ValueError`` where there is no text."""

    def read(source: CorpusFile, faults: Faults) -> Iterator[Document]:
        try:
            source.name.encode()
        except UnicodeEncodeError:  # names are bytes on Linux
            raise ValueError("a name that is not UTF-8") from None
        yield source.name, source.path.stem, text_of(source, faults)

    return read


def read_text(source: CorpusFile, faults: Faults, declared: Declared = lambda data: "") -> str:
    """The text of a file; ``declared``: what it says of its encoding itself."""
    data = file_bytes(source.path)
    if not data.strip():
        raise ValueError("an empty file")
    text, encoding = decoded(data, declared(data))
    if encoding != "utf-8":
        faults.encodings[encoding] += 1
    return text


def documents_in(
    file: CorpusFile, faults: Faults, readers: Mapping[str, Reader]
) -> Iterator[Document]:
    """(id, title, text) of each good document, in order; the others go to ``faults``, as does a
    file that is gone, may not be read, or is not what its name says. A name that no reader's ends
    is read by that of "", the last."""
    name = file.name.lower()
    try:
        yield from next(read for end, read in readers.items() if name.endswith(end))(file, faults)
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeError) else str(error)
        if isinstance(error, OSError | UserError):
            what = error.what if isinstance(error, UserError) else error.strerror
            reason = f"it cannot be read ({what})"
        faults.add(printable(file.name), reason)


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXTS: dict[str, Reader] = dict.fromkeys((".txt", ".md"), one_document(read_text))
