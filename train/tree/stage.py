"""The tree stage: windows to vectors, vectors to a cluster tree, each window to its cluster path.

Encoding is the long part and goes shard by shard. The vectors stay on the disk, in half precision;
what is in memory of each window is its number, and its hash while equal ones are sought.
"""

import functools
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash

from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint
from mlx_hmem.retriever import ClusterTree, Encoder, load_encoder

from ..corpus.shards import Advance, Shard, make_shards
from ..data.arrays import load_mapped, save_array, save_pieces
from ..data.tokenizer import load_tokenizer
from ..data.windows import load_windows
from ..ranks import ALONE, Ranks
from ..recipe.recipe import Recipe
from .prompts import move_to_prompts

CHUNK = 1024  # windows in a shard of vectors: MiniLM takes minutes for them
STATIC_CHUNK = 1 << 14  # and the static encoder seconds
ROUTED = 1 << 16  # windows in a shard of routes


@functools.lru_cache(maxsize=1)
def _encoder(name: str, identity: str) -> Encoder:
    """The encoder, loaded once in each process; ``identity`` is its fingerprint."""
    return load_encoder(name)


def encode_shard(
    path: Path, task: tuple[Path, str, str, tuple[int, int]], advance: Advance
) -> None:
    """Writes the vectors of some windows, (n, dim) float16.

    ``task``: the run, the encoder's name and fingerprint, and the first and last + 1 window.
    """
    run, name, identity, (first, end) = task
    texts = load_windows(run).texts(load_tokenizer(run), first, end)
    vectors = _encoder(name, identity).encode(list(texts))
    save_array(path, vectors.astype(np.float16))
    advance(end - first)


def _shards(count: int, size: int, *task: Any) -> list[Shard]:
    """``task`` and the first and last + 1 window, for as many windows at a time as ``size``."""
    parts = [(first, min(first + size, count)) for first in range(0, count, size)]
    return [Shard((*task, part), part[1] - part[0]) for part in parts]


def encode_windows(run: Path, encoder: str, ranks: Ranks) -> tuple[np.ndarray, str]:
    """Vectors of the run's windows, (n, dim) float16 mapped from tree/vectors.npy, and the
    encoder's fingerprint."""
    out, count = run / "tree", len(load_windows(run))
    loaded = load_encoder(encoder)
    static = loaded.name == "static"
    size = STATIC_CHUNK if static else CHUNK
    files = make_shards(
        out / "vectors",
        ranks,
        encode_shard,
        _shards(count, size, run, encoder, loaded.fingerprint),
        {"encoder": loaded.fingerprint, "windows": fingerprint(run / "windows" / "tokens.npy")},
        desc="encode",
        unit=" windows",
        # One process keeps a GPU busy; the static encoder does not use it.
        processes=1 if not static and mx.default_device().type == mx.gpu else None,
    )
    if ranks.first:
        save_pieces(out / "vectors.npy", map(np.load, files))
    ranks.wait()
    return load_mapped(out / "vectors.npy"), loaded.fingerprint


def distinct(vectors: np.ndarray) -> np.ndarray:
    """The numbers of the vectors, of equal ones the first: a text repeated hundreds of times would
    bend the tree to itself, and its prompts would then route elsewhere than the text does.

    Equal are those of one 64-bit hash, which of 100 million vectors takes two different ones for
    equal with a chance of 1 in 3,700."""
    hashed = np.fromiter(map(xxhash.xxh3_64_intdigest, vectors), np.uint64, len(vectors))
    _, first_of_each = np.unique(hashed, return_index=True)
    return np.sort(first_of_each)


def route_shard(path: Path, task: tuple[Path, tuple[int, int]], advance: Advance) -> None:
    """Writes the cluster paths of a part of the windows, (n, depth) int32."""
    run, (first, end) = task
    tree = ClusterTree.load(run / "tree" / "tree.safetensors")
    vectors = load_mapped(run / "tree" / "vectors.npy")
    save_array(path, tree.route_batch(vectors[first:end]))
    advance(end - first)


def _moved(
    tree: ClusterTree,
    recipe: Recipe,
    folder: Path,
    vectors: np.ndarray,
    rows: np.ndarray,
    encoder_hash: str,
) -> ClusterTree:
    """The tree moved by as many prompts of the run's windows as the recipe says."""
    windows, tokenizer = load_windows(folder), load_tokenizer(folder)
    encoder = _encoder(recipe.tree.encoder, encoder_hash)

    def texts(numbers: np.ndarray) -> list[str]:
        return [text for n in numbers.tolist() for text in windows.texts(tokenizer, n, n + 1)]

    return move_to_prompts(
        tree, vectors, rows, texts, encoder.encode, recipe.tree.prompts, recipe.seed
    )


def run_tree(recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> None:
    """Writes ``tree/``: vectors.npy, tree.safetensors and paths.npy (windows, depth) int32."""
    out, branching = folder / "tree", recipe.tree.branching
    vectors, encoder_hash = encode_windows(folder, recipe.tree.encoder, ranks)
    if len(vectors) < np.prod(branching):
        raise UserError(
            "fewer windows than clusters",
            f"{len(vectors)} windows, branching {branching}",
            "take more documents or a smaller tree.branching",
        )
    tree_file = out / "tree.safetensors"
    if ranks.rank == 0:
        rows = distinct(vectors)
        tree = ClusterTree.fit(vectors, branching, seed=recipe.seed, progress=True, rows=rows)
        if recipe.tree.prompts:
            tree = _moved(tree, recipe, folder, vectors, rows, encoder_hash)
        tree.save(tree_file, encoder_hash)
    elif ranks.first:
        tree_file.unlink(missing_ok=True)
    # The same on all machines, whatever their BLAS rounds to.
    ranks.share_file(tree_file, 0)
    ranks.wait()
    files = make_shards(
        out / "routes",
        ranks,
        route_shard,
        _shards(len(vectors), ROUTED, folder),
        {"tree": fingerprint(tree_file), "windows": len(vectors)},
        desc="route",
        unit=" windows",
    )
    if not ranks.first:
        return
    save_pieces(out / "paths.npy", map(np.load, files))
    paths = load_mapped(out / "paths.npy")
    for level, clusters in enumerate(np.cumprod(branching), 1):
        sizes = np.bincount(paths[:, level - 1], minlength=clusters)
        print(
            f"tree level {level}: {clusters} clusters of {sizes.min()} to {sizes.max()} windows, "
            f"mean {sizes.mean():.0f}, {np.sum(sizes == 0)} empty"
        )
    for name in ("vectors", "routes"):
        shutil.rmtree(out / name)
    print(f"tree: {len(paths)} windows routed, in {out}")
