"""Documents to windows of tokens, and windows back to text for the encoder.

A window holds at most ``context`` tokens, the end of text first, also where it continues a
document: each window is a document of its own for attention and for routing.
"""

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

    def save(self, folder: Path) -> None:
        save_array(folder / "tokens.npy", self.tokens)
        save_array(folder / "offsets.npy", self.offsets)

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


def texts_between(
    path: Path, start: int, end: int, advance: Advance, times: int = 1
) -> Iterator[str]:
    """The ``text`` of each line that begins within these bytes, without documents that state facts
    fewer than ``times`` times in all."""
    with path.open("rb") as file:
        if start > 0:
            file.seek(start - 1)
            file.readline()  # ends the line before
        while file.tell() < end and (line := file.readline()):
            advance(len(line))
            document = json.loads(line)
            if document.get("times", times) >= times:
                yield document["text"]


class Extract(NamedTuple):
    """Documents to cut: those of a run that begin within ``start`` and ``end`` of train.jsonl,
    without those that state facts fewer than ``times`` times."""

    run: Path
    context: int
    start: int
    end: int
    times: int


def cut_part(part: Extract, advance: Advance) -> Windows:
    """The windows of a part of the run's documents."""
    run, context, start, end, times = part
    texts = texts_between(run / "corpus" / "train.jsonl", start, end, advance, times)
    facts = taken_facts(run)
    vocab_size = 1 << 16 if facts is None else facts.vocab_size
    return cut_windows(texts, load_tokenizer(run), context, begin_of(run), vocab_size)


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
    starts = range(0, max(1, size), SHARD_BYTES)
    ends = [min(start + SHARD_BYTES, size) for start in starts]
    parts = [
        Extract(run, context, start, end, times) for start, end in zip(starts, ends, strict=True)
    ]
    shards = [Shard(part, part.end - part.start) for part in parts]
    identity = {
        "bytes": size,
        "context": context,
        "times": times,
        "tokenizer": fingerprint(*sorted((run / "tokenizer").glob("*.json"))),
    }
    return make_shards(folder, ranks, work, shards, identity, desc=desc, unit="B")


def join_windows(files: list[Path], folder: Path, begin: tuple[int, ...]) -> Windows:
    """The windows of all ``files`` as one, in ``folder``, mapped."""
    offsets, count = [np.zeros(1, np.int64)], 0
    for file in files:
        own = np.load(file)["offsets"]
        offsets.append(own[1:] + count)
        count += int(own[-1])
    save_array(folder / "offsets.npy", np.concatenate(offsets))
    dtype = np.load(files[0])["tokens"].dtype
    tokens = (np.load(file)["tokens"] for file in files)
    save_pieces(folder / "tokens.npy", dtype, (count,), tokens)
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
