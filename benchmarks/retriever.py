"""The encoder and the cluster tree: ``python -m benchmarks.retriever PART [--json]``.

``encoders``: the static encoder against MiniLM. Size, speed on the same texts, and how often both
choose the same cluster on each level of a tree fitted to MiniLM's vectors, for articles that the
distillation never saw: means over trees of several seeds. Also how often the start of an article,
or a prompt about it, lands in the cluster of the whole, as routing by prompt needs. MiniLM takes
nearly all of the time: five minutes on a core.

``clustering``: time and quality of the cluster tree. One node (k = 16) against plain k-means on all
vectors, with the balance rule in none, 15 and all of the 20 steps; then a tree of three levels and
its routes. The vectors are synthetic: 300 topics of unequal size under 20 themes. Set
OPENBLAS_NUM_THREADS=1 for the figures of one core.
"""

import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.common.counting import returned, timed
from benchmarks.common.show import Result, benchmark
from mlx_hmem.errors import UserError
from mlx_hmem.retriever import ClusterTree
from mlx_hmem.retriever.encoder import STATIC_FOLDER, Encoder, find_minilm, load_encoder
from mlx_hmem.retriever.kmeans import STEPS, kmeans, nearest, plus_plus_start
from mlx_hmem.retriever.minilm import FILES
from train.corpus.cleaning import clean
from train.corpus.sample import is_held_out
from train.tree.static_encoder import HELD_OUT, NOUNS, PROMPTS, read_articles, sentences

BRANCHING = (16, 16)
TREES = 5
WORDS = 200  # of a document
TIMED = {"prompts": 256, "documents": 48}
Article = tuple[str, str]


def draw_articles(corpus: Path, documents: int, seed: int) -> tuple[list[Article], list[Article]]:
    """(title, start of the text) of articles to fit trees on, and of a third as many held out."""
    seen, unseen = list[Article](), list[Article]()
    for name, title, text in read_articles([corpus]):
        if len(sentences(text)) > 1:
            (unseen if is_held_out(name, HELD_OUT) else seen).append((title, text))
    rng = random.Random(seed)
    if min(len(seen), 3 * len(unseen)) < documents:
        raise UserError("the corpus is too small", len(seen), f"use --documents below {documents}")
    fitted, held_out = (
        [(title, " ".join(clean(text).split()[:WORDS])) for title, text in rng.sample(some, count)]
        for some, count in ((seen, documents), (unseen, documents // 3))
    )
    return fitted, held_out


def seconds(encoder: Encoder, texts: Sequence[str]) -> float:
    return timed(lambda: encoder.encode(texts)).ms / 1e3


def speed(texts: Sequence[str], minilm: Encoder) -> dict[str, float]:
    """Texts a second. The static encoder's cold figure is that of a fresh one, whose cache of words
    is empty; the median of five."""
    minilm.encode(texts[:8])
    slow = seconds(minilm, texts)
    static = [load_encoder("static") for _ in range(5)]
    for encoder in static:
        encoder.encode(["warm up"])
    cold, warm = (median(seconds(encoder, texts) for encoder in static) for _ in range(2))
    rates = {"minilm": slow, "static_cold": cold, "static_warm": warm}
    result = {f"{name}_texts_per_s": len(texts) / value for name, value in rates.items()}
    return result | {"ratio_cold": slow / cold, "ratio_warm": slow / warm}


def agreement(
    trees: Sequence[ClusterTree], first: np.ndarray, second: np.ndarray
) -> dict[str, float]:
    """The share of rows that both route to the same cluster, in per cent over the trees: mean,
    least and most on level 1, mean on level 2."""
    same = [(tree.route_batch(first) == tree.route_batch(second)).mean(axis=0) for tree in trees]
    one, two = 100 * np.stack(same, axis=1)
    found = {"level_1": one.mean(), "least": one.min(), "most": one.max(), "level_2": two.mean()}
    return {name: float(value) for name, value in found.items()}


def encoders(*, corpus: Path, documents: int = 1500, seed: int = 0) -> Result:
    """Trees are fitted to ``documents`` articles of ``corpus``, a folder of *.jsonl[.gz] files."""
    if documents < 64:
        raise UserError("--documents is too small", documents, "use 64 or more")
    fitted, held_out = draw_articles(corpus, documents, seed)
    rng = random.Random(seed)
    texts = {
        "documents": [text for _, text in held_out],
        "first_sentences": [sentences(text)[0] for _, text in held_out],
        "prompts": [
            rng.choice(PROMPTS).format(title=title, noun=rng.choice(NOUNS)) for title, _ in held_out
        ],
    }
    minilm, static = load_encoder("minilm"), load_encoder("static")
    rates = {kind: speed(texts[kind][:count], minilm) for kind, count in TIMED.items()}

    starts = [text for _, text in fitted]
    trees, own = (
        [ClusterTree.fit(v, branching=BRANCHING, seed=s) for s in range(seed, seed + TREES)]
        for v in (minilm.encode(starts, progress=True), static.encode(starts))
    )
    slow = {kind: minilm.encode(t, progress=True) for kind, t in texts.items()}
    fast = {kind: static.encode(t) for kind, t in texts.items()}
    rows = {
        f"static chooses MiniLM's, {kind}": agreement(trees, slow[kind], fast[kind])
        | {"cosine": float((slow[kind] * fast[kind]).sum(axis=1).mean())}
        for kind in texts
    }
    for kind in ("first_sentences", "prompts"):
        for name, its_trees, its in (("minilm", trees, slow), ("static", own, fast)):
            row = agreement(its_trees, its["documents"], its[kind])
            rows[f"{name}: {kind} in the document's own"] = row
    return {
        "megabytes": {
            "minilm": sum((find_minilm() / file).stat().st_size for file in FILES) / 1e6,
            "static": sum(file.stat().st_size for file in STATIC_FOLDER.iterdir()) / 1e6,
        },
        "texts a second": rates,
        "documents_fitted": len(fitted),
        "documents_held_out": len(held_out),
        f"cluster, {TREES} trees of {BRANCHING}": rows,
    }


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


def quality(vectors: np.ndarray, fit: Callable[..., np.ndarray], seeds: int) -> dict[str, float]:
    """Means over the seeds: seconds, squared distance to the centroid, the fullest cluster."""
    figures = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        centroids, took = returned(partial(fit, vectors, 16, rng))
        labels = nearest(vectors, centroids)
        parts = [vectors[labels == i] - mean for i, mean in enumerate(centroids)]
        inertia = sum(float(np.square(part).sum()) for part in parts) / len(vectors)
        figures.append((took.ms / 1e3, inertia, np.bincount(labels).max() / len(vectors)))
    names = ("seconds", "inertia", "largest_cluster")
    return {name: float(x) for name, x in zip(names, np.mean(figures, 0), strict=True)}


def clustering(num_vectors: int = 200_000, dim: int = 384, seeds: int = 3) -> Result:
    vectors = make_vectors(num_vectors, dim, 0)
    rows = {"full batch": quality(vectors, full_batch, seeds)}
    for steps in (0, 15, 20):
        sampled = partial(kmeans, balanced_steps=steps)
        rows[f"sampled, balanced in {steps} steps"] = quality(vectors, sampled, seeds)
    tree, fit = returned(lambda: ClusterTree.fit(vectors, branching=16, depth=3))
    some = vectors[:1000]
    one = timed(lambda: [tree.route(vector) for vector in some], times=len(some))
    batch = timed(lambda: tree.route_batch(vectors), times=num_vectors)
    figures = {
        "fit_seconds": fit.ms / 1e3,
        "unused_leaves": int((tree.counts[-1] == 0).sum()),
        "route_us": one.ms * 1e3,
        "route_batch_us_per_vector": batch.ms * 1e3,
    }
    return {"one node, 16 clusters": rows, "tree": figures}


if __name__ == "__main__":
    benchmark(__doc__, {"encoders": encoders, "clustering": clustering})
