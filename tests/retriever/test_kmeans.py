"""One node of the cluster tree: against plain Lloyd, the balance rule, and degenerate examples."""

import numpy as np
import pytest

from mlx_hmem.retriever.kmeans import _means, balance, distances, kmeans, nearest, plus_plus_start


def unit(x):
    x = x.astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def topics(n, dim=48, num=60, noise=0.8, seed=0):
    """Unit vectors around ``num`` topics of very unequal size."""
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(num, dim))
    chosen = rng.choice(num, size=n, p=rng.dirichlet(np.ones(num)))
    return unit(means[chosen] + noise * rng.normal(size=(n, dim)))


def brute_force_distances(vectors, centroids):
    wide = vectors.astype(np.float64)
    return np.stack([np.square(wide - c).sum(1) for c in centroids], 1)


def inertia(vectors, centroids):
    return brute_force_distances(vectors, centroids).min(1).mean()


def lloyd(vectors, k, rng, steps=20):
    """Plain k-means on all vectors, from random examples drawn by the textbook k-means++."""
    centroids = vectors[rng.integers(len(vectors), size=1)].astype(np.float64)
    while len(centroids) < k:
        weights = brute_force_distances(vectors, centroids).min(1)
        chosen = rng.choice(len(vectors), p=weights / weights.sum())
        centroids = np.concatenate([centroids, vectors[chosen, None]])
    for _ in range(steps):
        labels = brute_force_distances(vectors, centroids).argmin(1)
        for index in np.unique(labels):
            centroids[index] = vectors[labels == index].mean(0)
    return centroids


def test_separated_clusters_are_recovered():
    rng = np.random.default_rng(1)
    means = 4 * np.eye(16, 32)
    vectors = (means[np.arange(20000) % 16] + 0.1 * rng.normal(size=(20000, 32))).astype(np.float32)
    for seed in range(5):
        found = kmeans(vectors, 16, np.random.default_rng(seed))
        order = nearest(means.astype(np.float32), found)
        assert sorted(order) == list(range(16))
        assert np.abs(found[order] - means).max() < 0.05


def test_inertia_is_that_of_plain_full_batch_lloyd():
    vectors = topics(9000)
    ours = [inertia(vectors, kmeans(vectors, 16, np.random.default_rng(s))) for s in range(3)]
    plain = [inertia(vectors, lloyd(vectors, 16, np.random.default_rng(s))) for s in range(2)]
    assert max(ours) < 1.03 * min(plain)


@pytest.mark.parametrize("seed", range(3))
def test_balance_keeps_the_largest_cluster_small_and_ruins_no_centroid(seed):
    """Two thirds of the examples lie in one dense topic, the rest in 15 far from it."""
    rng = np.random.default_rng(seed)
    dense = 8 * np.eye(64)[0] + 0.8 * rng.normal(size=(14000, 64))
    sparse = 12 * np.eye(64)[1 + rng.integers(15, size=7000)] + rng.normal(size=(7000, 64))
    vectors = np.concatenate([dense, sparse]).astype(np.float32)

    def fit(**settings):
        means = kmeans(vectors, 16, np.random.default_rng(seed), **settings)
        largest = np.bincount(nearest(vectors, means)).max() / len(vectors)
        return largest, inertia(vectors, means)

    (largest, ours), (free, plain), (_, always) = (
        fit(), fit(balanced_steps=0), fit(balanced_steps=20),
    )  # fmt: skip
    assert largest < 0.13 < free
    # The last five steps, plain, mend what moved examples did to the centroids.
    assert ours < 0.9 * always
    assert ours < 1.12 * plain


def test_a_cluster_without_examples_stays_where_it_was():
    batch, before = topics(10, dim=4), topics(3, dim=4, seed=1)
    after = _means(batch, np.array([0, 2] * 5), before)
    assert (after[1] == before[1]).all()
    assert np.allclose(after[0], batch[::2].mean(0))
    assert np.allclose(after[2], batch[1::2].mean(0))


def test_the_balance_rule_moves_half_of_each_overfull_cluster_to_the_smallest():
    labels = np.repeat([0, 1, 2, 3], [700, 200, 90, 10])
    before = labels.copy()
    balance(labels, 4, np.random.default_rng(0))
    assert np.bincount(labels).tolist() == [350, 200, 90, 360]
    assert set(before[labels != before]) == {0}
    moved = np.flatnonzero(labels != before)
    assert moved.min() < 100  # at random, not the tail
    assert moved.max() > 600

    even = np.repeat([0, 1, 2, 3], [375, 300, 175, 150])  # 1.5/k itself is allowed
    kept = even.copy()
    balance(even, 4, np.random.default_rng(0))
    assert (even == kept).all()


def test_same_seed_same_centroids_and_rows_choose_the_examples():
    vectors = topics(9000)
    first, again, other = (kmeans(vectors, 8, np.random.default_rng(s)) for s in (3, 3, 4))
    assert (first == again).all()
    assert not (first == other).all()
    vectors = topics(9000)
    rows = np.random.default_rng(0).permutation(9000)[:8000]
    there = kmeans(vectors, 4, np.random.default_rng(5), rows=rows)
    assert (there == kmeans(vectors[rows], 4, np.random.default_rng(5))).all()


@pytest.mark.parametrize("distinct", [1, 2, 7, 8])
def test_no_more_centroids_than_distinct_vectors(distinct):
    values = topics(distinct, dim=16)
    vectors = values[np.random.default_rng(0).integers(distinct, size=5000)]
    vectors[:distinct] = values
    centroids = kmeans(vectors, 8, np.random.default_rng(0))
    assert sorted(map(tuple, centroids)) == sorted(map(tuple, values))


def test_vectors_that_hardly_differ_are_still_told_apart():
    vectors = np.ones((4, 8), np.float32)
    vectors[:, 0] += np.arange(4) * np.float32(2e-7)
    assert len(np.unique(vectors, axis=0)) > 1
    centroids, exact = plus_plus_start(vectors, 8, np.random.default_rng(0))
    assert exact
    assert len(centroids) == len(np.unique(vectors, axis=0))


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e12])
def test_nearest_is_exact_at_every_scale_and_in_every_batch(scale):
    rng = np.random.default_rng(0)
    centroids = (rng.normal(size=(9, 20)) * scale).astype(np.float32)
    centroids[5] = np.nextafter(centroids[2], np.float32(np.inf))  # one rounding apart
    centroids[7] = centroids[3]
    # Half of the vectors lie on or beside a centroid, or half-way between two.
    beside = centroids[rng.integers(9, size=300)]
    between = (beside[:150] + beside[150:]) / 2
    vectors = np.concatenate([beside, between, rng.normal(size=(450, 20)) * scale])
    vectors = vectors.astype(np.float32)
    labels = nearest(vectors, centroids)
    assert (labels == brute_force_distances(vectors, centroids).argmin(1)).all()
    assert not (labels == 7).any()
    alone = [int(distances(centroids, vector).argmin()) for vector in vectors]
    assert labels.tolist() == alone
    assert [int(nearest(vector[None], centroids)[0]) for vector in vectors] == alone
