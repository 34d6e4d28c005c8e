"""What a run becomes when its folder has changed: in ``next`` in it, until the model is made.

A document that is as it was keeps the leaves of its windows. Those of new text go where the tree
sends them as it was; then each centroid becomes the mean of what lies there now, so that nothing of
a text that is gone stays in it. Only clusters of level 1 with a window of a document that came,
went, or has another title are trained again; the others' blocks are taken over.
"""

import math
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_hmem.files import link_or_copy
from mlx_hmem.retriever import ClusterTree, Encoder

from ...corpus.own import OwnDocument, Reading
from ...data.taken_tokenizer import TakenTokenizer
from ..blocks import subtree_folder, subtrees_of
from ..plan import branching_for
from ..rest import Taught, tree_of
from ..restate import restated_of
from ..rows import title_of
from ..run import SETTINGS, OwnText, Settings, begin_run, vectors_of

CROWDED = 2.0  # times as many leaves as there are, or as a new tree would have
STRAYS = 0.1  # of the windows may lie nearer to another leaf than to their own


@dataclass(frozen=True)
class Placed:
    """Windows in the tree: ``paths`` (n, levels) int32; ``touched``: clusters of level 1, by their
    numbers in the run, whose blocks are not those of before. ``strays``: the share of windows that
    lie nearer to another leaf than to their own."""

    text: OwnText
    paths: np.ndarray
    tree: ClusterTree
    touched: set[int]
    strays: float

    @property
    def share(self) -> float:
        """Of the tokens those that are trained on again."""
        sizes = np.diff(self.text.windows.offsets)
        again = np.isin(self.paths[:, 0], [*self.touched])
        return float(sizes[again].sum() / max(1, sizes.sum()))

    def said(self) -> str:
        """How well the tree fits, for people."""
        used = len(np.unique(self.paths[:, -1]))
        return f"{len(self.paths) / max(1, used):.1f} windows in a leaf, {self.strays:.1%} astray"

    def unfit(self, settings: Settings) -> str:
        """Why another tree would be better, "" where none would."""
        leaves, used = self.tree.num_clusters[-1], len(np.unique(self.paths[:, -1]))
        deeper = settings.branching[1:] if settings.first else None
        size = self.text.size
        wanted = math.prod(branching_for(*size, deeper))
        crowded = math.prod(branching_for(*size, None)) > CROWDED * used
        # A tree of one text sends all others to the leaf of that, too.
        if crowded or used == 1 < min(size[0], wanted):
            return f"{len(self.paths):,} windows lie in {used:,} of its {leaves:,} leaves"
        if wanted < leaves / CROWDED:
            return f"of its {leaves:,} leaves {wanted:,} would do"
        if self.strays > STRAYS:
            return f"{self.strays:.0%} of the windows lie nearer to another leaf than to their own"
        return ""


def touched_by(
    before: OwnText, paths_before: np.ndarray, text: OwnText, paths: np.ndarray
) -> set[int]:
    """The clusters of level 1 with a window of a document that came, went or has a new title."""
    went = paths_before[other_documents(before, text.documents)]
    came = paths[other_documents(text, before.documents)]
    return {*subtrees_of(went), *subtrees_of(came)}


def other_documents(text: OwnText, than: Sequence[OwnDocument]) -> np.ndarray:
    """Which windows are of documents that are not among ``than`` with the same text and title."""
    known = {(d.sha256, title_of(d)) for d in than}
    other = [(d.sha256, title_of(d)) not in known for d in text.documents]
    return np.array(other, bool)[text.owner]


def windows_of(text: OwnText) -> dict[str, slice]:
    """Those of each document, by its hash."""
    edges = np.searchsorted(text.owner, np.arange(len(text.documents) + 1)).tolist()
    each = zip(text.documents, edges, edges[1:], strict=False)
    return {document.sha256: slice(start, end) for document, start, end in each}


def place(
    taught: Taught,
    before: OwnText,
    paths: np.ndarray,
    text: OwnText,
    encoder: Encoder,
    tokenizer: TakenTokenizer,
) -> Placed:
    """Where the windows of ``text`` lie; ``before`` are those of the run, on their ``paths``."""
    vectors = vectors_of(text.windows, encoder, tokenizer)
    leaves = np.empty((len(text.windows), taught.tree.depth), np.int32)
    old, stays = windows_of(before), np.zeros(len(text.windows), bool)
    for sha256, own in windows_of(text).items():
        if sha256 in old:
            leaves[own], stays[own] = paths[old[sha256]], True
    leaves[~stays] = taught.tree.route_batch(vectors[~stays])
    tree = tree_of(taught.tree, leaves, vectors, taught.settings.seed)
    touched = touched_by(before, paths, text, leaves)
    strays = float((tree.route_batch(vectors)[:, -1] != leaves[:, -1]).mean())
    return Placed(text, leaves, tree, touched, strays)


def begin_next(taught: Taught, target: Path, reading: Reading, source: str) -> None:
    """Writes what the next run begins with into ``target``; the settings come last."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    restated_of(taught.folder, target, {d.sha256 for d in reading.documents})
    settings = replace(taught.settings, source=source)
    begin_run(target, settings, reading.documents, reading.known)


def is_begun(target: Path, source: str) -> bool:
    """Whether the next run of such a folder has been begun."""
    return (target / SETTINGS).exists() and Settings.load(target).source == source


def take_over(run: Path, target: Path, numbers: Collection[int]) -> None:
    """Links the finished blocks of these clusters of level 1 to another run."""
    for number in numbers:
        old, new = subtree_folder(run, number), subtree_folder(target, number)
        for name in ("blocks.safetensors", "done.json"):  # what says that it is done comes last
            if (old / "done.json").exists() and not (new / name).exists():
                link_or_copy(old / name, new / name)
