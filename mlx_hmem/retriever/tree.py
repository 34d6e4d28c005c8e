"""The cluster tree: from a vector to its cluster path (paper, section 2 and appendix C).

Hierarchical k-means, fitted from the root to the leaves; routing is greedy, level by level, in L2:
depth × k comparisons. A cluster keeps the number of examples it was fitted on. One without any
exists only to keep the numbering regular: it is never chosen, so every route ends in a leaf that
has examples, and there is always one.

A route is decided in float64 wherever float32 could be in doubt, so a vector alone and the same
vector in a batch take the same path, on every machine.
"""

import json
import math
import operator
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.config import MAX_CLUSTERS, MAX_DEPTH, ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.files import Source, load_safetensors, read_safetensors_header, save_safetensors
from mlx_hmem.retriever.kmeans import CHUNK, distances, kmeans, nearest
from mlx_hmem.retriever.rows import RowsInFile

FORMAT_VERSION = "1"
LARGEST_ENTRY = 1e15  # squares and their sums stay finite in float32
DEFAULT_DEPTH = 3
MOST_IN_MEMORY = 16 << 20  # bytes of a level's centroids; more stay in the file
RESTORE = "restore the file or fit the tree again"


class ClusterTree:
    """Nested clusters with their centroids; see :meth:`fit` and :meth:`load`.

    Attributes: ``branching``, children of a cluster above each level; ``num_clusters``, clusters on
    each level; ``depth``; ``dim``; ``seed``; ``centroids``, per level (num_clusters, dim) float32,
    those of a large level as :class:`RowsInFile`;
    ``counts``, per level (num_clusters,) int64, the examples of each cluster in the fit;
    ``encoder_hash``, fingerprint of the encoder whose vectors these are, None before a save.
    """

    def __init__(
        self,
        branching: tuple[int, ...],
        centroids: Sequence[np.ndarray | RowsInFile],
        counts: list[np.ndarray],
        seed: int,
        encoder_hash: str | None = None,
    ):
        self.branching = branching
        self.num_clusters = _num_clusters(branching)
        self.depth = len(branching)
        self.dim = centroids[0].shape[1]
        self.centroids = centroids
        self.counts = counts
        self.seed = seed
        self.encoder_hash = encoder_hash

    @classmethod
    def fit(
        cls,
        vectors: np.ndarray,
        branching: int | Sequence[int] = 16,
        depth: int | None = None,
        seed: int = 0,
        progress: bool = False,
        rows: np.ndarray | None = None,
    ) -> "ClusterTree":
        """Fits a tree to ``vectors`` (n, dim), meant to be L2-normalised, used as float32.

        ``rows`` are the numbers of those to fit it to, all by default. Mapped float16 vectors are
        read as they are needed, and may be more than there is memory.

        ``branching`` is one int for all of ``depth`` levels (3 unless given), or one int per level.
        The result depends on vectors, branching, depth and seed only; each cluster has a random
        generator of its own. :class:`UserError` for anything but finite vectors, at least one.
        """
        data = _check_vectors(vectors)
        if len(data) == 0 or (rows is not None and len(rows) == 0):
            raise UserError("no vectors to cluster", data.shape, "give at least one")
        if data.dtype != np.float16 and np.abs(data).max() > LARGEST_ENTRY:
            raise UserError("a vector is too long", np.abs(data).max(), "normalise the vectors")
        widths = check_branching(branching, depth)
        if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
            raise UserError("seed is not a whole number of 0 or more", repr(seed), "correct it")
        centroids, counts = [], []
        members: dict[int, np.ndarray | None] = {0: rows}  # of the clusters with examples
        total = len(widths) * len(data if rows is None else rows)
        with tqdm(total=total, desc="clustering", unit="vec", disable=not progress) as bar:
            for level, (k, size) in enumerate(zip(widths, _num_clusters(widths), strict=True), 1):
                centroids.append(np.zeros((size, data.shape[1]), np.float32))
                counts.append(np.zeros(size, np.int64))
                below: dict[int, np.ndarray | None] = {}
                for parent, own in members.items():
                    rng = np.random.default_rng([int(seed), level, parent])
                    means, parts = _split(data, own, k, rng)
                    for child, (mean, part) in enumerate(
                        zip(means, parts, strict=True), parent * k
                    ):
                        centroids[-1][child] = mean
                        counts[-1][child] = len(part)
                        below[child] = part
                    bar.update(sum(map(len, parts)))
                members = below
        return cls(widths, centroids, counts, int(seed))

    def route(
        self, vector: np.ndarray, barred: Collection[tuple[int, int]] = (), start: ClusterPath = ()
    ) -> ClusterPath:
        """The cluster path of one vector (dim,): the global cluster index on each level.

        ``barred`` are clusters, as (level, cluster) with 1 the coarsest level, that the path may
        not take: it goes on to the next nearest, as if those and what is below were not there.
        ``start`` are the clusters of the first levels, where they are given.
        :class:`UserError` where nothing is left.
        """
        closed = self._closed(barred)
        x = np.asarray(vector)
        if x.ndim != 1:
            raise UserError("not one vector", f"shape {x.shape}", "use route_batch for many")
        x = _check_vectors(x[None], self.dim)[0]
        path = start
        for level in range(len(start), self.depth):
            children = self.children(level, path[-1] if path else 0)
            if closed:
                children = np.array([c for c in children if (level + 1, c) not in closed], int)
            if not len(children):  # only above level 1
                raise UserError("every cluster is barred", len(barred), "bar fewer of them")
            path = (*path, self.nearest(level, children, x))
        return path

    def nearest(self, level: int, clusters: np.ndarray, vector: np.ndarray) -> int:
        """That of ``clusters`` of the 0-based ``level`` which a vector lies nearest to."""
        return int(clusters[distances(self.centroids[level][clusters], vector).argmin()])

    def _closed(self, barred: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
        """``barred`` and the clusters above, whose children are all barred."""
        closed = set(barred)
        for level in range(self.depth, 1, -1):
            parents = {c // self.branching[level - 1] for at, c in closed if at == level}
            for parent in parents:
                if all((level, c) in closed for c in self.children(level - 1, parent)):
                    closed.add((level - 1, parent))
        return closed

    def route_batch(self, vectors: np.ndarray) -> np.ndarray:
        """Cluster paths of ``vectors`` (n, dim): (n, depth) int32, row by row as :meth:`route`."""
        data = _check_vectors(vectors, self.dim)
        paths = np.empty((len(data), self.depth), np.int32)
        parents = np.zeros(len(data), np.int64)
        for level in range(self.depth):
            order = np.argsort(parents, kind="stable")
            starts = np.flatnonzero(np.diff(parents[order])) + 1
            for rows in np.split(order, starts) if len(data) else []:
                children = self.children(level, int(parents[rows[0]]))
                paths[rows, level] = children[nearest(data, self.centroids[level][children], rows)]
            parents = paths[:, level].astype(np.int64)
        return paths

    def children(self, level: int, cluster: int) -> np.ndarray:
        """Global indices, on the 0-based ``level``, of the children that have examples."""
        k = self.branching[level]
        return cluster * k + np.flatnonzero(self.counts[level][cluster * k : (cluster + 1) * k])

    def without(self, clusters: Collection[int]) -> "ClusterTree | None":
        """The same tree, from which no route leads into these clusters of level 1; None where no
        other has examples."""
        if not clusters:
            return self
        counts = [level.copy() for level in self.counts]
        for level in counts:
            level.reshape(self.branching[0], -1)[list(clusters)] = 0
        if not counts[0].any():
            return None
        return ClusterTree(self.branching, self.centroids, counts, self.seed, self.encoder_hash)

    def leaves(self) -> list[ClusterPath]:
        """The cluster path of every leaf that has examples."""
        leaves = np.flatnonzero(self.counts[-1])
        below = np.cumprod((1, *self.branching[:0:-1]))[::-1]  # leaves under one cluster
        return [tuple((leaf // below).tolist()) for leaf in leaves]

    def save(self, path: Source, encoder_hash: str) -> None:
        """Writes the tree, tied to the encoder with this fingerprint, as a safetensors file.

        Per level L: ``level-L`` the centroids and ``counts-L``, where 0 marks an unused cluster.
        """
        arrays: dict[str, mx.array] = {}
        for level in range(self.depth):
            arrays[f"level-{level + 1}"] = mx.array(np.asarray(self.centroids[level]))
            arrays[f"counts-{level + 1}"] = mx.array(self.counts[level])
        metadata = {
            "format_version": FORMAT_VERSION,
            "branching": json.dumps(self.branching),
            "seed": str(self.seed),
            "encoder_hash": encoder_hash,
        }
        save_safetensors(path, arrays, metadata)
        self.encoder_hash = encoder_hash

    @classmethod
    def load(cls, path: Source) -> "ClusterTree":
        """Reads a saved tree; a :class:`UserError` unless all of it is sound."""
        tensors, metadata = read_safetensors_header(path)
        version = metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} is not a cluster tree of format version {FORMAT_VERSION}",
                repr(version)[:40],
                "update mlx_hmem or fit the tree again",
            )
        try:
            values = json.loads(metadata["branching"])
            branching = check_branching(tuple(values), None)
            seed = int(metadata["seed"])
            encoder_hash = metadata["encoder_hash"]
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path} has wrong metadata", error, RESTORE) from None
        dim = tensors["level-1"].shape[-1] if "level-1" in tensors else 0
        levels = list(enumerate(_num_clusters(branching), 1))
        expected: dict[str, Any] = {f"level-{n}": ("F32", (size, dim)) for n, size in levels}
        expected |= {f"counts-{n}": ("I64", (size,)) for n, size in levels}
        found = {name: (info.dtype, info.shape) for name, info in tensors.items()}
        if dim < 1 or found != expected:
            raise UserError(f"{path} does not hold the tensors of its metadata", branching, RESTORE)
        arrays = load_safetensors(path)  # lazy: what stays in the file is not read
        centroids: list[Any] = [
            RowsInFile(path, tensors[f"level-{n}"])
            if size * dim * 4 > MOST_IN_MEMORY
            else np.array(arrays[f"level-{n}"])
            for n, size in levels
        ]
        counts = [np.array(arrays[f"counts-{n}"]) for n, _ in levels]
        _check_tree(path, branching, centroids, counts)
        return cls(branching, centroids, counts, seed, encoder_hash)


def _split(
    data: np.ndarray, rows: np.ndarray | None, k: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Children of one cluster, those with examples only: centroids, and the rows of each."""
    means = kmeans(data, k, rng, rows=rows)
    labels = nearest(data, means, rows)
    if rows is None:
        rows = np.arange(len(data))
    members = [rows[labels == child] for child in range(len(means))]
    used = [child for child, member in enumerate(members) if len(member)]
    return means[used], [members[child] for child in used]


def _num_clusters(branching: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(branching, operator.mul))


def check_branching(branching: int | Sequence[int], depth: int | None) -> tuple[int, ...]:
    """``branching`` as one int of 1 or more per level, or a :class:`UserError`."""
    try:
        if isinstance(branching, Sequence | np.ndarray):
            widths = tuple(map(operator.index, branching))
            levels = len(widths) if depth is None else operator.index(depth)
        else:
            levels = DEFAULT_DEPTH if depth is None else operator.index(depth)
            # One more than allowed is enough to be refused, and no memory is lost on it.
            widths = (operator.index(branching),) * min(levels, MAX_DEPTH + 1)
    except TypeError:
        raise UserError(
            "branching and depth are not whole numbers", repr((branching, depth)), "use 16 and 3"
        ) from None
    if not 1 <= len(widths) <= MAX_DEPTH or levels != len(widths):
        wrong = f"branching {branching}, depth {depth}"
        raise UserError("depth is wrong", wrong, f"use 1 to {MAX_DEPTH} levels, one branching each")
    if min(widths) < 1:
        raise UserError("branching is too small", min(widths), "use 1 or more")
    if math.prod(widths) > MAX_CLUSTERS:
        raise UserError("too many clusters", math.prod(widths), f"stay within {MAX_CLUSTERS}")
    return widths


def _check_vectors(vectors: np.ndarray, dim: int | None = None) -> np.ndarray:
    """``vectors`` as finite float32 or float16 (n, dim), or a :class:`UserError`."""
    data = np.asarray(vectors)
    if data.dtype.kind not in "fiu":
        raise UserError("vectors are not numbers", data.dtype, "encode the texts first")
    if data.ndim != 2 or data.shape[1] < 1 or (dim is not None and data.shape[1] != dim):
        raise UserError(
            "vectors have a wrong shape", data.shape, f"give (n, {'dim' if dim is None else dim})"
        )
    if data.dtype != np.float16:
        with np.errstate(over="ignore"):
            data = np.ascontiguousarray(data, np.float32)
    for start in range(0, len(data), CHUNK):
        finite = np.isfinite(data[start : start + CHUNK]).all(1)
        if not finite.all():
            row = start + int(np.flatnonzero(~finite)[0])
            raise UserError("a vector is not finite", f"row {row}", "encode the texts again")
    return data


def _check_tree(
    path: Source, branching: tuple[int, ...], centroids: list[np.ndarray], counts: list[np.ndarray]
) -> None:
    """Finite centroids, and counts that add up from the leaves to the root."""
    for level, k in enumerate(branching, 1):
        own, values = counts[level - 1], centroids[level - 1]
        pieces = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
        if not all(np.abs(piece).max() <= LARGEST_ENTRY for piece in pieces):  # false of NaN
            raise UserError(f"{path} has a centroid that is not finite", f"level {level}", RESTORE)
        sums = own.reshape(-1, k).sum(1)
        if own.min() < 0 or sums.min() < 0 or (level == 1 and sums[0] == 0):
            raise UserError(f"{path} has wrong counts", f"level {level}", RESTORE)
        if level > 1 and (sums != counts[level - 2]).any():
            raise UserError(
                f"{path}: the counts of two levels do not agree", f"{level - 1}, {level}", RESTORE
            )
