"""Cluster trees of NumPy, scikit-learn and FAISS: routes as a greedy descent on what was given."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert.command import main
from convert.memory.trees import read_tree
from convert.torch_files.writer import write_torch
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors
from mlx_hmem.retriever import ClusterTree, load_encoder
from tests.helpers.programs import refused

DIM, BRANCHING = 12, (4, 3, 2)
SIZES = (4, 12, 24)
Levels = list[np.ndarray]


def centroids(dtype: Any = np.float32, dim: int = DIM) -> Levels:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((size, dim)).astype(dtype) for size in SIZES]


def descent(levels: Levels, vector: np.ndarray, counts: Levels | None = None) -> tuple[int, ...]:
    """The greedy path, from the squared distances to each child written out."""
    path, cluster = [], 0
    for level, (values, k) in enumerate(zip(levels, BRANCHING, strict=True)):
        children = list(range(cluster * k, cluster * k + k))
        if counts is not None:
            children = [c for c in children if counts[level][c]]
        distances = [float(sum((values[c].astype("f8") - vector) ** 2)) for c in children]
        cluster = children[int(np.argmin(distances))]
        path.append(cluster)
    return tuple(path)


def named(levels: Levels) -> dict[str, np.ndarray]:
    return {f"level-{i}": values for i, values in enumerate(levels, 1)}


def npz(folder: Path, levels: Levels) -> Path:
    np.savez(folder / "tree.npz", **named(levels))
    return folder / "tree.npz"


def compressed(folder: Path, levels: Levels) -> Path:
    np.savez_compressed(folder / "tree.npz", **named(levels))
    return folder / "tree.npz"


def npy_files(folder: Path, levels: Levels) -> Path:
    for name, values in named(levels).items():
        np.save(folder / f"{name}.npy", np.asfortranarray(values))
    return folder


def by_parent(folder: Path, levels: Levels) -> Path:
    """As k-means objects give them: one stack of children for each parent."""
    return npz(folder, [levels[0], levels[1].reshape(4, 3, DIM), levels[2].reshape(4, 3, 2, DIM)])


def safetensors(folder: Path, levels: Levels) -> Path:
    save_safetensors(folder / "t.safetensors", {n: mx.array(v) for n, v in named(levels).items()})
    return folder / "t.safetensors"


def torch_file(folder: Path, levels: Levels) -> Path:
    write_torch(folder / "t.pt", [(n, "F32", v.shape, [v]) for n, v in named(levels).items()])
    return folder / "t.pt"


@pytest.mark.parametrize("store", [npz, compressed, npy_files, by_parent, safetensors, torch_file])
def test_routes_are_a_greedy_descent_on_the_given_centroids(tmp_path, store):
    levels = centroids()
    tree = read_tree(store(tmp_path, levels), BRANCHING)
    assert tree.branching == BRANCHING
    vectors = np.random.default_rng(1).standard_normal((200, DIM)).astype(np.float32)
    routes = tree.route_batch(vectors)
    for vector, route in zip(vectors, routes, strict=True):
        assert tuple(route) == tree.route(vector) == descent(levels, vector)
    assert len(np.unique(routes[:, -1])) > 12


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_floats_are_rounded_to_float32(tmp_path, dtype):
    levels = centroids(dtype)
    tree = read_tree(npz(tmp_path, levels))
    for own, given in zip(tree.centroids, levels, strict=True):
        assert own.dtype == np.float32
        assert np.array_equal(own, given.astype(np.float32))


@pytest.mark.parametrize("how", ["counts", "nan"])
def test_clusters_without_examples_are_never_chosen(tmp_path, how):
    levels, counts = centroids(), [np.ones(24, np.int64)]
    counts[0][[0, 5, 12, 13, 14, 15, 16, 17]] = 0  # all below cluster 2 of level 1
    for k in (2, 3):
        counts.insert(0, counts[0].reshape(-1, k).sum(1))
    stored = named(levels)
    if how == "counts":
        stored["counts-3"] = counts[2].astype(np.int32)
        stored["counts-1"] = counts[0]
    else:
        for values, own in zip(levels, counts, strict=True):
            values[own == 0] = np.nan
    np.savez(tmp_path / "tree.npz", **stored)
    tree = read_tree(tmp_path / "tree.npz")
    assert all(np.array_equal(a, b) for a, b in zip(tree.counts, counts, strict=True))
    vectors = np.random.default_rng(1).standard_normal((200, DIM)).astype(np.float32)
    for vector, route in zip(vectors, tree.route_batch(vectors), strict=True):
        assert tuple(route) == descent(levels, vector, counts)
        assert route[0] != 2
    tree.save(tmp_path / "tree.safetensors", "xxh3:e")
    again = ClusterTree.load(tmp_path / "tree.safetensors")  # checks counts and centroids
    assert np.array_equal(again.route_batch(vectors), tree.route_batch(vectors))


def test_our_own_tree_is_taken_as_it_is(tmp_path):
    tree = ClusterTree.fit(centroids()[2], BRANCHING)
    tree.save(tmp_path / "tree.safetensors", "xxh3:e")
    again = read_tree(tmp_path / "tree.safetensors", BRANCHING)
    assert again.encoder_hash == "xxh3:e"
    assert all(np.array_equal(a, b) for a, b in zip(tree.counts, again.counts, strict=True))


def test_a_tree_alone_becomes_a_file_that_its_encoder_can_route_with(tmp_path, capsys):
    encoder = load_encoder("static")
    source, target = npz(tmp_path, centroids(dim=encoder.dim)), tmp_path / "tree.safetensors"
    main(["tree", str(source), str(target), "--encoder", "static"])
    assert "(4, 12, 24)" in capsys.readouterr().out
    assert ClusterTree.load(target).encoder_hash == encoder.fingerprint
    refused("exists", main, ["tree", str(source), str(target), "--encoder", "static"])
    source = npz(tmp_path, centroids())
    with pytest.raises(UserError, match="12 dimensions"):
        main(["tree", str(source), str(tmp_path / "b"), "--encoder", "static"])


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, Any]:
        return Path.touch, (self.path,)


def pickled(folder: Path) -> Path:
    (folder / "kmeans.joblib").write_bytes(pickle.dumps(Bomb(folder / "ran")))
    return folder / "kmeans.joblib"


def folder_with_pickle(folder: Path) -> Path:
    pickled(folder)
    return folder


def object_array(folder: Path) -> Path:
    np.savez(folder / "t.npz", **{"level-1": np.array([Bomb(folder / "ran")], object)})
    return folder / "t.npz"


def zip_bomb(folder: Path) -> Path:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"shape": (1 << 13, 1 << 12), "fortran_order": False, "descr": "<f4"}
    )
    with (
        zipfile.ZipFile(folder / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("level-1.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(header.getvalue())
        for _ in range(4):
            entry.write(bytes(1 << 25))
    return folder / "t.npz"


def claims_too_much(folder: Path) -> Path:
    with open(folder / "t.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"shape": (1 << 40, 1 << 20), "fortran_order": False, "descr": "<f4"}
        )
        file.write(bytes(64))
    return folder / "t.npy"


def cut_off(folder: Path) -> Path:
    path = npz(folder, centroids())
    path.write_bytes(path.read_bytes()[:-300])
    return path


def text_file(folder: Path) -> Path:
    (folder / "t.npy").write_text("centroids")
    return folder / "t.npy"


def headed(header: str) -> Callable[[Path], Path]:
    def store(folder: Path) -> Path:
        size = len(header).to_bytes(2, "little")
        (folder / "t.npy").write_bytes(b"\x93NUMPY\x01\0" + size + header.encode())
        return folder / "t.npy"

    return store


def stored(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Path]:
    def store(folder: Path) -> Path:
        arrays = named(centroids())
        change(arrays)
        np.savez(folder / "t.npz", **arrays)
        return folder / "t.npz"

    return store


def spoilt(level: str, value: float) -> Callable[[dict[str, np.ndarray]], Any]:
    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[level][3, 2] = value

    return change


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pickle": (pickled, "can run code.*savez"),
    "a pickle in the folder": (folder_with_pickle, "can run code"),
    "an array of objects": (object_array, "can run code"),
    "a zip bomb": (zip_bomb, "unpacks to too much"),
    "a header that claims too much": (claims_too_much, "do not agree"),
    # NumPy parses a header as Python: these were tracebacks.
    "a header of signs": (headed("-" * 9000 + "1"), "no sound"),
    "a header without an end": (headed("(" * 9000), "no sound"),
    "half a file": (cut_off, "no sound"),
    "a text": (text_file, "no sound NumPy file"),
    "nothing": (lambda folder: folder / "none.npz", "no such file"),
    "an empty folder": (lambda folder: folder, "holds no levels"),
    "an unknown kind": (lambda folder: Path(__file__), "unknown kind"),
    "a missing level": (stored(lambda a: a.pop("level-2")), "holds no levels"),
    "another name": (stored(lambda a: a.update(x=np.zeros(3))), "holds no levels"),
    "no multiple": (stored(lambda a: a.update({"level-2": np.ones((11, DIM))})), "no multiple"),
    "two widths": (stored(lambda a: a.update({"level-2": np.ones((12, 3))})), "dimensions"),
    "one axis": (stored(lambda a: a.update({"level-2": np.ones(12)})), "wrong shape"),
    "whole numbers": (stored(lambda a: a.update({"level-1": np.ones((4, DIM), int)})), "floating"),
    "infinite": (stored(spoilt("level-2", np.inf)), "not finite.*level 2"),
    "one NaN": (stored(spoilt("level-3", np.nan)), "not finite.*level 3"),
    "all NaN": (stored(lambda a: a["level-1"].fill(np.nan)), "no cluster has examples"),
    "counts of floats": (stored(lambda a: a.update({"counts-3": np.ones(24)})), "no counts"),
    "too few counts": (stored(lambda a: a.update({"counts-3": np.ones(12, int)})), "no counts"),
    "wrong sums": (stored(lambda a: a.update({"counts-1": np.ones(4, int)})), "do not add up"),
}


@pytest.mark.parametrize(("make", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_tree_is_one_line_and_runs_nothing(tmp_path, make, words):
    refused(words, lambda: read_tree(make(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_tree_of_another_branching_is_named(tmp_path):
    with pytest.raises(UserError, match=r"another branching: \(4, 3, 2\).*\(4, 2, 3\)"):
        read_tree(npz(tmp_path, centroids()), (4, 2, 3))
