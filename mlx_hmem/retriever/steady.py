"""Routes that stay while a conversation stays, and that follow when its topic moves.

A level leaves its present cluster only for one beyond whose boundary the vector lies by a margin.
A vector that lies near a boundary would otherwise change sides with every sentence.
"""

import numpy as np

from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.retriever.tree import ClusterTree


def beyond(tree: ClusterTree, level: int, vector: np.ndarray, present: int) -> np.ndarray:
    """How far ``vector`` lies beyond the boundary between the cluster ``present`` of the 0-based
    ``level`` and each of its siblings: L2, negative on the side of ``present``, 0 for itself."""
    children = tree.children(level, present // tree.branching[level])
    centroids = tree.centroids[level][children].astype(np.float64)
    own = tree.centroids[level][present].astype(np.float64)
    squares = ((centroids - vector) ** 2).sum(1)
    gaps = np.sqrt(((centroids - own) ** 2).sum(1))
    mine = ((own - vector) ** 2).sum()
    # Two centroids in one place have no boundary.
    return np.where(gaps > 0, (mine - squares) / (2 * np.where(gaps > 0, gaps, 1)), 0.0)


def steady_route(
    tree: ClusterTree, vector: np.ndarray, present: ClusterPath | None, margin: float
) -> ClusterPath:
    """The cluster path of one vector (dim,), given the path in use.

    From the root on, a level keeps its cluster unless ``vector`` lies at least ``margin`` (L2)
    beyond the boundary to the nearest other; below the first that changes the route is new. Without
    ``present``, or with a margin of 0, it is the tree's own route.
    """
    if margin < 0:
        raise UserError("margin is negative", margin, "use 0 for a new route each time")
    if present is None:
        return tree.route(vector)
    path: list[int] = []
    for level, cluster in enumerate(present):
        children = tree.children(level, path[-1] if path else 0)
        nearest = tree.nearest(level, children, vector)
        sides = beyond(tree, level, vector, cluster)
        if nearest != cluster and sides[children.tolist().index(nearest)] >= margin:
            return tree.route(vector, start=(*path, nearest))
        path.append(cluster)
    return tuple(path)


def likely_paths(
    tree: ClusterTree, vector: np.ndarray, present: ClusterPath, most: int
) -> list[ClusterPath]:
    """Up to ``most`` paths that a next vector may take: beyond the boundaries nearest first."""
    others = []
    for level, cluster in enumerate(present):
        children = tree.children(level, cluster // tree.branching[level])
        for side, other in zip(beyond(tree, level, vector, cluster), children, strict=True):
            if other != cluster:
                others.append((-side, (*present[:level], int(other))))
    return [tree.route(vector, start=path) for _, path in sorted(others)[:most]]
