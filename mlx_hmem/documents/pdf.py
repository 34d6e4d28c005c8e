"""The text of a PDF, page by page, without the lines that every page repeats."""

import io
import logging
import re
import time
from collections import Counter
from collections.abc import Callable

from mlx_hmem.documents.characters import is_unreadable

SECONDS, BYTES_A_SECOND = 60, 100_000  # what a PDF may take
EDGE = 2  # lines at the top and at the bottom of a page that may be repeated ones
FEWEST = 3  # pages that repeat a line


def pdf_text(data: bytes, unread: Callable[[int], None]) -> str:
    """The text of a PDF; ``unread`` is told the number of each page that nobody can read.

    Raises ValueError where it has none, is damaged or encrypted, or takes too long.
    """
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of every odd object
    end = time.monotonic() + SECONDS + len(data) / BYTES_A_SECOND
    pages, strange = list[str](), 0
    try:
        for number, page in enumerate(pypdf.PdfReader(io.BytesIO(data)).pages, 1):
            text = page.extract_text()
            if is_unreadable(text):
                unread(number)
                strange, text = strange + 1, ""
            pages.append(text)
            if time.monotonic() > end:  # a few kilobytes may stand for days of work
                raise TimeoutError("it takes too long")
    except (pypdf.errors.FileNotDecryptedError, pypdf.errors.DependencyError):
        raise ValueError("an encrypted PDF") from None
    except Exception as error:  # a damaged file makes it raise anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"an unreadable PDF ({reason})") from None
    text = "\n".join(without_repeated(pages))
    if not text.strip():
        what = "whose characters have no meaning" if strange else "without text (a scan?)"
        raise ValueError(f"a PDF {what}")
    text = re.sub(r"(\w)-\n(\w)", r"\1\2", text)  # a word cut at a line's end
    return re.sub(r"(?<=[\w,;])\n(?=\w)", " ", text)


def without_repeated(pages: list[str]) -> list[str]:
    """Pages without headers and footers: of ``EDGE`` lines at the top and at the bottom those that
    half of the pages have there, whatever numbers are in them."""
    lines = [page.strip().splitlines() for page in pages]
    counts = Counter(each for own in lines for each in {*_edge(own, 1), *_edge(own, -1)})
    least = max(FEWEST, sum(map(bool, lines)) / 2)
    for own in lines:
        for side, last in ((1, 0), (-1, -1)):
            # From the edge inwards: what lies behind a line that stays is text.
            for each in _edge(own, side):
                if counts[each] < least:
                    break
                own.pop(last)
                while own and not own[last].strip():
                    own.pop(last)
    return ["\n".join(own) for own in lines]


def _edge(lines: list[str], side: int) -> list[tuple[int, str]]:
    """Where the lines at an edge are, and each with 0 for its numbers; none from a table of numbers
    on, whose lines are all alike."""
    seen = [re.sub(r"\d+", "0", " ".join(line.split())) for line in lines[::side]]
    found = [(side, line) for line in seen if line][:EDGE]
    alike = (line.count("0") > 2 and not re.search(r"[^\W\d]", line) for _, line in found)
    return found[: next((i for i, each in enumerate(alike) if each), EDGE)]
