"""Documents to remember: each once, its sentences, and the words that are typical of it."""

import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from mlx_hmem.bank.documents import MAX_TERMS
from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.documents.readers import DEFAULT, read_own
from mlx_hmem.documents.tables import Records

_END = re.compile(r"[.!?][\"')\]]?(?=\s)|\n")
_WORD = re.compile(r"[^\W\d_]{5,}")


@dataclass(frozen=True)
class OwnDocument:
    """``sha256``: of the text, in hex; ``name``: its file or title; ``also``: those of copies."""

    sha256: str
    name: str
    text: str
    also: tuple[str, ...] = ()


@dataclass
class Reading:
    """What became of the files: beside the documents what was passed over, and why; ``known``: by
    what names those were read that are known, by their hashes."""

    documents: list[OwnDocument]
    duplicates: int = 0
    known: dict[str, list[str]] = field(default_factory=dict)
    more_left: bool = False


def read_folder(
    files: list[CorpusFile],
    known: Collection[str],
    faults: Faults,
    most_bytes: float = math.inf,
    records: Records = DEFAULT,
) -> Reading:
    """The documents of ``files``, by hash; those ``known`` and second copies are named only.

    Reading ends when there are ``most_bytes`` of text: the document that would go beyond is the
    first that is left out.
    """
    found: dict[str, OwnDocument] = {}
    result, size = Reading([]), 0
    for name, text in read_own(files, faults, records):
        data = text.encode()
        if size + len(data) > most_bytes:
            result.more_left = True
            break
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in known:
            result.known.setdefault(sha256, []).append(name)
        elif sha256 in found:
            result.duplicates += 1
            found[sha256] = replace(found[sha256], also=(*found[sha256].also, name))
        else:
            found[sha256] = OwnDocument(sha256, name, text)
            size += len(data)
    result.documents = [found[sha256] for sha256 in sorted(found)]
    return result


def sentences(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence or line; together they are all of ``text``."""
    ends = [match.end() for match in _END.finditer(text)]
    edges = [0, *(end for end in ends if end < len(text)), len(text)]
    return list(itertools.pairwise(edges))


def typical_words(documents: Iterable[OwnDocument]) -> Iterator[tuple[str, ...]]:
    """Of each document the words that it has often and the others have not."""
    counts = [Counter(_WORD.findall(d.text.lower())) for d in documents]
    everywhere = Counter(word for own in counts for word in own)
    for own in counts:
        scores = {w: n * math.log(1 + len(counts) / everywhere[w]) for w, n in own.items()}
        yield tuple(sorted(scores, key=lambda word: (-scores[word], word))[:MAX_TERMS])
