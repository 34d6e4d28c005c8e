"""Moves the centroids of a cluster tree so that a prompt goes where the text is that answers it.

k-means sees whole windows; a prompt is a sentence or the beginning of one, and its vector often
lies beyond a border. So every window is asked for by pieces of itself, half of them whole sentences
and half beginnings, and the centroids of every node move until the pieces descend to the window's
leaf. At each node that is soft learning vector quantisation (Seo and Obermayer, Neural Computation
15, 2003) with one prototype a child: the cross-entropy of a softmax over -SHARPNESS / 2 · |x - c|².
The windows themselves take part as often as their pieces, which keeps most of them where they were.

What comes out is an ordinary tree, with the file and the descent of any other. The paper's is that
of k-means alone.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from tqdm import tqdm

from mlx_hmem.retriever import ClusterTree

from ..corpus.cleaning import BETWEEN_SENTENCES

SHARPNESS = 20.0  # vectors have length 1
LEARNING_RATE = 5e-4
BATCH = 512
CHUNK = 1 << 12  # windows whose pieces are in memory at a time
MOST_WINDOWS = 512  # for each leaf: bounds the time
SHORTEST = 4  # words of a beginning


def prompt_of(text: str, random: np.random.Generator) -> str:
    """A sentence of ``text`` or, as often, the beginning of one."""
    sentences = [s for s in BETWEEN_SENTENCES.split(text.strip()) if len(s.split()) >= SHORTEST]
    if not sentences:
        return text
    sentence = sentences[random.integers(len(sentences))]
    words = sentence.split()
    if random.random() < 0.5:
        return sentence
    return " ".join(words[: random.integers(SHORTEST, len(words) + 1)])


def move_to_prompts(
    tree: ClusterTree,
    vectors: np.ndarray,
    rows: np.ndarray,
    texts: Callable[[np.ndarray], list[str]],
    encode: Callable[[list[str]], np.ndarray],
    prompts: int,
    seed: int,
) -> ClusterTree:
    """The tree with its centroids moved.

    Args:
        vectors: of all windows, (n, dim).
        rows: the numbers of those that the tree was fitted to.
        texts: from numbers of windows to their texts.
        encode: from texts to vectors, (n, dim).
        prompts: how many pieces are drawn of each of ``rows``, or of a draw of ``MOST_WINDOWS`` of
            them for each leaf.
        seed: of these draws; the same arguments give the same tree.
    """
    random = np.random.default_rng([seed, 5])
    most = min(len(rows), MOST_WINDOWS * tree.num_clusters[-1])
    chosen = np.sort(random.choice(rows, most, replace=False))
    paths = _paths(tree, vectors, chosen)
    steps = prompts * -(-2 * most // BATCH)
    optimizer = optim.Adam(optim.cosine_decay(LEARNING_RATE, steps))
    used = [mx.array(counts > 0) for counts in tree.counts]
    loss = mx.value_and_grad(lambda c, x, p: _loss(c, used, tree.branching, x, p))
    centroids = {str(n): mx.array(np.asarray(level)) for n, level in enumerate(tree.centroids)}
    with tqdm(total=prompts * most, desc="prompts", unit=" windows") as bar:
        for _ in range(prompts):
            order = random.permutation(most)
            for part in np.array_split(order, -(-most // CHUNK)):
                pieces = encode([prompt_of(text, random) for text in texts(chosen[part])])
                x = np.concatenate([vectors[chosen[part]], pieces]).astype(np.float32)
                wanted = np.concatenate([paths[part], paths[part]])
                for batch in np.array_split(random.permutation(len(x)), -(-len(x) // BATCH)):
                    value, gradients = loss(centroids, mx.array(x[batch]), mx.array(wanted[batch]))
                    centroids = optimizer.apply_gradients(gradients, centroids)
                    mx.eval(centroids, optimizer.state)
                bar.set_postfix_str(f"loss {value.item():.3f}", refresh=False)
                bar.update(len(part))
    levels = [np.array(centroids[str(level)]) for level in range(tree.depth)]
    moved = ClusterTree(tree.branching, levels, tree.counts, tree.seed)
    paths = _paths(moved, vectors, rows)
    moved.counts = [
        np.bincount(paths[:, level], minlength=size) for level, size in enumerate(tree.num_clusters)
    ]
    return moved


def _loss(
    centroids: dict[str, mx.array],
    used: list[mx.array],
    branching: tuple[int, ...],
    x: mx.array,
    paths: mx.array,
) -> mx.array:
    """Of the vectors ``x`` (n, dim) at every node on the way to their leaf, summed over levels."""
    total = mx.array(0.0)
    parent = mx.zeros(len(x), mx.int32)
    for level, k in enumerate(branching):
        children = centroids[str(level)].reshape(-1, k, x.shape[-1])[parent]
        scores = (children @ x[:, :, None]).squeeze(-1) - children.square().sum(-1) / 2
        scores = mx.where(used[level].reshape(-1, k)[parent], SHARPNESS * scores, -mx.inf)
        path = paths[:, level]
        total = total + nn.losses.cross_entropy(scores, path % k, reduction="mean")
        parent = path
    return total


def _paths(tree: ClusterTree, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Of the windows ``rows``, (n, depth) int32, without a copy of all their vectors."""
    parts = np.array_split(rows, -(-len(rows) // CHUNK))
    return np.concatenate([tree.route_batch(vectors[part]) for part in parts])
