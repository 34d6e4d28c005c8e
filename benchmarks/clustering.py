"""Time and quality of the cluster tree: ``python -m benchmarks.clustering [--json]``.

One node (k = 16) against plain k-means on all vectors, with the balance rule in none, 15 and all
of the 20 steps; then a tree of three levels and its routes. The vectors are synthetic: 300 topics
of unequal size under 20 themes. Set OPENBLAS_NUM_THREADS=1 for the figures of one core.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.retriever.kmeans import STEPS, kmeans, nearest, plus_plus_start
from mlx_hmem.retriever.tree import ClusterTree


def make_vectors(n: int, dim: int, seed: int) -> np.ndarray:
    """(n, dim) float32, L2-normalised."""
    rng = np.random.default_rng(seed)
    themes = rng.standard_normal((20, dim), np.float32)
    topics = themes[rng.integers(20, size=300)] + rng.standard_normal((300, dim), np.float32)
    vectors = topics[rng.choice(300, size=n, p=rng.dirichlet(np.ones(300)))]
    vectors += 2 * rng.standard_normal((n, dim), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def full_batch(vectors: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Plain k-means: every step on all vectors."""
    start = vectors[rng.permutation(len(vectors))[:6400]]
    centroids, _ = plus_plus_start(start, k, rng)
    for _ in range(STEPS):
        labels = nearest(vectors, centroids)
        for index in np.unique(labels):
            centroids[index] = vectors[labels == index].mean(0)
    return centroids


def measure(vectors: np.ndarray, fit: Callable[[int], np.ndarray], seeds: int) -> dict[str, Any]:
    """Means over the seeds: seconds, squared distance to the centroid, the fullest cluster."""
    figures = []
    for seed in range(seeds):
        start = time.perf_counter()
        centroids = fit(seed)
        seconds = time.perf_counter() - start
        labels = nearest(vectors, centroids)
        parts = [vectors[labels == i] - mean for i, mean in enumerate(centroids)]
        inertia = sum(float(np.square(part).sum()) for part in parts) / len(vectors)
        figures.append((seconds, inertia, np.bincount(labels).max() / len(vectors)))
    names = ("seconds", "inertia", "largest_cluster")
    return {name: round(float(x), 4) for name, x in zip(names, np.mean(figures, 0), strict=True)}


def run(n: int, dim: int, seeds: int) -> dict[str, Any]:
    vectors = make_vectors(n, dim, 0)
    rng = np.random.default_rng
    result: dict[str, Any] = {"num_vectors": n, "dim": dim, "seeds": seeds}
    result["full batch"] = measure(vectors, lambda s: full_batch(vectors, 16, rng(s)), seeds)
    for steps in (0, 15, 20):

        def sampled(seed: int, steps: int = steps) -> np.ndarray:
            return kmeans(vectors, 16, rng(seed), balanced_steps=steps)

        result[f"sampled, balanced in {steps} steps"] = measure(vectors, sampled, seeds)
    start = time.perf_counter()
    tree = ClusterTree.fit(vectors, branching=16, depth=3)
    fitted = time.perf_counter()
    tree.route_batch(vectors)
    batch = time.perf_counter()
    for vector in vectors[:1000]:
        tree.route(vector)
    result["tree"] = {
        "fit_seconds": round(fitted - start, 2),
        "unused_leaves": int((tree.counts[-1] == 0).sum()),
        "route_us": round((time.perf_counter() - batch) * 1e6 / len(vectors[:1000]), 1),
        "route_batch_us_per_vector": round((batch - fitted) * 1e6 / n, 2),
    }
    return result


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--num-vectors", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args()
    result = run(args.num_vectors, args.dim, args.seeds)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        figures = value.items() if isinstance(value, dict) else [("", value)]
        print(f"{name:32s}", *(f"{key} {figure}" for key, figure in figures))


if __name__ == "__main__":
    run_program(main)
