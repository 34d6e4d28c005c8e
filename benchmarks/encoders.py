"""``python -m benchmarks.encoders --corpus FOLDER [--json]``: the static encoder against MiniLM.

Size, speed on the same texts, and how often both choose the same cluster on each level of a tree
fitted to MiniLM's vectors, for articles that the distillation never saw: means over trees of
several seeds. Also how often the start of an article, or a prompt about it, lands in the cluster of
the whole, as routing by prompt needs. MiniLM takes nearly all of the time: five minutes on a core.
"""

import json
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.retriever import ClusterTree
from mlx_hmem.retriever.encoder import STATIC_FOLDER, Encoder, find_minilm, load_encoder
from mlx_hmem.retriever.minilm import FILES
from train.corpus.cleaning import clean
from train.tree.static_encoder import NOUNS, PROMPTS, is_held_out, read_articles, sentences

BRANCHING = (16, 16)
TREES = 5
WORDS = 200  # of a document
TIMED = {"prompts": 256, "documents": 48}
Article = tuple[str, str]


def draw_articles(corpus: Path, documents: int, seed: int) -> tuple[list[Article], list[Article]]:
    """(title, start of the text) of articles to fit trees on, and of a third as many held out."""
    seen: list[Article] = []
    unseen: list[Article] = []
    for name, title, text in read_articles([corpus]):
        if len(sentences(text)) > 1:
            (unseen if is_held_out(name) else seen).append((title, text))
    rng = random.Random(seed)
    if min(len(seen), 3 * len(unseen)) < documents:
        raise UserError("the corpus is too small", len(seen), f"use --documents below {documents}")
    seen, unseen = rng.sample(seen, documents), rng.sample(unseen, documents // 3)
    start, held_out = (
        [(title, " ".join(clean(text).split()[:WORDS])) for title, text in articles]
        for articles in (seen, unseen)
    )
    return start, held_out


def seconds(encoder: Encoder, texts: Sequence[str]) -> float:
    start = time.perf_counter()
    encoder.encode(texts)
    return time.perf_counter() - start


def speed(texts: Sequence[str], minilm: Encoder) -> dict[str, float]:
    """Texts a second. The static encoder's cold figure is that of a fresh one, whose cache of words
    is empty; the median of five."""
    minilm.encode(texts[:8])
    slow = seconds(minilm, texts)
    static = [load_encoder("static") for _ in range(5)]
    for encoder in static:
        encoder.encode(["warm up"])
    cold = float(np.median([seconds(encoder, texts) for encoder in static]))
    warm = float(np.median([seconds(encoder, texts) for encoder in static]))
    rates = {"minilm": slow, "static_cold": cold, "static_warm": warm}
    result = {f"{name}_texts_per_s": len(texts) / value for name, value in rates.items()}
    return result | {"ratio_cold": slow / cold, "ratio_warm": slow / warm}


def agreement(
    trees: Sequence[ClusterTree], first: np.ndarray, second: np.ndarray
) -> list[list[float]]:
    """On each level, the share of rows that both route to the same cluster, for each tree."""
    same = [(tree.route_batch(first) == tree.route_batch(second)).mean(axis=0) for tree in trees]
    shares: list[list[float]] = np.stack(same, axis=1).tolist()
    return shares


def measure(corpus: Path, documents: int, seed: int) -> dict[str, Any]:
    fitted, held_out = draw_articles(corpus, documents, seed)
    rng = random.Random(seed)
    texts = {
        "documents": [text for _, text in held_out],
        "first_sentences": [sentences(text)[0] for _, text in held_out],
        "prompts": [
            rng.choice(PROMPTS).format(title=title, noun=rng.choice(NOUNS)) for title, _ in held_out
        ],
    }
    minilm, static = load_encoder("minilm"), load_encoder("static")
    rates = {kind: speed(texts[kind][:count], minilm) for kind, count in TIMED.items()}

    starts = [text for _, text in fitted]
    vectors, seeds = minilm.encode(starts, progress=True), range(seed, seed + TREES)
    trees = [ClusterTree.fit(vectors, branching=BRANCHING, seed=s) for s in seeds]
    vectors = static.encode(starts)
    own = [ClusterTree.fit(vectors, branching=BRANCHING, seed=s) for s in seeds]
    slow = {kind: minilm.encode(t, progress=True) for kind, t in texts.items()}
    fast = {kind: static.encode(t) for kind, t in texts.items()}
    whole = "documents"
    return {
        "size_bytes": {
            "minilm": sum((find_minilm() / file).stat().st_size for file in FILES),
            "static": sum(file.stat().st_size for file in STATIC_FOLDER.iterdir()),
        },
        "speed": rates,
        "documents_fitted": len(fitted),
        "documents_held_out": len(held_out),
        "cosine": {k: float((slow[k] * fast[k]).sum(axis=1).mean()) for k in texts},
        "same_cluster_as_minilm": {k: agreement(trees, slow[k], fast[k]) for k in texts},
        "same_cluster_as_whole_document": {
            kind: {
                "minilm": agreement(trees, slow[whole], slow[kind]),
                "static": agreement(own, fast[whole], fast[kind]),
            }
            for kind in texts
            if kind != whole
        },
    }


def show(result: dict[str, Any]) -> None:
    def percent(levels: Sequence[Sequence[float]]) -> str:
        means = [100 * float(np.mean(shares)) for shares in levels]
        first = [100 * share for share in levels[0]]
        return f"{means[0]:5.1f} % ({min(first):.1f} to {max(first):.1f}) {means[1]:5.1f} %"

    sizes = result["size_bytes"]
    print(f"size: MiniLM {sizes['minilm'] / 1e6:.1f} MB, static {sizes['static'] / 1e6:.1f} MB")
    for kind, rates in result["speed"].items():
        print(
            f"{kind}: MiniLM {rates['minilm_texts_per_s']:.0f} texts/s, "
            f"static {rates['static_cold_texts_per_s']:.0f} ({rates['ratio_cold']:.0f} x), "
            f"with its words cached {rates['static_warm_texts_per_s']:.0f} "
            f"({rates['ratio_warm']:.0f} x)"
        )
    print(
        f"{TREES} trees of {BRANCHING} fitted to {result['documents_fitted']} articles; "
        f"{result['documents_held_out']} held-out articles; mean share on level 1 (least and most) "
        "and on level 2"
    )
    for kind, shares in result["same_cluster_as_minilm"].items():
        cosine = result["cosine"][kind]
        print(f"static chooses MiniLM's cluster, {kind:16}{percent(shares)}  (cosine {cosine:.3f})")
    for kind, encoders in result["same_cluster_as_whole_document"].items():
        for name, shares in encoders.items():
            print(f"{name}: {kind} in the document's own cluster {percent(shares)}")


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.encoders", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl[.gz] files")
    parser.add_argument("--documents", type=int, default=1500, help="articles to fit the trees on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args()
    if args.documents < 64:
        raise UserError("--documents is too small", args.documents, "use 64 or more")
    result = measure(args.corpus, args.documents, args.seed)
    if args.json:
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        show(result)


if __name__ == "__main__":
    run_program(main)
