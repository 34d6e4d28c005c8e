"""Reading a person's own files: text, Markdown, HTML, PDF and JSON lines, one or a folder of them.

A page of HTML is read by its own word for the encoding, a PDF gives what text it has; a scan has
none and is passed over. pypdf is optional, asked for where a PDF is among the files.
"""

import codecs
import io
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mlx_hmem.errors import UserError, printable

from .cleaning import without_control
from .files import CorpusFile, Faults, file_bytes, listing
from .pages import page_text
from .readers import RECORDS, TEXTS, Reader, documents_of, one_document, package_for

# Of pages: all that browsers know but UTF-7, and none of Python's own, which are no encodings.
ENCODINGS = ("utf-8", "utf-16", "utf-32", "ascii", "iso", "cp", "koi8", "mac", "shift", "euc", "gb",
             "big5", "johab", "tis", "hz")  # fmt: skip
MAX_PDF = 1 << 30
SECONDS, BYTES_A_SECOND = 60, 100_000  # what a PDF may take


def tidy(text: str) -> str:
    """``text`` without control characters, spaces at line ends and more than one empty line."""
    text = re.sub(r"[^\S\n]+", " ", without_control(text))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def _page_text(path: Path) -> str:
    """A page's text by its own word for the encoding, else as UTF-8."""
    data = file_bytes(path)
    found = re.search(rb"charset=[\"']?([\w.:-]{1,40})", data[:2048])
    name = found.group(1).decode() if found else "utf-8"
    try:
        if not codecs.lookup(name).name.startswith(ENCODINGS):
            raise LookupError
        return page_text(data.decode(name))
    except (LookupError, UnicodeDecodeError):
        raise ValueError(f"not {name}") from None


def _pdf_text(path: Path) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every odd object
    data, pages = file_bytes(path, MAX_PDF), list[str]()
    end = time.monotonic() + SECONDS + len(data) / BYTES_A_SECOND
    try:
        for page in pypdf.PdfReader(io.BytesIO(data)).pages:
            pages.append(page.extract_text())
            if time.monotonic() > end:  # a few kilobytes may stand for days of work
                raise TimeoutError("it takes too long")
    except Exception as error:  # a damaged file makes it raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"an unreadable PDF ({reason})") from None
    text = "\n".join(pages)
    if not text.strip():
        raise ValueError("a PDF without text (a scan?)")
    text = re.sub(r"(\w)-\n(\w)", r"\1\2", text)  # a word cut at a line's end
    return re.sub(r"(?<=[\w,;])\n(?=\w)", " ", text)


READERS: dict[str, Reader] = {
    **{end: reader for end, reader in RECORDS.items() if end.startswith(".jsonl")},
    **TEXTS,
    ".markdown": TEXTS[".md"],
    **dict.fromkeys((".html", ".htm", ".xhtml"), one_document(_page_text)),
    ".pdf": one_document(_pdf_text),
}


def own_files(source: Path) -> list[CorpusFile]:
    """The files of a folder, and below it, that can be read, by path; hidden ones are not. Or the
    one file that ``source`` is."""
    if not source.exists():
        raise UserError("no such file or folder", source, "give your documents")
    files = listing(source, READERS, all_kinds=True)
    if not files:
        what = "a folder without text" if source.is_dir() else "a file of another kind"
        raise UserError(what, source, f"give files {' '.join(READERS)}")
    for file in files:
        package_for(file.path)  # asked before all are read
    return files


def read_own(files: list[CorpusFile], faults: Faults) -> Iterator[tuple[str, str]]:
    """(name, tidy text) of each document: a file, or a line of a JSON lines file by its title."""
    for file in tqdm(files, desc="reading", unit="file", delay=2):
        for identity, title, text in documents_of(file, faults, READERS):
            text = tidy(text)
            if text:
                records = ".jsonl" in file.name.lower()
                own = title or f"{printable(file.name)}:{identity}"
                yield own if records else file.name, text
            else:
                faults.add(file.name, "no text")
