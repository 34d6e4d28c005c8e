"""Balanced k-means on samples: one node of the cluster tree (paper, section 2 and appendix C).

The paper's recipe: a k-means++ start on the node's own sampled examples, then 20
expectation-maximisation steps, each on 6,400 fresh examples. In the assignment step a cluster that
holds more than 1.5/k of the examples has its assignments split evenly at random with the smallest
cluster.

Two choices of ours. The balance rule is off in the last five steps: it moves examples to a cluster
they are not near, and a centroid last updated with such examples lies between topics. Measured on
200,000 × 384 with k = 16, that brings the inertia from 0.706-0.721 to 0.684-0.696 (FAISS on all
points: 0.680), for a largest cluster of 0.12 to 0.14 where the rule aims at 0.094. And a step takes
400 examples per cluster where that is more than 6,400, so that a large k is not starved.

Everything is NumPy: such a node takes 0.15 s on one core, and no result depends on an accelerator.
"""

from collections.abc import Iterator
from itertools import repeat

import numpy as np

STEPS = 20
BALANCED_STEPS = 15
EXAMPLES_PER_STEP = 6400
EXAMPLES_PER_CLUSTER = 400
MOST_LOADED = 1.5  # times the mean load
CHUNK = 8192


def kmeans(
    vectors: np.ndarray,
    k: int,
    rng: np.random.Generator,
    *,
    rows: np.ndarray | None = None,
    balanced_steps: int = BALANCED_STEPS,
) -> np.ndarray:
    """At most ``k`` centroids of ``vectors[rows]`` (all of them without ``rows``).

    ``vectors`` is (n, dim) float32, or float16, of which only what is looked at becomes float32;
    the result (m, dim) float32, with m < k where the sampled
    examples hold only m distinct vectors. The rule of balance holds in the first
    ``balanced_steps`` of the 20 steps.
    """
    samples = _samples(vectors, k, rng, rows)
    centroids, exact = plus_plus_start(next(samples), k, rng)
    if exact:
        return centroids
    for step in range(STEPS):
        batch = next(samples)
        labels = _scores(batch, centroids).argmin(1)
        if step < balanced_steps:
            balance(labels, len(centroids), rng)
        centroids = _means(batch, labels, centroids)
    return centroids


def _samples(
    vectors: np.ndarray, k: int, rng: np.random.Generator, rows: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Fresh examples for each step: walks through a random order, and around when it ends."""
    order = rng.permutation(len(vectors) if rows is None else len(rows))
    if rows is not None:
        order = rows[order]
    size = max(EXAMPLES_PER_STEP, EXAMPLES_PER_CLUSTER * k)
    if len(order) <= size:
        yield from repeat(vectors[order].astype(np.float32, copy=False))
    at = 0
    while True:
        batch = vectors[order.take(np.arange(at, at + size), mode="wrap")]
        yield batch.astype(np.float32, copy=False)
        at = (at + size) % len(order)


def plus_plus_start(batch: np.ndarray, k: int, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """k-means++: each next centroid is an example, drawn by its squared distance to those before.

    Returns the centroids and whether every example is one of them, so that nothing can improve.
    """
    squares = _squares(batch)
    chosen = [int(rng.integers(len(batch)))]
    nearest = _distances_to(batch, squares, chosen[0])
    while len(chosen) < k and nearest.any():
        total = np.cumsum(nearest, dtype=np.float64)
        # The minimum guards against a product rounded up to the total itself.
        at = np.searchsorted(total, rng.random() * total[-1], side="right")
        chosen.append(int(min(at, np.flatnonzero(nearest)[-1])))
        nearest = np.minimum(nearest, _distances_to(batch, squares, chosen[-1]))
    return batch[chosen], not nearest.any()


def _distances_to(batch: np.ndarray, squares: np.ndarray, index: int) -> np.ndarray:
    """Squared distances of all examples to one of them; of equal vectors exactly 0."""
    result = squares + squares[index] - 2 * (batch @ batch[index])
    near = np.flatnonzero(~(result > 1e-4 * (squares + squares[index])))
    for start in range(0, len(near), CHUNK):
        rows = near[start : start + CHUNK]
        difference = batch[rows] - batch[index]
        # Distinct vectors stay apart even where the square of their distance underflows.
        result[rows] = np.maximum(
            _squares(difference), np.where(difference.any(1), np.finfo(np.float32).tiny, 0)
        )
    return result


def balance(labels: np.ndarray, k: int, rng: np.random.Generator) -> None:
    """The paper's rule, in place: halves of clusters above 1.5/k go to the smallest cluster."""
    counts = np.bincount(labels, minlength=k)
    limit = MOST_LOADED * len(labels) / k
    for cluster in np.argsort(-counts, kind="stable"):
        if counts[cluster] <= limit:
            continue
        smallest = int(counts.argmin())
        moved = rng.permutation(np.flatnonzero(labels == cluster))[: counts[cluster] // 2]
        labels[moved] = smallest
        counts[cluster] -= len(moved)
        counts[smallest] += len(moved)


def _means(batch: np.ndarray, labels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The mean of each cluster; an empty one stays where it was ``before``."""
    members = np.zeros((len(before), len(batch)), np.float32)
    members[labels, np.arange(len(batch))] = 1
    counts = members.sum(1, keepdims=True)
    return np.where(counts > 0, members @ batch / np.maximum(counts, 1), before)


def _squares(x: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", x, x)


def _scores(x: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Squared distances (n, k) less the square of ``x``, which moves no comparison."""
    return _squares(centroids) - 2 * (x @ centroids.T)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared L2 distances along the last axis, in float64: the ones that decide a route."""
    difference = a.astype(np.float64) - b
    return np.square(difference, out=difference).sum(-1)


def nearest(
    vectors: np.ndarray, centroids: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """For each of ``vectors[rows]`` (n, dim), all without ``rows``, the index of its nearest
    centroid (k, dim), as int64.

    The answer is that of :func:`distances`, the lower index among equals, whatever the number of
    vectors and the BLAS: float32 matmuls decide only where their rounding cannot.
    """
    result = np.empty(len(vectors) if rows is None else len(rows), np.int64)
    far = np.sqrt(_squares(centroids).max())
    for start in range(0, len(result), CHUNK):
        part = slice(start, start + CHUNK)
        x = vectors[part if rows is None else rows[part]].astype(np.float32, copy=False)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = _scores(x, centroids)
            labels = scores.argmin(1)
            if len(centroids) > 1:
                # Twice the worst rounding of two sums over dim terms.
                doubt = (
                    2 * np.finfo(np.float32).eps * x.shape[1] * (np.sqrt(_squares(x)) + far) ** 2
                )
                first, second = np.partition(scores, 1, axis=1)[:, :2].T
                close = np.flatnonzero(~(second - first > doubt + 1e-30))
                if len(close):
                    exact = np.empty((len(close), len(centroids)))
                    for index, centroid in enumerate(centroids):
                        exact[:, index] = distances(x[close], centroid)
                    labels[close] = exact.argmin(1)
        result[part] = labels
    return result
