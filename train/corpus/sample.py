"""The sample of a corpus: which documents are taken, and which of them are held out.

Both follow from the md5 of a document's id alone, so they do not change with the order of the
files. Documents are cleaned and cut, in shards of input files, into files of their own; a
:class:`Sample` then knows each by its hash and its place, in 40 bytes, and the texts stay on the
disk.
"""

import contextlib
import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, fingerprint

from ..ranks import Ranks
from ..recipe.recipe import CorpusSection
from .cleaning import clean, cut
from .readers import documents_of
from .shards import Advance, Shard, make_shards

SHARD_BYTES = 64 << 20  # of input; a file is never divided
MARK = b"faults "  # begins the last line of a shard; the others begin with hexadecimal digits
PREFIX = 16 + 16 + 8 + 1  # first and second half of the md5, characters of the text, a space
# Where a document lies: the shard, and in it the first byte and the number of bytes.
PLACE = [("shard", "u4"), ("start", "i8"), ("size", "u4")]
ENTRY = np.dtype([("first", "u8"), ("second", "u8"), ("characters", "u4"), *PLACE])


def hashes(name: str) -> tuple[int, int]:
    """The two halves of the md5 of a document's id: one says whether it is taken, the other whether
    it is held out."""
    digest = hashlib.md5(name.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def is_held_out(name: str, fraction: float) -> bool:
    """Whether the document of this id is held out."""
    return hashes(name)[1] / 2**64 < fraction


def _groups(files: Iterable[CorpusFile]) -> Iterator[list[CorpusFile]]:
    """Neighbouring files, so many together that they are worth a shard."""
    group, size = list[CorpusFile](), 0
    for file in files:
        group.append(file)
        size += file.state[0]
        if size >= SHARD_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _contents(file: CorpusFile) -> str | None:
    """All bytes count: one that is edited in its length while the corpus is read is read again.
    None where it cannot be read, which is said when that is tried."""
    with contextlib.suppress(UserError, OSError):
        return fingerprint(file.path, whole=True)
    return None


def read_shards(
    files: list[CorpusFile], section: CorpusSection, folder: Path, ranks: Ranks
) -> list[Path]:
    """Reads ``files`` into shards of clean documents in ``folder``."""
    shards = [Shard((group, section)) for group in _groups(files)]
    identity = {
        "files": [[(file.name, _contents(file)) for file in g.task[0]] for g in shards],
        "documents": section.documents,
        "max_characters": section.max_characters,
    }
    return make_shards(
        folder, ranks, read_shard, shards, identity, desc="corpus", unit=" documents"
    )


def read_shard(path: Path, task: tuple[list[CorpusFile], CorpusSection], advance: Advance) -> None:
    """Writes the documents that may be of the sample, a line each, and then what is wrong."""
    files, section = task
    faults, best = Faults(), _Best(section.documents)
    with atomic_file(path) as out:
        for file in files:
            for name, title, text in documents_of(file, faults):
                advance(1)
                first, second = hashes(name)
                if not best.may_take(first):
                    continue
                # What cleaning takes out is a small part: the start of a long text is enough.
                text = clean(text[: 4 * section.max_characters + 1000])
                text = cut(text, section.max_characters)
                if not text:
                    faults.add(f"id {name}", "no text")
                    continue
                best.take(first)
                record = {"id": name, "title": title, "text": text}
                line = json.dumps(record, ensure_ascii=False)
                out.write(f"{first:016x}{second:016x}{len(text):08x} {line}\n".encode())
        out.write(MARK + json.dumps(faults.to_dict()).encode() + b"\n")


class _Best:
    """The smallest hashes so far, ``most`` of them; None: all, and nothing is kept."""

    def __init__(self, most: int | None):
        self.most, self.heap, self.members = most, list[int](), set[int]()

    def may_take(self, value: int) -> bool:
        return self.most is None or len(self.heap) < self.most or value <= -self.heap[0]

    def take(self, value: int) -> None:
        if self.most is None or value in self.members:
            return
        self.members.add(value)
        heapq.heappush(self.heap, -value)
        if len(self.heap) > self.most:
            self.members.remove(-heapq.heappop(self.heap))


class Sample:
    """The documents that are taken from ``shards``, which :func:`read_shard` wrote.

    They are the ``section.documents`` with the smallest first hash (all where null), of each id the
    first; ``section.held_out`` of them are held out. ``train`` and ``held_out`` are their entries,
    in order of the hash. What is wrong with the others goes to ``faults``.
    """

    def __init__(self, shards: list[Path], section: CorpusSection, faults: Faults):
        self.shards = shards
        parts = [self._entries(number, faults) for number in range(len(shards))]
        entries = np.concatenate([np.empty(0, ENTRY), *parts])
        entries = entries[np.lexsort((entries["second"], entries["first"]))]  # a stable sort
        halves, again = entries[["first", "second"]], np.zeros(len(entries), bool)
        again[1:] = halves[1:] == halves[:-1]
        taken = entries[~again][: section.documents]
        for entry in entries[again & (entries["first"] <= taken["first"].max(initial=0))]:
            name = json.loads(self.line(entry))["id"]
            faults.add(f"id {name}", "the id occurred before")
        held_out = taken["second"] / 2**64 < section.held_out
        self.train, self.held_out = taken[~held_out], taken[held_out]

    def _entries(self, number: int, faults: Faults) -> np.ndarray:
        entries, at = list[tuple[int, ...]](), 0
        with self.shards[number].open("rb") as file:
            for line in file:
                if line.startswith(MARK):
                    faults.extend(json.loads(line[len(MARK) :]))
                    break
                values = (int(line[:16], 16), int(line[16:32], 16), int(line[32:40], 16))
                entries.append((*values, number, at + PREFIX, len(line) - PREFIX))
                at += len(line)
        return np.array(entries, ENTRY)

    def line(self, entry: np.void) -> bytes:
        """The document (id, title, text) of an entry as a line of JSON."""
        with self.shards[entry["shard"]].open("rb", buffering=0) as file:
            file.seek(int(entry["start"]))
            return file.read(int(entry["size"]))
