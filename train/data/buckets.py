"""Documents cut into pieces of power-of-two lengths, a bucket for each length (dataset
decomposition: Pouransari et al. 2024, "Dataset Decomposition: Faster LLM Training with Variable
Sequence Length Curriculum").

A piece is a part of one document, so that attention stays within a document without a mask, and
short documents do not pay for the longest context. The price is that a piece which continues a
document does not see what came before it.

Pieces are cut from whole documents, largest first. What is left below ``SMALLEST`` tokens becomes
a piece of that length padded with the end of text, as if it ended with it: dropped, it would take
the ends of all documents along.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.files import atomic_file

from ..corpus.shards import Advance
from ..padding import counted
from .arrays import load_mapped, save_pieces
from .windows import Extract, Windows, cut_part

SMALLEST = 32  # tokens
ROWS = 1 << 14  # looked at together
WHOLE = 1 << 40  # tokens, more than a document has: its one window is all of it


def lengths(context: int) -> list[int]:
    """The lengths of pieces, from ``context`` (a power of two) down."""
    found = [context]
    while found[-1] > SMALLEST:
        found.append(found[-1] // 2)
    return found


def decompose(documents: Windows, context: int) -> dict[int, np.ndarray]:
    """The pieces of whole ``documents`` by their length: (n, length + 1) tokens, of the type of the
    documents' tokens.

    Each row begins with the last token of the piece before, so that every token is a target once,
    the end of text after a document too, and only the document's first token never.
    """
    flat = np.append(documents.tokens, np.array([documents.begin[0]], documents.tokens.dtype))
    starts, ends = documents.offsets[:-1], documents.offsets[1:]  # at an end there is an EOT
    pieces = {}
    for length in lengths(context):
        counts = (ends - starts) // length
        if length == lengths(context)[-1]:
            counts = -(-(ends - starts) // length)
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        first = np.repeat(starts, counts) + nth * length
        places = first[:, None] + np.arange(length + 1)
        pieces[length] = flat[np.minimum(places, np.repeat(ends, counts)[:, None])]
        starts = starts + counts * length
    return pieces


class Buckets:
    """Sequences of several lengths under one numbering: bucket after bucket, the longest first.

    Args:
        pieces: by length, (n, length + 1) each, as :func:`decompose` makes them.
    """

    def __init__(self, pieces: dict[int, np.ndarray]):
        self.pieces = dict(sorted(pieces.items(), reverse=True))
        self.counts = {length: len(rows) for length, rows in self.pieces.items()}
        self._firsts = np.cumsum([0, *self.counts.values()])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, longest + 1)."""
        return len(self), 1 + max(self.pieces)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The sequences numbered ``rows``, which are of one bucket."""
        bucket = int(np.searchsorted(self._firsts, rows[0], side="right")) - 1
        own = rows - self._firsts[bucket]
        assert own.min() >= 0
        assert own.max() < self._firsts[bucket + 1] - self._firsts[bucket]
        return list(self.pieces.values())[bucket][own]

    @classmethod
    def load(cls, folder: Path, context: int) -> "Buckets":
        """Those in the files ``tokens-LENGTH.npy``, mapped."""
        return cls({n: load_mapped(folder / f"tokens-{n}.npy") for n in lengths(context)})


def padding_of(arrays: Iterable[np.ndarray], eot: int) -> float:
    """The share of the positions of these sequences that do not count in the loss."""
    padded = positions = 0
    for rows in arrays:
        positions += rows[:, 1:].size
        for start in range(0, len(rows), ROWS):
            padded += int(np.sum(~counted(rows[start : start + ROWS], eot)))
    return padded / max(1, positions)


def decompose_shard(path: Path, part: Extract, advance: Advance) -> None:
    """Writes the pieces of a part of a run's documents, an array for each length, as .npz."""
    pieces = decompose(cut_part(part._replace(context=WHOLE), advance), part.context)
    with atomic_file(path) as file:
        arrays: dict[str, Any] = {str(length): rows for length, rows in pieces.items()}
        np.savez(file, **arrays)


def join_pieces(files: list[Path], folder: Path, context: int) -> Buckets:
    """The pieces of all ``files``, in ``tokens-LENGTH.npy``."""
    for length in lengths(context):
        pieces = (np.load(file)[str(length)] for file in files)
        save_pieces(folder / f"tokens-{length}.npy", pieces)
    return Buckets.load(folder, context)
