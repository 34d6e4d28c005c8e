"""The text of word processors' files and of books: zip archives with XML in them.

Only the parts that hold text are unpacked, by their names in the archive, up to a bound; the XML is
parsed without entities of its own, so nothing in it can grow or lead elsewhere.
"""

import io
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import BinaryIO
from urllib.parse import unquote
from xml.parsers import expat

from mlx_hmem.documents.encodings import decoded
from mlx_hmem.documents.pages import declared_encoding, page_text

MAX_UNPACKED = 1 << 26  # bytes of all parts together
MAX_DEPTH = 1000
MAX_NAMES = 1 << 22  # bytes of an archive's table of contents
# Of Open XML and OpenDocument: what was deleted, remarks, and what stands there once more.
LEFT_OUT = ("tracked-changes", "annotation", "del", "Fallback")
SPACES = {"tab": " ", "s": " ", "br": "\n", "cr": "\n", "line-break": "\n"}
CELLS = ("tc", "table-cell")
_END = b"PK\x05\x06"  # begins the last record of an archive
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError,
          struct.error, expat.ExpatError, UnicodeError, KeyError)  # fmt: skip


class Archive:
    """A zip file's parts; all that is read of them is at most ``MAX_UNPACKED`` bytes."""

    def __init__(self, file: BinaryIO):
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - (1 << 16) - 22))
        tail = file.read(1 << 17)
        at = tail.rfind(_END)
        if at < 0 or struct.unpack_from("<L", tail, at + 12)[0] > MAX_NAMES:
            raise ValueError("a damaged archive, or one of too many parts")
        self.zip, self.left = zipfile.ZipFile(file), MAX_UNPACKED
        self.names = set(self.zip.namelist())

    def read(self, name: str) -> bytes:
        info = self.zip.getinfo(name)
        if info.flag_bits & 1:
            raise ValueError("it is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("packed in a way that its kind does not know")
        with self.zip.open(info) as part:
            data = part.read(self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {MAX_UNPACKED} bytes")
        return data


def parse(data: bytes, start: Callable[[str, dict[str, str]], None],
          end: Callable[[str], None] = lambda name: None,
          said: Callable[[str], None] = lambda text: None) -> None:  # fmt: skip
    """Goes through XML; names of elements and attributes are without their namespaces."""

    depth = 0

    def own(name: str) -> str:
        return name.rpartition(" ")[2]

    def opened(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("XML that is nested too deeply")
        start(own(name), {own(key): value for key, value in attributes.items()})

    def closed(name: str) -> None:
        nonlocal depth
        depth -= 1
        end(own(name))

    def refuse(*given: object) -> None:
        raise ValueError("XML that declares entities")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.EntityDeclHandler = refuse
    parser.StartElementHandler = opened
    parser.EndElementHandler = closed
    parser.CharacterDataHandler = said
    parser.buffer_text = True
    parser.Parse(data, True)


class Body:
    """The text within the elements ``inside``. A heading is a line that begins with #, as is a
    paragraph of one of ``styles``, each with its level; the cells of a table's row are a line."""

    def __init__(self, inside: Collection[str], styles: Mapping[str, str] | None = None):
        self.inside, self.styles, self.parts = inside, styles or {}, list[str]()
        self.depth = self.outside = self.cells = 0  # in text, in what is left out, in tables

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if self.outside or name in LEFT_OUT:
            self.outside += 1
            return
        self.depth += name in self.inside
        self.cells += name in CELLS
        if name in SPACES:
            self.parts.append(SPACES[name])
        elif name == "h":
            self.parts.append(heading(attributes.get("outline-level", "")))
        elif name == "pStyle" and not self.cells and attributes.get("val") in self.styles:
            self.parts.append(heading(self.styles[attributes["val"]]))

    def end(self, name: str) -> None:
        if self.outside:
            self.outside -= 1
            return
        self.depth -= name in self.inside
        self.cells -= name in CELLS
        if name in CELLS:
            self.parts.append(" | ")
        elif name in ("p", "h"):
            self.parts.append(" " if self.cells else "\n\n")
        elif name in ("tr", "table-row"):
            self.parts.append("\n")

    def said(self, text: str) -> None:
        if self.depth and not self.outside:
            self.parts.append(text)

    def text(self, data: bytes) -> str:
        parse(data, self.start, self.end, self.said)
        return "".join(self.parts)


def heading(level: str) -> str:
    return "#" * max(1, min(6, int(level[:2]))) + " " if level.isdecimal() else "# "


def word_text(archive: Archive) -> str:
    """Of a ``.docx``: its body and its notes."""
    if "word/document.xml" not in archive.names:
        raise ValueError("no document of Word")
    styles, style = dict[str, str](), [""]  # of headings, by the names that the language gives them

    def start(name: str, attributes: dict[str, str]) -> None:
        value = attributes.get("val", "").lower()
        if name == "style":
            style[0] = attributes.get("styleId", "")
        elif name == "name" and (value == "title" or value.startswith("heading ")):
            styles[style[0]] = value.removeprefix("heading ")

    if "word/styles.xml" in archive.names:
        parse(archive.read("word/styles.xml"), start)
    names = ("word/document.xml", "word/footnotes.xml", "word/endnotes.xml")
    there = (name for name in names if name in archive.names)
    return "\n".join(Body(("t",), styles).text(archive.read(name)) for name in there)


def open_document_text(archive: Archive) -> str:
    """Of an ``.odt``."""
    return Body(("p", "h")).text(archive.read("content.xml"))


def book_text(archive: Archive) -> str:
    """Of an ``.epub``: its chapters in the order of reading, all from within the archive."""
    found, hrefs, spine = list[str](), dict[str, str](), list[str]()

    def container(name: str, attributes: dict[str, str]) -> None:
        if name == "rootfile":
            found.append(attributes.get("full-path", ""))

    def package(name: str, attributes: dict[str, str]) -> None:
        if name == "item":
            hrefs[attributes.get("id", "")] = attributes.get("href", "")
        elif name == "itemref":
            spine.append(attributes.get("idref", ""))

    parse(archive.read("META-INF/container.xml"), container)
    if not found:
        raise ValueError("a book without contents")
    parse(archive.read(found[0]), package)
    folder = posixpath.dirname(found[0])

    def chapters() -> Iterator[str]:
        for each in dict.fromkeys(spine):
            name = posixpath.normpath(posixpath.join(folder, unquote(hrefs.get(each, ""))))
            if name in archive.names:
                data = archive.read(name)
                yield page_text(decoded(data, declared_encoding(data))[0])

    return "\n\n".join(chapters())


OFFICE = {".docx": word_text, ".odt": open_document_text, ".epub": book_text}


def office_text(file: BinaryIO, kind: str) -> str:
    """The text of a file of a kind of ``OFFICE``; ValueError where it has none."""
    try:
        return OFFICE[kind](Archive(file))
    except ValueError as error:
        if isinstance(error, UnicodeError):
            raise ValueError(f"a damaged *{kind} file") from None
        raise
    except BROKEN as error:
        said = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"a damaged *{kind} file ({said})") from None
