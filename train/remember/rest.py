"""What is left of a run without some of its documents: text, paths, tree, and the blocks that they
have not touched.

The windows that stay keep their leaves, so that the blocks of all other clusters of level 1 are as
they were. The centroid of each cluster becomes the mean of the windows that are left in it, and one
that is left empty is none any more: nothing of the vectors that are gone stays, not even where one
passed through another cluster while the tree was fitted.
"""

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_hmem.bank.documents import Document
from mlx_hmem.errors import UserError
from mlx_hmem.files import link_or_copy
from mlx_hmem.retriever import ClusterTree

from ..corpus.own import OwnDocument
from ..data.arrays import load_mapped, save_array
from ..data.windows import Windows, choose
from ..tree.stage import distinct
from .blocks import subtree_folder, subtrees_of
from .export import Base
from .restate import restated_of
from .run import SETTINGS, OwnText, Settings, begin_run, documents_of, known_names, provenance

RESTORE = "restore the folder as the remembering left it, or give its own with --run"


@dataclass(frozen=True)
class Taught:
    """A run that has taught a model documents; ``banks``: of those whose clusters it made, the
    names, "" being the first."""

    folder: Path
    settings: Settings
    tree: ClusterTree
    documents: list[OwnDocument]
    known: dict[str, tuple[str, ...]]  # names of documents that others have taught
    banks: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path, bases: Mapping[str, Base]) -> "Taught":
        """The run in ``folder``; UserError if it is damaged or has made no bank of ``bases``, where
        there are any."""
        settings, tree = Settings.load(folder), ClusterTree.load(folder / "tree.safetensors")
        banks = tuple(name for name, base in bases.items() if made(base, settings, tree))
        if bases and not banks:
            remedy = "give its own with --run"
            raise UserError("this run did not make the model's clusters", folder, remedy)
        return cls(folder, settings, tree, documents_of(folder), known_names(folder), banks)

    def paths(self, text: OwnText, bases: Mapping[str, Base]) -> np.ndarray:
        """The leaf of each window of ``text``, (windows, levels) int32; UserError unless that is
        what the banks say of the documents."""
        file = self.folder / "paths.npy"
        try:
            paths = load_mapped(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file} cannot be read", error, RESTORE) from None
        if paths.shape != (len(text.windows), self.tree.depth) or paths.dtype != np.int32:
            found = f"{paths.dtype} {paths.shape}"
            raise UserError(f"{file} does not fit the documents beside it", found, RESTORE)
        leaves = {d.sha256: set(d.clusters) for d in provenance(text, self.settings, paths)}
        for document in (d for name in self.banks for d in bases[name].documents):
            if leaves.get(document.sha256, set(document.clusters)) != set(document.clusters):
                what = f"{file} and the bank's documents.jsonl do not agree"
                raise UserError(what, document.name, RESTORE)
        return paths


def made(base: Base, settings: Settings, tree: ClusterTree) -> bool:
    """Whether a run with these settings and this tree has made clusters of a bank."""
    if base.tree is None or settings.anchor_hash != base.anchor_hash:
        return False
    if base.tree.depth != tree.depth:
        return False
    levels = zip(base.tree.centroids, tree.centroids, settings.offsets, strict=True)
    return all(np.array_equal(np.asarray(a)[n : n + len(b)], b) for a, b, n in levels)


@dataclass(frozen=True)
class Rest:
    """What a run becomes, in the folder ``target``, and ``touched``, the clusters of level 1 that
    are trained anew, by their numbers among the run's."""

    target: Path
    settings: Settings
    text: OwnText
    paths: np.ndarray
    tree: ClusterTree
    touched: set[int]
    banks: tuple[str, ...]


def begin_rest(
    taught: Taught,
    target: Path,
    text: OwnText,
    paths: np.ndarray,
    gone: Collection[str],
    encode: Callable[[Windows], np.ndarray],
) -> Rest:
    """Begins a run without the documents ``gone`` in ``target``, or finds it there, with all that
    they have not touched. ``encode``: the vectors of windows."""
    run, settings = taught.folder, taught.settings
    owned = np.isin(text.owner, [i for i, d in enumerate(text.documents) if d.sha256 in gone])
    touched = set(subtrees_of(paths[owned]))
    rest, rest_paths = without(text, paths, gone)
    # It says nothing of what is gone: a hash of that would confirm a guess.
    left = repr((settings.seed, [d.sha256 for d in rest.documents])).encode()
    new = replace(settings, source=hashlib.sha256(left).hexdigest())
    if (target / SETTINGS).exists():
        if Settings.load(target) != new:
            raise UserError("the folder of another run", target, "choose another --out")
        tree = ClusterTree.load(target / "tree.safetensors")
        return Rest(target, new, rest, rest_paths, tree, touched, taught.banks)
    shutil.rmtree(target / "subtrees", ignore_errors=True)
    for number in set(subtrees_of(paths)) - touched:
        for name in ("blocks.safetensors", "done.json"):
            link_or_copy(subtree_folder(run, number) / name, subtree_folder(target, number) / name)
    save_array(target / "paths.npy", rest_paths)
    tree = taught.tree
    if owned.any():  # else it has but known them by a name
        tree = tree_of(tree, rest_paths, encode(rest.windows), settings.seed)
    tree.save(target / "tree.safetensors", settings.encoder_hash)
    restated_of(run, target, {d.sha256 for d in rest.documents})
    known = {sha256: names for sha256, names in taught.known.items() if sha256 not in gone}
    begin_run(target, new, rest.documents, known)
    return Rest(target, new, rest, rest_paths, tree, touched, taught.banks)


def without(text: OwnText, paths: np.ndarray, gone: Collection[str]) -> tuple[OwnText, np.ndarray]:
    """Text and paths without the documents of these hashes, as if they had never been there."""
    stays = np.array([d.sha256 not in gone for d in text.documents])
    windows, number = stays[text.owner], np.cumsum(stays) - 1
    rest = OwnText(
        [d for d, s in zip(text.documents, stays, strict=True) if s],
        choose(text.windows, np.flatnonzero(windows)),
        number[text.owner[windows]],
        text.added[windows],
    )
    return rest, paths[windows]


def tree_of(tree: ClusterTree, paths: np.ndarray, vectors: np.ndarray, seed: int) -> ClusterTree:
    """The clusters of ``tree``, each with the mean of the windows that lie in it for its centroid.

    Args:
        paths: of the windows, (n, levels).
        vectors: theirs, (n, dim).
        seed: where there are no windows, one leaf gets a centroid that is drawn by it.
    """
    rows = distinct(vectors)  # as the tree was fitted
    centroids, counts = list[np.ndarray](), list[np.ndarray]()
    for level, size in enumerate(tree.num_clusters):
        own = paths[rows, level]
        sums = np.zeros((size, tree.dim))
        np.add.at(sums, own, vectors[rows])
        counts.append(np.bincount(own, minlength=size))
        centroids.append((sums / np.maximum(counts[-1], 1)[:, None]).astype(np.float32))
    if not len(rows):  # a tree has a leaf at least
        anywhere = np.random.default_rng(seed).standard_normal(tree.dim)
        for level in range(tree.depth):
            counts[level][0], centroids[level][0] = 1, anywhere / np.linalg.norm(anywhere)
    return ClusterTree(tree.branching, centroids, counts, tree.seed)


def documents_left(base: Base, gone: Collection[str]) -> list[Document]:
    """Those of a bank that are not to be forgotten."""
    return [d for d in base.documents if d.sha256 not in gone]
