"""The tree stage: windows to vectors, vectors to a cluster tree, each window to its cluster path.

Encoding is the long part, so vectors go to a mapped file as they come and a rerun goes on there.
"""

import json
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from mlx_hmem.retriever import ClusterTree, Encoder, load_encoder
from train.recipe import Recipe
from train.tokenizer import load_tokenizer
from train.windows import Windows, load_windows, save_array

CHUNK = 1024


def encode_windows(windows: Windows, folder: Path, encoder: Encoder) -> np.ndarray:
    """Vectors of all windows, (n, dim) float16, mapped from tree/vectors.npy."""
    path, marker = folder / "tree" / "vectors.npy", folder / "tree" / "encoded.json"
    identity = {"encoder": encoder.fingerprint, "windows": len(windows)}
    count = 0
    if marker.exists() and path.exists():
        found = json.loads(marker.read_text())
        if all(found.get(key) == value for key, value in identity.items()):
            count = found["count"]
    shape = (len(windows), encoder.dim)
    if count:
        vectors = np.lib.format.open_memmap(path, mode="r+")
    else:
        vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
    texts = windows.texts(load_tokenizer(folder), first=count)
    with tqdm(total=len(windows), initial=count, desc="encode", unit=" windows") as progress:
        while chunk := list(islice(texts, CHUNK)):
            vectors[count : count + len(chunk)] = encoder.encode(chunk)
            vectors.flush()
            count += len(chunk)
            write_atomic(marker, json.dumps({**identity, "count": count}))
            progress.update(len(chunk))
    return vectors


def distinct(vectors: np.ndarray) -> np.ndarray:
    """Each vector once: a text repeated hundreds of times would bend the tree to itself, and its
    prompts would then route elsewhere than the text does."""
    rows = np.ascontiguousarray(vectors)
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first = np.unique(keys, return_index=True)
    return rows[np.sort(first)]


def run_tree(recipe: Recipe, folder: Path) -> None:
    """Writes ``tree/``: vectors.npy, tree.safetensors and paths.npy (windows, depth) int32."""
    out, branching = folder / "tree", recipe.tree.branching
    windows = load_windows(folder)
    encoder = load_encoder(recipe.tree.encoder)
    vectors = encode_windows(windows, folder, encoder).astype(np.float32)
    if len(vectors) < np.prod(branching):
        raise UserError(
            "fewer windows than clusters",
            f"{len(vectors)} windows, branching {branching}",
            "take more documents or a smaller tree.branching",
        )
    tree = ClusterTree.fit(distinct(vectors), branching=branching, seed=recipe.seed, progress=True)
    paths = tree.route_batch(vectors)
    tree.save(out / "tree.safetensors", encoder.fingerprint)
    save_array(out / "paths.npy", paths.astype(np.int32))
    for level, clusters in enumerate(np.cumprod(branching), 1):
        sizes = np.bincount(paths[:, level - 1], minlength=clusters)
        print(
            f"tree level {level}: {clusters} clusters of {sizes.min()} to {sizes.max()} windows, "
            f"mean {sizes.mean():.0f}, {np.sum(sizes == 0)} empty"
        )
    print(f"tree: {len(paths)} windows routed, in {out}")
