"""How often names stand in a corpus: the frequency buckets of the paper's section 7.

One pass counts all names at once and holds one document, or a mebibyte of plain text, at a time.
A name counts where it stands as a word or words of its own. One that is written all in small
letters counts as "iron", "Iron" and "IRON", any other as it is written. Where names overlap the
longest counts. Read are ``text`` of ``*.jsonl``, and ``*.txt`` and ``*.md`` as they are, gzip or
not: other kinds of corpora belong to training, which this package does not import.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from mlx_hmem.errors import UserError, printable
from mlx_hmem.evaluate.journal import Journal, kept_rows
from mlx_hmem.evaluate.texts import reading, records
from mlx_hmem.folders import identity_of

WORD = re.compile(r"\w+")
RECORDS = (".jsonl", ".jsonl.gz")
PLAIN = (".txt", ".md", ".txt.gz", ".md.gz")
PIECE = 1 << 20  # characters of a plain text at a time
Keys = Sequence[Sequence[str]]  # the names of each thing that is counted


class NameCounter:
    """Counts the things of ``keys`` by their names: ``counts[i]`` those of ``keys[i]``."""

    def __init__(self, keys: Keys):
        self.clear()
        things: dict[str, set[int]] = defaultdict(set)
        for number, names in enumerate(keys):
            for name in names:
                for spelling in _spellings(name.strip()):
                    things[spelling].add(number)
        by_first: dict[str, list[tuple[str, int, set[int]]]] = defaultdict(list)
        for spelling in sorted(things, key=len, reverse=True):
            word = WORD.search(spelling)
            if word is None:
                raise UserError("a name has no letter or digit", repr(spelling), "correct the key")
            by_first[word.group()].append((spelling, word.start(), things[spelling]))
        self._by_first = dict(by_first)

    def clear(self) -> None:
        """Begins anew."""
        self.counts: Counter[int] = Counter()
        self.documents = 0

    def add(self, text: str) -> None:
        """Counts one document."""
        self.documents += 1
        if self._by_first.keys().isdisjoint(WORD.findall(text)):  # most documents
            return
        end = 0  # of the name before
        for word in WORD.finditer(text):
            for name, offset, numbers in self._by_first.get(word.group(), ()):
                start = word.start() - offset
                if start >= end and _stands(name, text, start):
                    self.counts.update(numbers)
                    end = start + len(name)
                    break


def _stands(name: str, text: str, start: int) -> bool:
    after = text[start + len(name) : start + len(name) + 1]
    return text.startswith(name, start) and not (WORD.match(name[-1]) and WORD.match(after))


def _spellings(name: str) -> set[str]:
    if name != name.lower():
        return {name}
    return {name, name[:1].upper() + name[1:], name.title(), name.upper()}


def corpus_files(corpus: Path) -> list[Path]:
    """The files of a corpus: those of the folder itself or, where it has none, below; JSON lines
    if there are any, else plain texts. ``corpus`` may also be one file."""
    for pattern in ("*", "**/*"):
        found = [corpus] if corpus.is_file() else sorted(corpus.glob(pattern))
        for ends in (RECORDS, PLAIN):
            if files := [f for f in found if f.name.endswith(ends) and f.is_file()]:
                return files
    kinds = ", ".join(f"*{end}" for end in RECORDS + PLAIN)
    raise UserError("a corpus without text", corpus, f"give a folder with {kinds}")


def states(files: Sequence[Path]) -> list[list[Any]]:
    """Of each file its path, bytes and time of change."""
    return [[name, *state] for name, state in identity_of(files)["sources"].items()]


def count_names(keys: Keys, corpus: Path, out: Path, progress: bool = True) -> list[int]:
    """How often each of ``keys`` is named in ``corpus``; every finished file's counts are kept in
    the folder ``out``, and a corpus that was counted before is not read again."""
    files = corpus_files(corpus)
    settings = {
        "version": 1,
        "keys": xxhash.xxh3_64_hexdigest(json.dumps([list(names) for names in keys]).encode()),
        "files": states(files),
    }
    counter = NameCounter(keys)

    def count(missing: list[int]) -> Iterator[list[dict[str, Any]]]:
        for number in missing:
            counter.clear()
            for text in _documents(files[number], progress):
                counter.add(text)
            counts = sorted(counter.counts.items())
            yield [{"row": number, "documents": counter.documents, "counts": counts}]

    journal = Journal(out, "counts", settings)
    rows = kept_rows(journal, range(len(files)), count, "counting names", "file", progress)
    if not sum(row["documents"] for row in rows):
        raise UserError("a corpus without text", corpus, "give one that has some")
    total: Counter[int] = Counter()
    for row in rows:
        total.update(dict(row["counts"]))
    return [total[thing] for thing in range(len(keys))]


def _documents(file: Path, progress: bool) -> Iterator[str]:
    """The texts of one file that have words, in pieces where it is plain."""
    texts = records(file) if file.name.endswith(RECORDS) else _pieces(file)
    name = printable(file.name)
    with tqdm(desc=name, unit="B", unit_scale=True, leave=False, disable=not progress) as bar:
        for text in texts:
            if text.strip():
                yield text
            bar.update(len(text))


def _pieces(file: Path) -> Iterator[str]:
    """A plain text in pieces that end with a line, or with a word where a line is long."""
    rest = ""
    with reading(file) as lines:
        while new := lines.read(PIECE):
            text = rest + new
            cut = max(text.rfind("\n"), text.rfind(" ") if len(text) > 2 * PIECE else -1) + 1
            yield text[:cut]
            rest = text[cut:]
            if len(rest) > 4 * PIECE:
                yield rest
                rest = ""
    yield rest
