"""Documents to windows of tokens, and windows back to text for the encoder.

A window holds at most ``context`` tokens, `<|endoftext|>` first, also where it continues a
document: each window is a document of its own for attention and for routing.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece as spm
from tqdm import tqdm

from mlx_hmem.files import atomic_file
from train.corpus import read_texts
from train.recipe import Recipe
from train.tokenizer import EOT_ID, load_tokenizer


def save_array(path: Path, values: np.ndarray) -> None:
    """``np.save``, complete or not at all."""
    with atomic_file(path) as file:
        np.save(file, values)


@dataclass(frozen=True)
class Windows:
    """Window ``i`` is ``tokens[offsets[i] : offsets[i + 1]]``; tokens uint16, offsets int64."""

    tokens: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def texts(self, processor: spm.SentencePieceProcessor, first: int = 0) -> Iterator[str]:
        """The text of each window from number ``first`` on, in order."""
        for i in range(first, len(self)):
            yield processor.decode(self[i][1:].tolist())

    def save(self, folder: Path) -> None:
        save_array(folder / "tokens.npy", self.tokens)
        save_array(folder / "offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path) -> "Windows":
        return cls(np.load(folder / "tokens.npy"), np.load(folder / "offsets.npy"))


def cut_windows(
    texts: Iterable[str], processor: spm.SentencePieceProcessor, context: int
) -> Windows:
    """Windows of at most ``context`` tokens of each text, in order; those of one text are of equal
    length but for rounding, so that none is too short to be routed."""
    tokens, offsets = array("H"), array("q", [0])
    for text in texts:
        ids = processor.encode(text)
        num_windows = -(-len(ids) // (context - 1))
        size = -(-len(ids) // max(1, num_windows))
        for start in range(0, len(ids), max(1, size)):
            tokens.append(EOT_ID)
            tokens.extend(ids[start : start + size])
            offsets.append(len(tokens))
    return Windows(np.array(tokens, dtype=np.uint16), np.array(offsets, dtype=np.int64))


def run_windows(recipe: Recipe, folder: Path) -> None:
    """Writes ``windows/``: tokens.npy and offsets.npy of the documents to train on."""
    out, context = folder / "windows", recipe.windows.context
    texts = tqdm(read_texts(folder / "corpus" / "train.jsonl"), desc="windows", unit=" documents")
    windows = cut_windows(texts, load_tokenizer(folder), context)
    windows.save(out)
    print(
        f"windows: {len(windows)} of at most {context} tokens, {len(windows.tokens)} in all, "
        f"in {out}"
    )
