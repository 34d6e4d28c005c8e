"""``mlx_hmem.forget MODEL FILE… --check``: what a stranger can find out about a forgetting.

He is given the model, its run and what he thinks was forgotten. Whether blocks know a text no
search can tell; but all that the run made is made once more, from nothing but the documents that
are in it, and compared bit for bit: what is not in there has not made it. And every file of both is
searched.
"""

import json
import tempfile
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.bank.format import GENERIC, Key
from mlx_hmem.bank.writer import Given, rewrite_bank
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import own_files
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.reading import open_regular

from ..corpus.own import OwnDocument, read_folder, sentences
from .blocks import Trainer, subtrees_of, trained_blocks
from .export import Base, open_bases, text_of
from .rest import Taught, tree_of
from .restate import restated
from .run import vectors_of

PIECE = 1 << 25  # bytes of a file at a time
NEAR = 0.95  # cosine from which on a stored vector is that of a window
FEWEST_BYTES = 8  # of a sentence or name worth looking for


def needles_of(document: OwnDocument) -> Iterator[tuple[str, bytes]]:
    """What would name or quote a document, and how it may be written."""
    yield "its hash", document.sha256.encode()
    yield "its hash", bytes.fromhex(document.sha256)
    for form in ("NFC", "NFD"):
        yield "its name", unicodedata.normalize(form, document.name).encode()
    for start, end in sentences(document.text):
        text = document.text[start:end].strip()
        for written in {text, json.dumps(text, ensure_ascii=False)[1:-1]}:
            yield "its text", written.encode()


def found_in_files(folders: Sequence[Path], documents: Collection[OwnDocument]) -> list[str]:
    """A line for each file of the folders and each thing of the documents that is in it."""
    found = dict[str, None]()
    needles = [(f"{what}: {d.name}", n) for d in documents for what, n in needles_of(d)]
    needles = [(what, needle) for what, needle in needles if len(needle) >= FEWEST_BYTES]
    longest = max((len(needle) for _, needle in needles), default=1)
    files = sorted(f for folder in folders for f in folder.rglob("*") if f.is_file())
    for file in tqdm(files, desc="searching", unit="file", delay=2):
        for piece in _pieces(file, longest):
            found |= {f"{file} has {what}": None for what, needle in needles if needle in piece}
    return [*found]


def _pieces(file: Path, overlap: int) -> Iterator[bytes]:
    """The bytes of a file, of each piece the end once more with the next: what lies on an edge is
    in one of them."""
    piece = b""
    with open_regular(file) as opened:
        while more := opened.read(PIECE):
            piece = piece[-overlap:] + more
            yield piece


def found_in_trees(bases: Mapping[str, Base], taught: Sequence[Taught], vectors: np.ndarray) -> int:
    """How many centroids point where one of the ``vectors`` (n, dim) does."""
    trees = [base.tree for base in bases.values()] + [run.tree for run in taught]
    count = 0
    for level in (level for tree in trees if tree is not None for level in tree.centroids):
        rows = np.asarray(level)
        lengths = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9)
        count += int(((rows / lengths @ vectors.T.astype(np.float32)).max(1) > NEAR).sum())
    return count


def differences(run: Taught, bases: Mapping[str, Base]) -> tuple[int, int]:
    """The clusters and blocks that the run made, made again from its documents: how many there are,
    and how many of them the banks have otherwise."""
    first, settings = bases[""], run.settings
    text, tokenizer = text_of(first, run.documents, restated(run.folder))
    paths = run.paths(text, bases)
    vectors = vectors_of(text.windows, first.encoder, tokenizer)
    tree = tree_of(run.tree, paths, vectors, settings.seed)
    pairs = zip(tree.centroids, run.tree.centroids, strict=True)
    other = sum(int((np.abs(a - np.asarray(b)).max(1) > 1e-6).sum()) for a, b in pairs)
    count = sum(tree.num_clusters)
    # Beside the run: what is kept of a bank is linked, not copied.
    with tempfile.TemporaryDirectory(prefix=".check-", dir=run.folder.parent) as work:
        Trainer(load_anchor(first.folder)[0], settings, tokenizer).train(Path(work), text, paths)
        blocks = trained_blocks(Path(work), subtrees_of(paths))
        for number, name in enumerate(run.banks):
            made = _made_again(run, bases[name], blocks, Path(work) / f"bank{number}")
            count, other = count + made[0], other + made[1]
    return count, other


def _made_again(
    run: Taught, base: Base, blocks: Mapping[Key, mx.array], folder: Path
) -> tuple[int, int]:
    """As :func:`differences`, of the blocks of one bank."""
    assert base.manifest is not None
    firsts, sizes = (0, *run.settings.offsets), (0, *run.tree.num_clusters)

    def block(level: int, cluster: int) -> Given:
        own = level != GENERIC and 0 <= cluster - firsts[level] < sizes[level]
        return blocks.get((level, cluster)) if own else "keep"

    again = rewrite_bank(folder, base.manifest, block, base.folder / BANK_FOLDER)
    levels = zip(again.levels, base.manifest.levels, strict=True)
    sums = [pair for a, b in levels for pair in zip(a.checksums, b.checksums, strict=True)]
    return sum(sizes[level.level] for level in again.levels), sum(a != b for a, b in sums)


def check(folder: Path, files: Sequence[str], runs: Sequence[Path]) -> tuple[list[str], bool]:
    """What was found, line by line, and whether it is nothing."""
    bases, faults = open_bases(str(folder)), Faults()
    taught = [Taught.open(run, bases) for run in runs]
    given = [
        d for f in files for d in read_folder(own_files(Path(f), faults), (), faults).documents
    ]
    faults.print()
    text, tokenizer = text_of(bases[""], given)
    vectors = vectors_of(text.windows, bases[""].encoder, tokenizer)
    lines = found_in_files([folder, *runs], given)
    if near := found_in_trees(bases, taught, vectors):
        lines.append(f"{near} centroids point where a window of it does (cosine over {NEAR})")
    sums = [differences(run, bases) for run in taught]
    count, other = (sum(each) for each in zip(*sums, strict=True))
    if other:
        lines.append(f"{other} of {count} clusters and blocks are not what the runs make")
    own = {d.sha256 for run in taught for d in run.documents}
    known = {d.sha256 for base in bases.values() for d in base.documents}
    clean = not lines and not known - own
    if known - own:
        what = "documents of the banks are in no run that was given; give theirs with --run"
        lines.append(f"{len(known - own)} {what}")
    if clean:
        made = f"{count} clusters and blocks are what {len(own)} other documents make, bit for bit"
        lines.append(f"nothing is found of {len(given)} documents; {made}")
    return lines, clean
