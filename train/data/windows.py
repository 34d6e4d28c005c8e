"""Documents to windows of tokens, and windows back to text for the encoder.

A window holds at most ``context`` tokens, the end of text first, also where it continues a
document: each window is a document of its own for attention and for routing.
"""

import itertools
import json
import shutil
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, fingerprint

from ..corpus.shards import Advance, Shard, Work, make_shards
from ..ranks import ALONE, Ranks
from ..recipe.recipe import Recipe
from .arrays import load_mapped, save_array, save_pieces
from .taken_tokenizer import taken_facts
from .tokenizer import EOT_ID, RunTokenizer, begin_of, load_tokenizer

SHARD_BYTES = 32 << 20  # of text


@dataclass(frozen=True)
class Windows:
    """Window ``i`` is ``tokens[offsets[i] : offsets[i + 1]]``.

    Tokens are uint16, or uint32 if the vocabulary is larger; offsets int64; loaded, both are
    mapped. Each window has the tokens ``begin`` in front of its text, the first of which is the end
    of text.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    begin: tuple[int, ...] = (EOT_ID,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def texts(
        self, tokenizer: RunTokenizer, first: int = 0, end: int | None = None
    ) -> Iterator[str]:
        """The text of each window from number ``first`` to before ``end``, in order."""
        for i in range(first, len(self) if end is None else end):
            yield tokenizer.decode(self[i][len(self.begin) :].tolist())

    @classmethod
    def load(cls, folder: Path, begin: tuple[int, ...] = (EOT_ID,)) -> "Windows":
        tokens, offsets = (load_mapped(folder / f"{name}.npy") for name in ("tokens", "offsets"))
        return cls(tokens, offsets, begin)


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


class Extract(NamedTuple):
    """Documents to cut: those of a run that begin within ``start`` and ``end`` of train.jsonl,
    without those that state facts fewer than ``times`` times."""

    run: Path
    context: int
    start: int
    end: int
    times: int

    def texts(self, advance: Advance) -> Iterator[str]:
        with (self.run / "corpus" / "train.jsonl").open("rb") as file:
            if self.start > 0:
                file.seek(self.start - 1)
                file.readline()  # ends the line before
            while file.tell() < self.end and (line := file.readline()):
                advance(len(line))
                document = json.loads(line)
                if document.get("times", self.times) >= self.times:
                    yield document["text"]


def choose(windows: Windows, numbers: np.ndarray) -> Windows:
    """The windows of these numbers, which may be none."""
    chosen = [windows[i] for i in numbers]
    offsets = np.cumsum([0, *(len(window) for window in chosen)])
    return Windows(np.concatenate([windows.tokens[:0], *chosen]), offsets, windows.begin)


def cut_part(part: Extract, advance: Advance) -> Windows:
    """The windows of a part of the run's documents."""
    run, facts = part.run, taken_facts(part.run)
    vocab_size = 1 << 16 if facts is None else facts.vocab_size
    texts = part.texts(advance)
    return cut_windows(texts, load_tokenizer(run), part.context, begin_of(run), vocab_size)


def cut_shard(path: Path, part: Extract, advance: Advance) -> None:
    """Writes tokens and offsets of :func:`cut_part` as a .npz file."""
    windows = cut_part(part, advance)
    with atomic_file(path) as file:
        np.savez(file, tokens=windows.tokens, offsets=windows.offsets)


def shard_documents(
    run: Path, context: int, work: Work, folder: Path, ranks: Ranks, desc: str, times: int = 1
) -> list[Path]:
    """Has ``work`` make a file in ``folder`` of each part of the documents the run trains on.

    Documents that state facts fewer than ``times`` times are left out.
    """
    source = run / "corpus" / "train.jsonl"
    size = source.stat().st_size
    bounds = [*range(0, max(1, size), SHARD_BYTES), size]
    shards = [
        Shard(Extract(run, context, start, end, times), end - start)
        for start, end in itertools.pairwise(bounds)
    ]
    identity = {
        "documents": fingerprint(source, whole=True),
        "context": context,
        "times": times,
        "tokenizer": fingerprint(*sorted((run / "tokenizer").glob("*.json"))),
    }
    return make_shards(folder, ranks, work, shards, identity, desc=desc, unit="B")


def join_windows(files: list[Path], folder: Path, begin: tuple[int, ...]) -> Windows:
    """The windows of all ``files`` as one, in ``folder``, mapped."""
    sizes = np.concatenate([np.diff(np.load(file)["offsets"]) for file in files])
    save_array(folder / "offsets.npy", np.append(0, np.cumsum(sizes)))
    save_pieces(folder / "tokens.npy", (np.load(file)["tokens"] for file in files))
    return Windows.load(folder, begin)


def load_windows(folder: Path) -> Windows:
    """The windows of the run in ``folder``."""
    return Windows.load(folder / "windows", begin_of(folder))


def run_windows(recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> None:
    """Writes ``windows/``: tokens.npy and offsets.npy of the documents to train on."""
    out, context = folder / "windows", recipe.windows.context
    files = shard_documents(folder, context, cut_shard, out / "shards", ranks, "windows")
    if not ranks.first:
        return
    windows = join_windows(files, out, begin_of(folder))
    shutil.rmtree(out / "shards")
    print(
        f"windows: {len(windows)} of at most {context} tokens, {len(windows.tokens)} in all, "
        f"in {out}"
    )
