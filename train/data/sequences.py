"""Windows packed into rows of context + 1 tokens: inputs ``row[:-1]``, targets ``row[1:]``.

Each row begins with the last token of the row before, so that every token is a target once. A
window may be cut by a row's border; the cut-off part then lacks its beginning, which costs less
than padding. The last row is padded with the end of text: the loss ignores positions where input
and target are both that token. Rows have the type of the windows' tokens.

Rows are shuffled by writing each where it will be, so that neither windows nor rows need be in
memory.
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..ranks import ALONE, Ranks
from ..recipe.recipe import Recipe
from .arrays import load_mapped, new_array, save_array
from .buckets import decompose_shard, join_pieces, padding_of
from .tokenizer import begin_of
from .windows import Windows, cut_shard, join_windows, load_windows, shard_documents

ROWS = 1 << 12  # packed at a time


def _num_rows(num_tokens: int, context: int) -> int:
    return max(1, -(-(num_tokens - 1) // context))


def _rows(windows: Windows, order: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """The windows in this order as rows, (n, context + 1), up to ``ROWS`` at a time."""
    sizes = windows.offsets[order + 1] - windows.offsets[order]
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    for first in range(0, _num_rows(total, context), ROWS):
        count = min(ROWS, _num_rows(total, context) - first)
        start, end = first * context, (first + count) * context + 1
        chosen = slice(
            int(np.searchsorted(ends, start, "right")), int(np.searchsorted(ends, end, "left")) + 1
        )
        flat = np.concatenate([windows[i] for i in order[chosen]])
        before = int(ends[chosen][0] - sizes[chosen][0])
        flat = flat[start - before : end - before]
        padded = np.full(count * context + 1, windows.begin[0], dtype=flat.dtype)
        padded[: len(flat)] = flat
        yield padded[(np.arange(count) * context)[:, None] + np.arange(context + 1)]


def _pack(
    windows: Windows,
    groups: Sequence[np.ndarray],
    context: int,
    path: Path,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Packs each group of windows by itself, and shuffles all rows. Returns them, (n, context + 1)
    mapped from ``path``, and the number of each row's group, (n,)."""
    sizes = np.diff(windows.offsets)
    counts = [_num_rows(int(sizes[group].sum()), context) for group in groups]
    shuffle = random.permutation(sum(counts))
    places = np.argsort(shuffle)
    at, shape = 0, (len(shuffle), context + 1)
    with (
        new_array(path, windows.tokens.dtype, shape) as rows,
        tqdm(total=len(shuffle), desc="packing", unit=" rows", delay=2) as bar,
    ):
        for group in groups:
            for part in _rows(windows, group, context):
                rows[places[at : at + len(part)]] = part
                at += len(part)
                bar.update(len(part))
    return load_mapped(path), np.repeat(np.arange(len(groups)), counts)[shuffle]


def pack_anchor(windows: Windows, context: int, seed: int, path: Path) -> np.ndarray:
    """All windows, shuffled, as rows (n, context + 1), shuffled too, saved at ``path``."""
    random = np.random.default_rng([seed, 1])
    return _pack(windows, [random.permutation(len(windows))], context, path, random)[0]


def pack_by_leaf(
    windows: Windows, paths: np.ndarray, context: int, seed: int, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that hold windows of one leaf only (paper, section 5), shuffled globally.

    ``paths`` (windows, depth) is each window's cluster path. Returns rows (n, context + 1), saved
    at ``path``, and the cluster path of each row, (n, depth) int32.
    """
    random = np.random.default_rng([seed, 2])
    order = random.permutation(len(windows))
    order = order[np.argsort(paths[order, -1], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(paths[order, -1])) + 1)
    rows, of_group = _pack(windows, groups, context, path, random)
    first = np.array([group[0] for group in groups])
    return rows, paths[first[of_group]].astype(np.int32)


def run_anchor_sequences(recipe: Recipe, folder: Path, ranks: Ranks = ALONE) -> None:
    """Writes ``anchor-sequences/tokens.npy``, (n, context + 1). A longer context than that of the
    memories, or fewer facts, need windows of their own. Decomposed: ``tokens-LENGTH.npy`` for each
    length."""
    out, context = folder / "anchor-sequences", recipe.windows.of_anchor
    files, shards, times = list[Path](), out / "shards", recipe.corpus.anchor_times or 1
    if recipe.windows.decompose or times > 1 or context != recipe.windows.context:
        work = decompose_shard if recipe.windows.decompose else cut_shard
        files = shard_documents(folder, context, work, shards, ranks, "documents", times)
    if not ranks.first:
        return
    if recipe.windows.decompose:
        buckets = join_pieces(files, out, context)
        each = ", ".join(f"{count} of {length}" for length, count in buckets.counts.items())
        padding = padding_of(buckets.pieces.values(), begin_of(folder)[0])
        print(f"anchor-sequences: {each} tokens, {padding:.1%} padding, in {out}")
    else:
        windows = join_windows(files, shards, begin_of(folder)) if files else load_windows(folder)
        rows = pack_anchor(windows, context, recipe.seed, out / "tokens.npy")
        print(f"anchor-sequences: {len(rows)} rows of {rows.shape[1]} tokens, in {out}")
    shutil.rmtree(shards, ignore_errors=True)


def run_sequences(recipe: Recipe, folder: Path) -> None:
    """Writes ``sequences/``: tokens.npy (n, context + 1) and paths.npy (n, depth) int32."""
    out, context = folder / "sequences", recipe.windows.context
    paths, windows = load_mapped(folder / "tree" / "paths.npy"), load_windows(folder)
    rows, row_paths = pack_by_leaf(windows, paths, context, recipe.seed, out / "tokens.npy")
    save_array(out / "paths.npy", row_paths)
    print(
        f"sequences: {len(rows)} rows of {rows.shape[1]} tokens in "
        f"{len(np.unique(row_paths[:, -1]))} leaves, "
        f"{padding_of([rows], windows.begin[0]):.1%} padding, in {out}"
    )
