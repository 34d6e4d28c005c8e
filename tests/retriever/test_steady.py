"""Routes that stay within a margin of a boundary, and follow beyond it."""

import numpy as np
import pytest

from mlx_hmem.retriever import ClusterTree
from mlx_hmem.retriever.steady import beyond, likely_paths, steady_route
from tests.helpers.programs import refused


def plane() -> ClusterTree:
    """Two clusters left and right of the line x = 0, each with one above and one below y = 0."""
    top = np.array([[-1, 0], [1, 0]], np.float32)
    leaves = np.array([[-1, 0.5], [-1, -0.5], [1, 0.5], [1, -0.5]], np.float32)
    return ClusterTree((2, 2), [top, leaves], [np.full(2, 2), np.ones(4, np.int64)], 0)


def test_the_distance_beyond_a_boundary_is_that_of_geometry():
    tree = plane()
    assert beyond(tree, 0, np.array([0.3, 0.7]), 0) == pytest.approx([0, 0.3])
    assert beyond(tree, 0, np.array([-0.2, 0.7]), 0) == pytest.approx([0, -0.2])
    assert beyond(tree, 1, np.array([9.0, -0.4]), 2) == pytest.approx([0, 0.4])


@pytest.mark.parametrize(
    ("vector", "present", "expected"),
    [
        ((-0.5, 0.5), None, (0, 0)),
        ((0.05, 0.5), (0, 0), (0, 0)),  # just beyond: it stays
        ((0.05, 0.5), (1, 2), (1, 2)),
        ((0.05, 0.5), None, (1, 2)),
        ((0.15, 0.5), (0, 0), (1, 2)),  # clearly beyond: it follows
        ((-0.15, 0.5), (1, 3), (0, 0)),  # and goes down anew, without regard to the leaf before
        ((-0.5, -0.05), (0, 0), (0, 0)),  # a leaf has the same margin
        ((-0.5, -0.15), (0, 0), (0, 1)),
        ((0.05, -0.15), (0, 0), (0, 1)),  # the leaf moves within the cluster that stays
    ],
)
def test_a_level_changes_only_beyond_the_margin(vector, present, expected):
    assert steady_route(plane(), np.array(vector, np.float32), present, 0.1) == expected


def test_to_and_fro_over_a_boundary_is_one_path():
    tree, present, seen = plane(), (0, 0), []
    for step in range(40):
        vector = np.array([0.09 * (-1) ** step, 0.09 * (-1) ** (step // 2)])
        present = steady_route(tree, vector, present, 0.1)
        seen.append(present)
    assert set(seen) == {(0, 0)}
    assert len({tree.route(np.array([0.09 * a, 0.09 * b])) for a in (1, -1) for b in (1, -1)}) == 4


def fitted() -> tuple[ClusterTree, np.ndarray]:
    vectors = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return ClusterTree.fit(vectors, branching=(4, 3, 3)), vectors


def test_without_margin_it_is_the_trees_own_route():
    tree, vectors = fitted()
    present = None
    for vector in vectors:
        present = steady_route(tree, vector, present, 0.0)
        assert present == tree.route(vector)


def test_a_margin_means_fewer_changes_and_none_that_are_half_way():
    tree, vectors = fitted()
    changes = []
    for margin in (0.0, 0.1, 0.3, 9.0):
        present, count = tree.route(vectors[0]), 0
        for vector in vectors:
            path = steady_route(tree, vector, present, margin)
            count += path != present
            parents = [cluster // width for cluster, width in zip(path, (4, 3, 3), strict=True)]
            assert parents == [0, *path[:-1]]
            present = path
        changes.append(count)
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > changes[2] > changes[3] == 0


def test_likely_paths_are_others_nearest_first():
    tree, vectors = fitted()
    for vector in vectors[:20]:
        present = tree.route(vector)
        likely = likely_paths(tree, vector, present, 6)
        assert len(set(likely)) == 6
        assert present not in likely
        distances = []
        for path in likely:
            assert all(tree.counts[level][cluster] for level, cluster in enumerate(path))
            level = next(i for i in range(3) if path[i] != present[i])
            siblings = tree.children(level, present[level] // tree.branching[level]).tolist()
            sides = beyond(tree, level, vector, present[level])
            distances.append(-sides[siblings.index(path[level])])
        assert distances == sorted(distances)
        assert len(likely_paths(tree, vector, present, 99)) == 3 + 2 + 2


def test_a_negative_margin_is_refused():
    refused("margin is negative: -1", lambda: steady_route(plane(), np.zeros(2), (0, 0), -1))
