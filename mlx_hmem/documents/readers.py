"""Reading a person's own files of all kinds that hold text, one or a folder of them.

What a kind needs beside the standard library is optional, and asked for where such a file is among
them. A file of any other name is read where it looks like text.
"""

import functools
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_hmem.documents.characters import composed, tidy
from mlx_hmem.documents.encodings import looks_like_text
from mlx_hmem.documents.files import MAX_LINE, CorpusFile, Document, Faults, file_bytes, listing
from mlx_hmem.documents.lines import (
    JSON_LINES,
    TEXTS,
    Reader,
    documents_in,
    lines_of,
    one_document,
    package_for,
    read_lines,
    read_text,
)
from mlx_hmem.documents.mail import mail_text, messages_of
from mlx_hmem.documents.office import OFFICE, office_text
from mlx_hmem.documents.pages import declared_encoding, page_text
from mlx_hmem.documents.pdf import pdf_text
from mlx_hmem.documents.tables import Records, array_items, array_text, notebook_text, table_text
from mlx_hmem.errors import UserError, printable
from mlx_hmem.reading import open_regular

DEFAULT = Records()
MAX_PDF = 1 << 30
MAX_JSON = 1 << 24  # characters, which may stand for thirty times as many bytes
SNIFFED = 1 << 13  # bytes of a file of another name that must look like text
# Text that nobody wrote to be read: drawings, what is made from other text, keys.
NO_DOCUMENTS = (".svg", ".ps", ".eps", ".map", ".min.js", ".min.css", ".lock", "-lock.json", ".pem",
                ".key", ".crt")  # fmt: skip


def _page(source: CorpusFile, faults: Faults) -> str:
    return page_text(read_text(source, faults, declared_encoding))


def _pdf(source: CorpusFile, faults: Faults) -> str:
    def unread(number: int) -> None:
        faults.add(f"{printable(source.name)}, page {number}", "characters without a meaning")

    return pdf_text(file_bytes(source.path, MAX_PDF), unread)


def _office(source: CorpusFile, faults: Faults) -> str:
    with open_regular(source.path) as file:
        return office_text(file, source.path.suffix.lower())


def _rich_text(source: CorpusFile, faults: Faults) -> str:
    striprtf: Any = package_for(source.path)
    data = file_bytes(source.path)
    if not data.lstrip().startswith(b"{\\rtf"):
        raise ValueError("no rich text")
    try:
        return str(striprtf.rtf_to_text(data.decode("latin-1"), errors="replace"))
    except Exception as error:  # of what no program wrote
        raise ValueError(f"damaged rich text ({type(error).__name__})") from None


def _mail(source: CorpusFile, faults: Faults) -> str:
    return mail_text(file_bytes(source.path))


def _of_text(text_of: Callable[[str], str]) -> Reader:
    """Reads files whose text, once it is decoded, is taken as ``text_of`` does."""
    return one_document(lambda source, faults: text_of(read_text(source, faults)))


def _read_mailbox(source: CorpusFile, faults: Faults) -> Iterator[Document]:
    with open_regular(source.path) as stored:
        lines = lines_of(iter(lambda: stored.read(io.DEFAULT_BUFFER_SIZE), b""))
        for number, message in enumerate(messages_of(lines, MAX_LINE), 1):
            try:
                yield str(number), "", mail_text(message)
            except ValueError as error:
                faults.add(f"{printable(source.name)}:{number}", str(error))


def _read_array(source: CorpusFile, faults: Faults, records: Records) -> Iterator[Document]:
    """The documents of a JSON array; what else a ``.json`` file holds is one."""
    text = read_text(source, faults)
    if len(text) > MAX_JSON and text.lstrip().startswith("["):
        raise ValueError(f"an array over {MAX_JSON} characters; make JSON lines of it")
    items = array_items(text)
    if not items or not any(map(records.has_text, items)):
        whole = array_text(items) if items else text
        yield from one_document(lambda source, faults: whole)(source, faults)
        return
    for number, item in enumerate(items, 1):
        try:
            yield records.document(item, number)
        except ValueError as error:
            faults.add(f"{printable(source.name)}:{number}", str(error))


def readers_of(records: Records) -> Mapping[str, Reader]:
    """The reader of each kind of file, by the end of its name."""
    lines = functools.partial(read_lines, document=records.document)
    return {
        **dict.fromkeys(JSON_LINES, lines),
        **TEXTS,
        ".markdown": TEXTS[".md"],
        **dict.fromkeys((".html", ".htm", ".xhtml", ".xml"), one_document(_page)),
        ".pdf": one_document(_pdf),
        **dict.fromkeys(OFFICE, one_document(_office)),
        ".rtf": one_document(_rich_text),
        ".csv": _of_text(table_text),
        ".tsv": _of_text(functools.partial(table_text, delimiter="\t")),
        ".json": functools.partial(_read_array, records=records),
        ".ipynb": _of_text(notebook_text),
        ".eml": one_document(_mail),
        ".mbox": _read_mailbox,
        "": TEXTS[".txt"],
    }


READERS = readers_of(DEFAULT)


def kind_of(path: Path) -> str:
    """Of which kind a file is that is none to read; nothing for one that is."""
    name = path.name.lower()
    what = f"*{path.suffix.lower()}" if path.suffix else "without an ending"
    if name.endswith(NO_DOCUMENTS):
        return what
    if name.endswith(tuple(end for end in READERS if end)):
        return ""
    try:
        with open_regular(path) as file:
            beginning = file.read(SNIFFED)
    except (OSError, UserError):
        return ""  # which is said when it is read
    return "" if beginning and looks_like_text(beginning) else what


def own_files(source: Path, faults: Faults) -> list[CorpusFile]:
    """The files of a folder, and below it, that can be read, by name in NFC; hidden ones and what
    programs have made are not. Or the one file that ``source`` is."""
    if not source.exists():
        raise UserError("no such file or folder", source, "give your documents")
    files = listing(source, faults, kind_of=kind_of)
    if not files:
        faults.print(every=True)
        what = "a folder without text" if source.is_dir() else "a file of another kind"
        raise UserError(what, source, f"give text, or files {' '.join(READERS)}")
    for file in files:
        package_for(file.path)  # asked before all are read
    return sorted(CorpusFile(file.path, composed(file.name)) for file in files)


def read_own(
    files: list[CorpusFile], faults: Faults, records: Records = DEFAULT
) -> Iterator[tuple[str, str]]:
    """(name, tidy text) of each document: a file, or of a file of several each by its title."""
    readers = readers_of(records)
    for file in tqdm(files, desc="reading", unit="file", delay=2):
        plain = not file.name.lower().endswith(tuple(end for end in readers if end))
        for identity, title, text in documents_in(file, faults, readers):
            text = tidy(text, indented=plain)
            if text:
                own = composed(title) or f"{printable(file.name)}:{identity}"
                yield file.name if identity == file.name else own, text
            else:
                faults.add(file.name, "no text")
