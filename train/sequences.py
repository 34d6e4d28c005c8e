"""Windows packed into rows of context + 1 tokens: inputs ``row[:-1]``, targets ``row[1:]``.

Each row begins with the last token of the row before, so that every token is a target once. A
window may be cut by a row's border; the cut-off part then lacks its beginning, which costs less
than padding. The last row is padded with the end of text: the loss ignores positions where input
and target are both that token. Rows have the type of the windows' tokens.
"""

from pathlib import Path

import numpy as np

from train.buckets import Buckets, decompose
from train.recipe import Recipe
from train.windows import Windows, counted, load_windows, save_array, windows_of_run

WHOLE = 1 << 40  # tokens, more than a document has: its one window is all of it


def pack(windows: Windows, order: np.ndarray, context: int) -> np.ndarray:
    """The windows in this order as rows, (n, context + 1)."""
    flat = np.concatenate([windows[i] for i in order])
    num_rows = max(1, -(-(len(flat) - 1) // context))
    padded = np.full(num_rows * context + 1, windows.begin[0], dtype=flat.dtype)
    padded[: len(flat)] = flat
    starts = np.arange(num_rows) * context
    return padded[starts[:, None] + np.arange(context + 1)]


def pack_anchor(windows: Windows, context: int, seed: int) -> np.ndarray:
    """All windows, shuffled, as rows (n, context + 1), shuffled too."""
    random = np.random.default_rng([seed, 1])
    rows = pack(windows, random.permutation(len(windows)), context)
    return random.permutation(rows)


def pack_by_leaf(
    windows: Windows, paths: np.ndarray, context: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that hold windows of one leaf only (paper, section 5), shuffled globally.

    ``paths`` (windows, depth) is each window's cluster path. Returns rows (n, context + 1)
    and the cluster path of each row, (n, depth) int32.
    """
    random = np.random.default_rng([seed, 2])
    order = random.permutation(len(windows))
    order = order[np.argsort(paths[order, -1], kind="stable")]
    borders = np.flatnonzero(np.diff(paths[order, -1])) + 1
    rows, row_paths = [], []
    for members in np.split(order, borders):
        packed = pack(windows, members, context)
        rows.append(packed)
        row_paths.append(np.repeat(paths[members[:1]], len(packed), axis=0))
    shuffle = random.permutation(sum(len(r) for r in rows))
    return np.concatenate(rows)[shuffle], np.concatenate(row_paths)[shuffle].astype(np.int32)


def run_anchor_sequences(recipe: Recipe, folder: Path) -> None:
    """Writes ``anchor-sequences/tokens.npy``, (n, context + 1). A longer context than that of the
    memories needs windows of its own. Decomposed: ``tokens-LENGTH.npy`` for each length."""
    out, context = folder / "anchor-sequences", recipe.windows.of_anchor
    if recipe.windows.decompose:
        documents = windows_of_run(folder, WHOLE)
        buckets = Buckets(decompose(documents, context))
        buckets.save(out)
        each = ", ".join(f"{count} of {length}" for length, count in buckets.counts.items())
        padding = buckets.padding(documents.begin[0])
        print(f"anchor-sequences: {each} tokens, {padding:.1%} padding, in {out}")
        return
    if context == recipe.windows.context:
        windows = load_windows(folder)
    else:
        windows = windows_of_run(folder, context)
    rows = pack_anchor(windows, context, recipe.seed)
    save_array(out / "tokens.npy", rows)
    print(f"anchor-sequences: {len(rows)} rows of {rows.shape[1]} tokens, in {out}")


def run_sequences(recipe: Recipe, folder: Path) -> None:
    """Writes ``sequences/``: tokens.npy (n, context + 1) and paths.npy (n, depth) int32."""
    out = folder / "sequences"
    paths = np.load(folder / "tree" / "paths.npy")
    windows = load_windows(folder)
    rows, row_paths = pack_by_leaf(windows, paths, recipe.windows.context, recipe.seed)
    save_array(out / "tokens.npy", rows)
    save_array(out / "paths.npy", row_paths)
    padding = 1 - float(np.mean(counted(rows, windows.begin[0])))
    print(
        f"sequences: {len(rows)} rows of {rows.shape[1]} tokens in "
        f"{len(np.unique(row_paths[:, -1]))} leaves, {padding:.1%} padding, in {out}"
    )
