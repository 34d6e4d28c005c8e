"""The cluster tree: routes, the form on disk, hostile files; and the retriever over it."""

import json
import math
import os
import struct

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, read_safetensors_header, save_safetensors
from mlx_hmem.retriever.retriever import Retriever
from mlx_hmem.retriever.rows import RowsInFile
from mlx_hmem.retriever.tree import ClusterTree
from tests.helpers.programs import refused
from tests.retriever.test_kmeans import topics


@pytest.fixture(scope="module")
def vectors():
    return topics(6000, dim=24)


@pytest.fixture(scope="module")
def tree(vectors):
    return ClusterTree.fit(vectors, branching=(5, 3, 4), seed=1)


def greedy_in_plain_python(tree, vector):
    path, cluster = [], 0
    for level, k in enumerate(tree.branching):
        scores = {
            child: math.fsum(
                (float(a) - float(b)) ** 2
                for a, b in zip(tree.centroids[level][child], vector, strict=True)
            )
            for child in range(cluster * k, cluster * k + k)
            if tree.counts[level][child]
        }
        cluster = min(scores, key=scores.get)
        path.append(cluster)
    return tuple(path)


def test_routes_are_greedy_nested_and_the_same_in_a_batch(vectors, tree):
    assert (tree.num_clusters, tree.depth, tree.dim) == ((5, 15, 60), 3, 24)
    probes = np.concatenate([vectors[:200], topics(100, dim=24, seed=9)])
    paths = tree.route_batch(probes)
    assert paths.dtype == np.int32
    for probe, path in zip(probes, paths, strict=True):
        route = tree.route(probe)
        assert route == tuple(path) == greedy_in_plain_python(tree, probe)
        assert all(type(index) is int for index in route)
        assert route[2] // 4 == route[1]
        assert route[1] // 3 == route[0]
    order = np.random.default_rng(0).permutation(300)
    assert (tree.route_batch(probes[order]) == paths[order]).all()
    assert tree.route_batch(np.empty((0, 24), np.float32)).shape == (0, 3)


def test_leaves_are_the_ends_of_all_routes_and_counts_how_many_end_there(vectors, tree):
    assert set(tree.leaves()) == set(map(tuple, tree.route_batch(vectors).tolist()))
    few = ClusterTree.fit(vectors[:7], branching=(5, 3, 4))
    assert set(few.leaves()) == set(map(tuple, few.route_batch(vectors[:7]).tolist()))
    assert len(few.leaves()) < few.num_clusters[-1]
    paths = tree.route_batch(vectors)
    for level, size in enumerate(tree.num_clusters):
        assert (np.bincount(paths[:, level], minlength=size) == tree.counts[level]).all()


def test_the_tree_depends_on_the_seed_and_on_nothing_else(vectors, tree):
    np.random.seed(7)
    again = ClusterTree.fit(vectors.astype(np.float64), branching=[5, 3, 4], depth=3, seed=1)
    other = ClusterTree.fit(vectors, branching=(5, 3, 4), seed=2)
    for level in range(3):
        assert (tree.centroids[level] == again.centroids[level]).all()
        assert (tree.counts[level] == again.counts[level]).all()
        assert not (tree.centroids[level] == other.centroids[level]).all()


def test_a_tree_recovers_nested_topics():
    rng = np.random.default_rng(0)
    names = np.arange(12000) % 16
    means = 20 * np.eye(4, 40)[np.arange(16) // 4] + 4 * np.eye(16, 40, 8)
    vectors = means[names] + 0.2 * rng.normal(size=(12000, 40))
    paths = ClusterTree.fit(vectors, branching=4, depth=2).route_batch(vectors)
    assert len(set(zip(names, paths[:, 1], strict=True))) == 16
    assert len(set(zip(names // 4, paths[:, 0], strict=True))) == 4


@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_fewer_vectors_than_leaves(n):
    vectors = topics(n, dim=8)
    tree = ClusterTree.fit(vectors, branching=4, depth=3)
    paths = tree.route_batch(vectors)
    assert len(set(paths[:, -1])) == n  # every vector has a leaf of its own
    assert [int(c.sum()) for c in tree.counts] == [n] * 3
    for probe in topics(50, dim=8, seed=5):
        assert all(tree.counts[level][i] for level, i in enumerate(tree.route(probe)))


def test_a_level_of_one_cluster_holds_all(vectors, tmp_path):
    """What all texts share: the mean of them is its centroid."""
    tree = ClusterTree.fit(vectors[:500], branching=(1, 4), seed=1)
    assert tree.centroids[0] == pytest.approx(vectors[:500].mean(axis=0, keepdims=True), abs=1e-5)
    assert [count.tolist() for count in tree.counts[:1]] == [[500]]
    assert {path[1] for path in tree.route_batch(vectors).tolist()} == {0, 1, 2, 3}
    tree.save(tmp_path / "tree.safetensors", "hash")
    assert ClusterTree.load(tmp_path / "tree.safetensors").route(vectors[0])[0] == 0


def test_duplicates_use_one_child_and_lose_no_vector():
    values = topics(3, dim=8)
    vectors = np.repeat(values, [5000, 20, 1], axis=0)
    tree = ClusterTree.fit(vectors, branching=16, depth=2)
    for counts in tree.counts:
        assert sorted(counts[counts > 0]) == [1, 20, 5000]
    assert len({tree.route(v) for v in values}) == 3
    assert all(np.isfinite(c).all() for c in tree.centroids)


def test_a_saved_tree_routes_as_before(vectors, tree, tmp_path):
    path = tmp_path / "tree.safetensors"
    tree.save(path, "xxh3:abc")
    loaded = ClusterTree.load(path)
    assert (loaded.route_batch(vectors) == tree.route_batch(vectors)).all()
    assert (loaded.branching, loaded.seed, loaded.encoder_hash) == ((5, 3, 4), 1, "xxh3:abc")
    tensors, metadata = read_safetensors_header(path)
    assert tensors["level-3"].shape == (60, 24)
    assert json.loads(metadata["branching"]) == [5, 3, 4]
    loaded.save(tmp_path / "again", "xxh3:abc")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_every_truncated_or_extended_file_is_refused(tmp_path):
    path = tmp_path / "tree.safetensors"
    ClusterTree.fit(topics(20, dim=4), branching=2, depth=2).save(path, "xxh3:abc")
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        refused("", ClusterTree.load, path)
    path.write_bytes(whole + b"\0")
    refused("", ClusterTree.load, path)


def _change(name, function):
    def change(arrays, metadata):
        array = np.array(arrays[name])
        arrays[name] = mx.array(function(array))

    return change


def _set(array, index, value):
    array[index] = value
    return array


HOSTILE = {
    "NaN": _change("level-2", lambda a: _set(a, (1, 1), np.nan)),
    "too large": _change("level-1", lambda a: _set(a, (0, 0), 1e30)),
    "another type": _change("level-1", lambda a: a.astype(np.float16)),
    "another shape": _change("level-2", lambda a: a[:-1]),
    "flat": _change("level-1", lambda a: a.reshape(-1)),
    "no counts": lambda arrays, metadata: arrays.pop("counts-2"),
    "a negative count": _change("counts-2", lambda a: _set(a, slice(2), [-5, a[:2].sum() + 5])),
    "levels that disagree": _change("counts-2", lambda a: a * 2),
    "nothing counted": lambda arrays, metadata: [
        _change(f"counts-{level}", lambda a: a * 0)(arrays, metadata) for level in (1, 2)
    ],
    "an extra tensor": lambda arrays, metadata: arrays.update(extra=mx.zeros(3)),
    "no encoder": lambda arrays, metadata: metadata.pop("encoder_hash"),
    "a bad seed": lambda arrays, metadata: metadata.update(seed="one"),
    "a newer version": lambda arrays, metadata: metadata.update(format_version="2"),
    "a depth of 9": lambda arrays, metadata: metadata.update(branching=str([2] * 9)),
    "a huge tree": lambda arrays, metadata: metadata.update(branching="[65536, 65536]"),
    "another branching": lambda arrays, metadata: metadata.update(branching="[4, 2]"),
    "a branching of 1": lambda arrays, metadata: metadata.update(branching="[1, 2]"),
    "branching as text": lambda arrays, metadata: metadata.update(branching='"ab"'),
    "branching as a number": lambda arrays, metadata: metadata.update(branching="4"),
    "branching nested deep": lambda arrays, metadata: metadata.update(branching="[" * 100_000),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_an_unsound_tree_file_is_one_line(change, tmp_path):
    path = tmp_path / "tree.safetensors"
    ClusterTree.fit(topics(20, dim=4), branching=2, depth=2).save(path, "xxh3:abc")
    arrays, (_, metadata) = dict(load_safetensors(path)), read_safetensors_header(path)
    mx.eval(arrays)
    change(arrays, metadata)
    save_safetensors(path, arrays, metadata)
    refused("", ClusterTree.load, path)


def test_a_header_with_an_overflowing_shape_never_reaches_mlx(tmp_path):
    entry = {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}
    header = json.dumps({"level-1": entry}).encode()
    path = tmp_path / "tree.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    refused("header", ClusterTree.load, path)


@pytest.mark.parametrize(
    "vector",
    [np.zeros(23), np.zeros((1, 24)), np.full(24, np.nan), np.full(24, 1e300),
     np.array(["a"] * 24)],
)  # fmt: skip
def test_what_is_not_a_vector_of_this_tree_is_refused(tree, vector):
    refused("", tree.route, vector)
    refused("", lambda: tree.route_batch(vector[None]))


def test_a_very_long_vector_still_has_one_route(tree, vectors):
    for scale in (1e-30, 1e20, 3e38):
        probes = (vectors[:50] * np.float32(scale)).astype(np.float32)
        assert [tree.route(v) for v in probes] == [tuple(p) for p in tree.route_batch(probes)]


@pytest.mark.parametrize(
    "settings",
    [{"branching": 0}, {"branching": 2.5}, {"branching": "16"}, {"branching": ()},
     {"branching": (4, 4), "depth": 3}, {"branching": 4, "depth": 0}, {"branching": 2, "depth": 9},
     {"branching": 2, "depth": 10**12}, {"branching": 65536, "depth": 2}, {"seed": -1},
     {"seed": 0.5}],
)  # fmt: skip
def test_wrong_settings_are_refused(vectors, settings):
    refused("", ClusterTree.fit, vectors, **settings)


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((0, 4)), np.zeros(4), np.zeros((3, 0)), np.full((2, 2), np.inf),
     np.full((2, 2), 1e20)],
)  # fmt: skip
def test_vectors_that_cannot_be_clustered_are_refused(wrong):
    refused("", ClusterTree.fit, wrong)


class LetterEncoder:
    """Counts letters: small, deterministic, and it satisfies the protocol."""

    name, dim, fingerprint = "letters", 26, "xxh3:letters"

    def encode(self, texts, progress=False):
        counts = [[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts]
        result = np.array(counts, np.float32) + 0.01
        return result / np.linalg.norm(result, axis=1, keepdims=True)


WORDS = ["iron", "copper", "zinc", "river", "lake", "ocean", "piano", "violin", "flute", "maple"]


def test_the_retriever_routes_texts_as_the_tree_routes_their_vectors(tmp_path):
    encoder = LetterEncoder()
    tree = ClusterTree.fit(encoder.encode(WORDS), branching=3, depth=2)
    retriever = Retriever(encoder, tree)
    paths = retriever.route_many(WORDS)
    assert paths == [retriever.route(word) for word in WORDS]
    assert paths == [tree.route(vector) for vector in encoder.encode(WORDS)]
    assert len(set(paths)) > 3
    assert all(type(index) is int for path in paths for index in path)
    assert retriever.route_many([]) == []
    tree.save(tmp_path / "tree.safetensors", encoder.fingerprint)
    loaded = Retriever(encoder, ClusterTree.load(tmp_path / "tree.safetensors"))
    assert loaded.route_many(WORDS) == paths


@pytest.mark.parametrize("text", ["", " \n\t", None, 3, b"iron"])
def test_the_retriever_refuses_what_is_not_text(text):
    encoder = LetterEncoder()
    retriever = Retriever(encoder, ClusterTree.fit(encoder.encode(WORDS), branching=2, depth=2))
    refused("", retriever.route, text)


def test_the_retriever_refuses_the_tree_of_another_encoder(tmp_path):
    encoder = LetterEncoder()
    tree = ClusterTree.fit(encoder.encode(WORDS), branching=2, depth=2)
    tree.save(tmp_path / "tree.safetensors", "xxh3:another")
    with pytest.raises(UserError, match="another encoder"):
        Retriever(encoder, ClusterTree.load(tmp_path / "tree.safetensors"))
    with pytest.raises(UserError, match="dimensions"):
        Retriever(encoder, ClusterTree.fit(topics(9, dim=25), branching=2, depth=2))


def test_a_tree_whose_centroids_stay_in_the_file_is_the_same(tmp_path, monkeypatch):
    path, other = tmp_path / "tree.safetensors", tmp_path / "other.safetensors"
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((900, 12)).astype(np.float32)
    ClusterTree.fit(vectors, branching=(4, 3, 3), seed=0).save(path, "hash")
    tree = ClusterTree.load(path)
    monkeypatch.setattr("mlx_hmem.retriever.tree.MOST_IN_MEMORY", 0)
    monkeypatch.setattr("mlx_hmem.retriever.tree.CHUNK", 5)
    stored = ClusterTree.load(path)
    for mine, wanted in zip(stored.centroids, tree.centroids, strict=True):
        assert isinstance(mine, RowsInFile)
        assert np.array_equal(mine, wanted)
        assert np.array_equal(mine[2:4], wanted[2:4])
    assert np.array_equal(stored.route_batch(vectors), tree.route_batch(vectors))
    assert [stored.route(v) for v in vectors[:50]] == [tree.route(v) for v in vectors[:50]]
    stored.save(other, "hash")
    assert other.read_bytes() == path.read_bytes()
    os.truncate(path, stored.centroids[-1]._start + 33 * 12 * 4)
    refused("ends too early", lambda: stored.centroids[-1][30:36])


def test_a_centroid_in_the_file_that_is_not_finite_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "tree.safetensors"
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    tree = ClusterTree.fit(vectors, branching=(3,), seed=0)
    tree.centroids[0][2, 3] = np.nan
    tree.save(path, "hash")
    monkeypatch.setattr("mlx_hmem.retriever.tree.MOST_IN_MEMORY", 0)
    refused("centroid that is not finite", ClusterTree.load, path)
