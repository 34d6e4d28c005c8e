"""A tree whose centroids are moved by prompts: what it is for, its loss, what stays as it was."""

from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.retriever import ClusterTree, load_encoder
from train.corpus.facts import make_facts
from train.tree.prompts import SHARPNESS, _loss, move_to_prompts, prompt_of

FACTS = {
    "kind": "invented", "topics": 32, "entities_per_topic": 30, "frequencies": [1],
    "filler_sentences": 1, "plain_documents": 1000,
}  # fmt: skip
BRANCHING = (12, 3)


@pytest.fixture(scope="module")
def moved():
    """(encode, fitted tree, moved tree, statements of other facts and their prompts, vectors)."""
    encoder = load_encoder("static")
    documents, facts = make_facts(FACTS, seed=0)
    texts = [document["text"] for document in documents]
    statements = {f"{fact.prompt} {fact.answer}.": fact.prompt for fact in facts}
    others = {s: p for s, p in statements.items() if sum(s.encode()) % 5 == 0}
    unseen = [(text, others[s]) for s in others for text in texts if s in text]
    own = [text for text in texts if text not in dict(unseen)]
    vectors = encoder.encode(own).astype(np.float16)
    tree = ClusterTree.fit(vectors, BRANCHING, seed=0)
    rows = np.arange(len(own))
    result = move(tree, vectors, rows, own, encoder.encode)
    return encoder.encode, tree, result, unseen, vectors


def move(tree, vectors, rows, texts, encode):
    def texts_of(numbers):
        return [texts[n] for n in numbers]

    return move_to_prompts(tree, vectors, rows, texts_of, encode, prompts=8, seed=0)


def test_prompts_of_unseen_texts_go_where_the_texts_go_and_most_else_stays(moved):
    encode, tree, result, unseen, _ = moved
    texts, prompts = (encode(list(part)) for part in zip(*unseen, strict=True))
    before, after = (
        np.mean(t.route_batch(texts)[:, -1] == t.route_batch(prompts)[:, -1])
        for t in (tree, result)
    )
    print(f"{len(unseen)} prompts: {before:.3f} by k-means, {after:.3f} moved")
    assert 1 - after < 0.5 * (1 - before)
    _, tree, result, _, vectors = moved
    assert np.mean(tree.route_batch(vectors) == result.route_batch(vectors)) > 0.9


def test_counts_are_those_of_the_moved_tree_and_its_file_is_that_of_any_tree(moved, tmp_path):
    _, _, result, _, vectors = moved
    paths = result.route_batch(vectors)
    for level, size in enumerate(result.num_clusters):
        assert (
            result.counts[level].tolist() == np.bincount(paths[:, level], minlength=size).tolist()
        )
    result.save(tmp_path / "tree.safetensors", "xxh3:0")
    loaded = ClusterTree.load(tmp_path / "tree.safetensors")
    assert (loaded.route_batch(vectors) == paths).all()


def test_the_loss_is_the_cross_entropy_of_the_distances_at_every_node(moved):
    _, tree, _, _, vectors = moved
    tree = deepcopy(tree)
    x = vectors[:40].astype(np.float32)
    paths = tree.route_batch(x)
    free = next(n for n in range(tree.num_clusters[1]) if n not in paths[:, 1])
    tree.counts[1][free] = 0  # a cluster without examples takes no part
    wanted = 0.0
    for vector, path in zip(x.astype(np.float64), paths, strict=True):
        parent = 0
        for level, cluster in enumerate(path):
            distances = np.array(
                [
                    ((vector - tree.centroids[level][c]) ** 2).sum()
                    for c in tree.children(level, parent)
                ]
            )
            own = ((vector - tree.centroids[level][cluster]) ** 2).sum()
            wanted += SHARPNESS / 2 * own + np.log(np.exp(-SHARPNESS / 2 * distances).sum())
            parent = int(cluster)
    centroids = {str(level): mx.array(c) for level, c in enumerate(tree.centroids)}
    used = [mx.array(counts > 0) for counts in tree.counts]
    found = _loss(centroids, used, tree.branching, mx.array(x), mx.array(paths))
    assert found.item() == pytest.approx(wanted / len(x), rel=1e-4)


def test_the_same_seed_moves_to_the_same_bits_and_empty_clusters_stay_empty(moved):
    encode, tree, _, _, vectors = moved
    tree = deepcopy(tree)
    tree.counts[1][5] = 0
    texts = ["A lighthouse stands by the sea. It is old and white.", "One word"] * len(vectors)
    first, second = (move(tree, vectors, np.arange(60), texts, encode) for _ in range(2))
    for a, b in zip(first.centroids, second.centroids, strict=True):
        assert a.tobytes() == b.tobytes()
    assert first.counts[1][5] == 0
    assert first.counts[0].sum() == 60


def test_a_prompt_is_a_sentence_or_the_beginning_of_one():
    random = np.random.default_rng(0)
    text = "The lamp is red. No. It hangs over the old door!\nNobody lights it now, they say."
    drawn = {prompt_of(text, random) for _ in range(300)}
    sentences = (
        "The lamp is red.", "It hangs over the old door!", "Nobody lights it now, they say.",
    )  # fmt: skip
    assert set(sentences) <= drawn
    assert all(any(s.startswith(d) for s in sentences) and len(d.split()) >= 4 for d in drawn)
    assert "It hangs over the" in drawn
    assert prompt_of("Two words", random) == "Two words"
