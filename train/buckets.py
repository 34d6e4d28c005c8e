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

from pathlib import Path

import numpy as np

from train.windows import Windows, counted, save_array

SMALLEST = 32  # tokens


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

    def padding(self, eot: int) -> float:
        """The share of the positions that do not count in the loss."""
        each = self.pieces.values()
        padded = sum(np.sum(~counted(rows, eot)) for rows in each)
        return float(padded / max(1, sum(rows[:, 1:].size for rows in each)))

    def save(self, folder: Path) -> None:
        """Writes ``tokens-LENGTH.npy`` for each length."""
        for length, rows in self.pieces.items():
            save_array(folder / f"tokens-{length}.npy", rows)

    @classmethod
    def load(cls, folder: Path, context: int) -> "Buckets":
        return cls(
            {
                length: np.load(folder / f"tokens-{length}.npy", mmap_mode="r")
                for length in lengths(context)
            }
        )
