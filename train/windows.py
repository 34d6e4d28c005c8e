"""Documents to windows of tokens, and windows back to text for the encoder.

A window holds at most ``context`` tokens, the end of text first, also where it continues a
document: each window is a document of its own for attention and for routing.
"""

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file
from train.corpus import read_texts
from train.recipe import Recipe
from train.taken_tokenizer import taken_facts
from train.tokenizer import EOT_ID, RunTokenizer, begin_of, load_tokenizer


def save_array(path: Path, values: np.ndarray) -> None:
    """``np.save``, complete or not at all."""
    with atomic_file(path) as file:
        np.save(file, values)


def counted(tokens: Any, eot: int) -> Any:
    """Which targets of the sequences ``tokens`` (n, time + 1) count in the loss, (n, time): all but
    padding, an EOT that follows an EOT. Of NumPy's or MLX's arrays, whichever it is given."""
    return (tokens[:, :-1] != eot) | (tokens[:, 1:] != eot)


@dataclass(frozen=True)
class Windows:
    """Window ``i`` is ``tokens[offsets[i] : offsets[i + 1]]``.

    Tokens are uint16, or uint32 if the vocabulary is larger; offsets int64. Each window has the
    tokens ``begin`` in front of its text, the first of which is the end of text.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    begin: tuple[int, ...] = (EOT_ID,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def texts(self, tokenizer: RunTokenizer, first: int = 0) -> Iterator[str]:
        """The text of each window from number ``first`` on, in order."""
        for i in range(first, len(self)):
            yield tokenizer.decode(self[i][len(self.begin) :].tolist())

    def save(self, folder: Path) -> None:
        save_array(folder / "tokens.npy", self.tokens)
        save_array(folder / "offsets.npy", self.offsets)

    @classmethod
    def load(cls, folder: Path, begin: tuple[int, ...] = (EOT_ID,)) -> "Windows":
        return cls(np.load(folder / "tokens.npy"), np.load(folder / "offsets.npy"), begin)


def cut_windows(
    texts: Iterable[str],
    tokenizer: RunTokenizer,
    context: int,
    begin: tuple[int, ...] = (EOT_ID,),
    vocab_size: int = 1 << 16,
) -> Windows:
    """Windows of at most ``context`` tokens of each text, in order; those of one text are of equal
    length but for rounding, so that none is too short to be routed."""
    tokens, offsets = array("H" if vocab_size <= 1 << 16 else "I"), array("q", [0])
    for text in texts:
        ids = tokenizer.encode(text)
        if ids and max(ids) >= vocab_size:
            raise UserError(
                "the tokenizer makes ids that the anchor does not know",
                f"{max(ids)}, of {vocab_size}",
                "give the tokenizer that belongs to the anchor",
            )
        num_windows = -(-len(ids) // (context - len(begin)))
        size = -(-len(ids) // max(1, num_windows))
        for start in range(0, len(ids), max(1, size)):
            tokens.extend(begin)
            tokens.extend(ids[start : start + size])
            offsets.append(len(tokens))
    dtype = np.uint16 if tokens.typecode == "H" else np.uint32
    return Windows(np.array(tokens, dtype), np.array(offsets, dtype=np.int64), begin)


def windows_of_run(folder: Path, context: int) -> Windows:
    """The documents that the run trains on, cut."""
    texts = tqdm(read_texts(folder / "corpus" / "train.jsonl"), desc="windows", unit=" documents")
    facts = taken_facts(folder)
    vocab_size = 1 << 16 if facts is None else facts.vocab_size
    return cut_windows(texts, load_tokenizer(folder), context, begin_of(folder), vocab_size)


def load_windows(folder: Path) -> Windows:
    """The windows of the run in ``folder``."""
    return Windows.load(folder / "windows", begin_of(folder))


def run_windows(recipe: Recipe, folder: Path) -> None:
    """Writes ``windows/``: tokens.npy and offsets.npy of the documents to train on."""
    out, context = folder / "windows", recipe.windows.context
    windows = windows_of_run(folder, context)
    windows.save(out)
    print(
        f"windows: {len(windows)} of at most {context} tokens, {len(windows.tokens)} in all, "
        f"in {out}"
    )
