"""Cluster trees from k-means of NumPy, scikit-learn or FAISS into ``tree.safetensors``.

A tree is given by its centroids on each level (docs/pytorch_layout.md): scikit-learn's
``KMeans.cluster_centers_`` and the ``centroids`` of FAISS's ``Kmeans`` are such arrays; neither
library is needed, and no pickle is ever read.
"""

import contextlib
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from mlx_hmem.config import MAX_CLUSTERS, MAX_DEPTH
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.files import read_safetensors_header
from mlx_hmem.reading import open_regular
from mlx_hmem.retriever import ClusterTree, load_encoder
from mlx_hmem.retriever.tree import LARGEST_ENTRY, check_branching

from ..torch_files.pickles import open_files

PICKLES = (".pkl", ".pickle", ".joblib", ".sav")
MAX_DIM = 1 << 16
LARGE, MOST_RATIO = 1 << 26, 100  # bytes, and compression of more: centroids hardly compress
LAYOUT = "store level-1, level-2, … (docs/pytorch_layout.md)"


class Found(NamedTuple):
    """An array of a source, read when asked for."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Arrays = dict[str, Found]


def read_tree(source: Path, branching: Sequence[int] | None = None) -> ClusterTree:
    """The tree of a file or folder.

    Args:
        branching: children of a cluster on each level; None: found from the numbers of centroids.

    Centroids of level L are (clusters, dim), or (parents, children, dim); float64 is rounded to
    float32. ``counts-L``, the examples of each cluster, may be left out: then each leaf has one,
    but a leaf with a centroid of NaN has none, as has one of count 0: it is never chosen.

    Raises:
        UserError: an unknown or unsafe file, a missing level, numbers of clusters that make no
            tree or not the tree of ``branching``, centroids that are not finite.
    """
    safetensors = source.suffix == ".safetensors"
    if safetensors and "format_version" in read_safetensors_header(source)[1]:
        tree = ClusterTree.load(source)
        _check_branching(source, tree.branching, branching)
        return tree
    arrays = _open(source)
    depth = _depth(source, arrays)
    sizes = [_clusters(source, level, arrays) for level in range(1, depth + 1)]
    found = _branching(source, sizes)
    _check_branching(source, found, branching)
    centroids = [_centroids(source, arrays, level) for level in range(1, depth + 1)]
    if len({c.shape[1] for c in centroids}) > 1:
        dims = [c.shape[1] for c in centroids]
        raise UserError(f"{source}: the levels differ in dimensions", dims, "use one encoder")
    counts = _counts(source, arrays, found, centroids)
    for level, (values, own) in enumerate(zip(centroids, counts, strict=True), 1):
        values[own == 0] = 0
        if not np.isfinite(values).all() or np.abs(values).max() > LARGEST_ENTRY:
            raise UserError(f"{source} has a centroid that is not finite", f"level {level}", "mend")
    return ClusterTree(found, centroids, counts, seed=0)


def _check_branching(source: Path, found: tuple[int, ...], wanted: Sequence[int] | None) -> None:
    if wanted is not None and found != tuple(wanted):
        raise UserError(
            f"{source} is a tree of another branching", found, f"the memory needs {tuple(wanted)}"
        )


def _open(source: Path) -> Arrays:
    """The arrays of a source by name, unread."""
    if not source.exists():
        raise UserError("no such file or folder", source, "give the path of a tree")
    if source.is_dir():
        files = sorted(source.iterdir())
        if any(file.suffix in PICKLES for file in files):
            source = next(file for file in files if file.suffix in PICKLES)
        else:
            return {file.stem: _npy(file) for file in files if file.suffix == ".npy"}
    if source.suffix in PICKLES:
        raise UserError(
            "a pickle can run code and is not read",
            source,
            "in Python: numpy.savez('tree.npz', **{'level-1': kmeans.cluster_centers_, …})",
        )
    if source.suffix == ".npy":
        return {"level-1": _npy(source)}
    if source.suffix == ".npz":
        return _npz(source)
    if source.suffix in (".pt", ".pth", ".bin", ".safetensors"):
        tensors = open_files([source]).tensors
        return {name: Found(tensor.shape, tensor.numbers) for name, tensor in tensors.items()}
    raise UserError(
        "unknown kind of tree file", source, f"use .npz, .npy or .safetensors; {LAYOUT}"
    )


def _npy(file: Path) -> Found:
    with open_regular(file) as opened:
        shape = _checked_shape(opened, file, file.stat().st_size)
    return Found(shape, lambda: np.load(file, allow_pickle=False))


def _npz(file: Path) -> dict[str, Found]:
    """Entry by entry, with sizes checked before; ``numpy.load`` would trust them."""
    result = {}
    with _sound(file), zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                raise UserError(f"{file} holds something else", info.filename[:80], LAYOUT)
            if info.file_size > max(LARGE, MOST_RATIO * info.compress_size):
                raise UserError(f"{file} unpacks to too much", info.file_size, "fetch another")
            with archive.open(info) as entry:
                shape = _checked_shape(entry, file, info.file_size)
            name = info.filename.removesuffix(".npy")
            result[name] = Found(shape, partial(_entry, file, name))
    return result


def _entry(file: Path, name: str) -> np.ndarray:
    with _sound(file), np.load(file, allow_pickle=False) as archive:
        array: np.ndarray = archive[name]
        return array


@contextlib.contextmanager
def _sound(file: Path) -> Iterator[None]:
    """What NumPy and ``zipfile`` say of a file, in one line."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:  # a header is parsed as Python, by parsers that raise anything
        what = f"{file} is no sound NumPy file"
        raise UserError(what, str(error)[:120], "save it again") from None


def _checked_shape(entry: IO[bytes], file: Path, size: int) -> tuple[int, ...]:
    """The shape of an array in NumPy's format that takes ``size`` bytes with its header."""
    with _sound(file):
        reads: dict[Any, Any] = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        version = np.lib.format.read_magic(entry)
        if version not in reads:
            raise ValueError(f"its version is {version}")
        shape, _, dtype = reads[version](entry)
    if dtype.hasobject:
        raise UserError("a pickle inside an array can run code", file, "save arrays of numbers")
    if dtype.kind not in "fiu" or any(n < 0 for n in shape):
        raise UserError(f"{file} holds no numbers", dtype, LAYOUT)
    if size != entry.tell() + math.prod(shape) * dtype.itemsize:
        raise UserError(f"{file}: shape and bytes do not agree", shape, "save it again")
    return shape


def _depth(source: Path, arrays: Arrays) -> int:
    """The number of levels; every array must be one of theirs."""
    depth = sum(name.startswith("level-") for name in arrays)
    wanted = {f"level-{level}" for level in range(1, depth + 1)}
    allowed = wanted | {f"counts-{level}" for level in range(1, depth + 1)}
    if not 1 <= depth <= MAX_DEPTH or not wanted <= arrays.keys() <= allowed:
        names = ", ".join(sorted(arrays)[:8]) or "nothing"
        raise UserError(f"{source} holds no levels 1 to N of a tree", names[:200], LAYOUT)
    return depth


def _clusters(source: Path, level: int, arrays: Arrays) -> int:
    shape = arrays[f"level-{level}"].shape
    count = math.prod(shape[:-1]) if len(shape) > 1 else 0
    if not 1 <= count <= MAX_CLUSTERS or not 1 <= shape[-1] <= MAX_DIM:
        raise UserError(
            f"{source}: centroids have a wrong shape", f"level-{level} {shape}", "(clusters, dim)"
        )
    return count


def _branching(source: Path, sizes: list[int]) -> tuple[int, ...]:
    widths, left = zip(*map(divmod, sizes, [1, *sizes]), strict=True)
    if any(left):
        raise UserError(
            f"{source}: a level's clusters are no multiple of those above", sizes, "mend the tree"
        )
    return check_branching(widths, None)


def _centroids(source: Path, arrays: Arrays, level: int) -> np.ndarray:
    """(clusters, dim) float32, NaN where there is none."""
    array = arrays[f"level-{level}"].read()
    if array.dtype.kind != "f":
        raise UserError(f"{source}: centroids are no floating-point numbers", array.dtype, "mend")
    with np.errstate(over="ignore"):
        return np.array(array.reshape(-1, array.shape[-1]), np.float32)


def _counts(
    source: Path, arrays: Arrays, branching: tuple[int, ...], centroids: list[np.ndarray]
) -> list[np.ndarray]:
    """Examples of each cluster, which add up from the leaves to the root."""
    depth = len(branching)
    leaves = f"counts-{depth}"
    if leaves in arrays:
        own = _whole(source, leaves, arrays[leaves].read(), len(centroids[-1]))
    else:
        # A cluster without a centroid takes those below it along.
        used = np.ones(1, bool)
        for values, k in zip(centroids, branching, strict=True):
            used = np.repeat(used, k) & ~np.isnan(values).all(1)
        own = used.astype(np.int64)
    counts = [own]
    for level in range(depth - 1, 0, -1):
        counts.insert(0, counts[0].reshape(-1, branching[level]).sum(1))
        name = f"counts-{level}"
        if name in arrays:
            given = _whole(source, name, arrays[name].read(), len(counts[0]))
            if (given != counts[0]).any():
                raise UserError(f"{source}: counts do not add up", name, "leave counts out")
    if not counts[0].any():
        raise UserError(f"{source}: no cluster has examples", leaves, "mend the tree")
    return counts


def _whole(source: Path, name: str, array: np.ndarray, size: int) -> np.ndarray:
    flat = array.reshape(-1)
    if flat.size != size or flat.dtype.kind not in "iu" or flat.min() < 0 or flat.max() >= 2**62:
        raise UserError(
            f"{source}: {name} are no counts", array.shape, f"give {size} whole numbers"
        )
    return flat.astype(np.int64)


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.convert tree",
        description="Makes a cluster tree of centroids from k-means of NumPy, scikit-learn or "
        "FAISS, on each level: arrays level-1, level-2, … in one .npz, .safetensors or .pt file, "
        "or a folder with a .npy file for each."
        "\n\nMakes the file DESTINATION, as it lies in a model's folder retriever. "
        "docs/pytorch_layout.md has the shapes.",
    )
    parser.add_argument(
        "source", type=Path, help=".npz, .npy, .safetensors, .pt, or a folder of .npy"
    )
    parser.add_argument("destination", type=Path, help="the .safetensors file to make")
    parser.add_argument("--encoder", default="minilm", help="minilm, static or a folder")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args(words)
    if args.destination.exists() and not args.overwrite:
        raise UserError("the destination exists", args.destination, "add --overwrite")
    tree = read_tree(args.source)
    encoder = load_encoder(args.encoder)
    if tree.dim != encoder.dim:
        raise UserError(
            f"the tree does not fit encoder {encoder.name}",
            f"{tree.dim} dimensions, not {encoder.dim}",
            "name the encoder whose vectors were clustered with --encoder",
        )
    tree.save(args.destination, encoder.fingerprint)
    print(f"{args.destination}: {tree.num_clusters} clusters on the levels, {tree.dim} dimensions")
