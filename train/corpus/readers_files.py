"""Reading a person's own files: text, Markdown, HTML, PDF and JSON lines, one or a folder of them.

HTML is read by the standard library: tags go, scripts and styles with them, blocks become lines. A
PDF gives what text it has; a scan has none and is passed over. pypdf is optional, asked for where a
PDF is among the files.
"""

import logging
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from tqdm import tqdm

from mlx_hmem.errors import UserError

from .cleaning import without_control
from .readers import (
    RECORDS,
    TEXTS,
    CorpusFile,
    Faults,
    Reader,
    documents_of,
    file_bytes,
    listing,
    one_document,
    package_for,
)

SKIPPED = {"script", "style", "template", "noscript", "svg", "nav"}
INLINE = {"a", "abbr", "b", "code", "em", "font", "i", "img", "mark", "s", "small", "span",
          "strong", "sub", "sup", "tt", "u", "wbr"}  # fmt: skip


def tidy(text: str) -> str:
    """``text`` without control characters, spaces at line ends and more than one empty line."""
    text = re.sub(r"[^\S\n]+", " ", without_control(text))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


class _Page(HTMLParser):
    """Collects the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.skipping: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in SKIPPED:
            self.skipping.append(tag)
        elif tag not in INLINE:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            if tag in self.skipping:  # with those left open inside it
                del self.skipping[self.skipping.index(tag) :]
        elif tag not in INLINE:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.parts.append(re.sub(r"\s+", " ", data))


def html_text(source: str) -> str:
    """The text of a page."""
    page = _Page()
    page.feed(source)
    page.close()
    return "".join(page.parts)


def _page_text(path: Path) -> str:
    """A page's text by its own word for the encoding, else as UTF-8."""
    data = file_bytes(path)
    found = re.search(rb"charset=[\"']?([\w.:-]+)", data[:2048])
    name = found.group(1).decode() if found else "utf-8"
    try:
        source = data.decode(name)
    except (LookupError, UnicodeDecodeError):
        raise ValueError(f"not {name}") from None
    return html_text(source)


def _pdf_text(path: Path) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every odd object
    try:
        text = "\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except Exception as error:  # a damaged file makes it raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"an unreadable PDF ({reason})") from None
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
    files = [file for file in listing(source) if file.name.lower().endswith(tuple(READERS))]
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
                yield (title or f"{file.name}:{identity}") if records else file.name, text
            else:
                faults.add(file.name, "no text")
