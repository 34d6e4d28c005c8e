"""How routes follow a conversation, and what a history under an earlier memory costs.

``python -m benchmarks.conversation FILE.jsonl.gz [--model DIR] [--tree FILE.jsonl.gz] [--json]``

Conversations are made of articles: four topics of four turns, each turn
a sentence of the article for the person and the next one as the answer. The *right* path of a topic
is that of its eight sentences together. *flaps* is the share of turns within a topic that change
the path, *at once* the share of first turns on a new topic that are on its right path, *right* the
share of all turns that are. Routed are the demo's tree, or one of 16 x 16 x 16 clusters that is
fitted to the articles of ``--tree`` with the static encoder.

*In the cache* is the share of the blocks that a change of path asks for that have been fetched
before or read ahead, with a cache that holds all.

With ``--facts elements.json`` (a list of objects with ``name`` and ``number``) also: of how many
elements the model gives the atomic number, four in each conversation after four sentences of an
article, where each turn is a text of its own and where the turns before stand before it.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from benchmarks.common.counting import machine
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.evaluate.texts import read_texts
from mlx_hmem.generation.conversation import MARGIN, WEIGHT, WINDOW, Conversation
from mlx_hmem.model.load import DEMO, load
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import ClusterTree, Retriever, load_encoder
from mlx_hmem.retriever.steady import likely_paths, steady_route

TOPICS, TURNS, SENTENCES = 4, 4, 8
LENGTH = 96  # tokens of a history, and of what follows it
SETTINGS = [  # weight of the turn, words of the window, margin
    (1.0, WINDOW, 0.0),
    (WEIGHT, WINDOW, 0.0),
    (1.0, WINDOW, MARGIN),
    (WEIGHT, WINDOW, 0.05),
    (WEIGHT, WINDOW, MARGIN),
    (WEIGHT, WINDOW, 0.15),
    (0.5, WINDOW, MARGIN),
    (WEIGHT, 128, MARGIN),
]


def articles(path: Path, most: int) -> list[list[str]]:
    """The first sentences of those articles that have enough of them."""
    found = []
    for text in read_texts(path):
        sentences = re.split(r"(?<=[.!?]) +", text.replace("\n", " "))
        chosen = [s for s in sentences if 20 < len(s) < 300][:SENTENCES]
        if len(chosen) == SENTENCES:
            found.append(chosen)
    # A file may be in an order of its own.
    order = np.random.default_rng(0).permutation(len(found))[:most]
    return [found[i] for i in order]


def routes(retriever: Retriever, texts: list[list[str]], setting: tuple[float, int, float]) -> Any:
    """Shares over all turns, per level."""
    weight, window, margin = setting
    tree, encoder = retriever.tree, retriever.encoder
    right = retriever.route_many([" ".join(t) for t in texts])
    own = encoder.encode([t[2 * k] for t in texts for k in range(TURNS)])
    said = [" ".join(words) for words in _said(texts, window)]
    vectors = weight * own + (1 - weight) * encoder.encode(said)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flaps, at_once, correct = [], [], []
    path: ClusterPath | None = None
    for number, vector in enumerate(vectors):
        article, turn = divmod(number, TURNS)
        if turn == 0 and article % TOPICS == 0:
            path = None
        new = steady_route(tree, vector, path, margin)
        hit = np.equal(new, right[article])
        correct.append(hit)
        if path is not None and turn:
            flaps.append(np.not_equal(new, path))
        elif path is not None:
            at_once.append(hit)
        path = new
    shares = {"flaps": flaps, "at_once": at_once, "right": correct}
    found = {name: np.mean(each, axis=0).round(3).tolist() for name, each in shares.items()}
    return {"weight": weight, "window": window, "margin": margin, **found}


def _said(texts: list[list[str]], window: int) -> Iterator[list[str]]:
    """The last words of the conversation at each turn, the turn's own among them."""
    words: list[str] = []
    for number, sentences in enumerate(texts):
        words = words if number % TOPICS else []
        for turn in range(TURNS):
            words = (words + sentences[2 * turn].split())[-window:]
            yield words
            words = words + sentences[2 * turn + 1].split()


def ahead(retriever: Retriever, texts: list[list[str]], most: int) -> float:
    """The share of newly needed blocks that are in the cache, ``most`` paths being read ahead."""
    tree, encoder = retriever.tree, retriever.encoder
    own = encoder.encode([t[2 * k] for t in texts for k in range(TURNS)])
    around = encoder.encode([" ".join(words) for words in _said(texts, WINDOW)])
    vectors = WEIGHT * own + (1 - WEIGHT) * around
    needed = there = 0
    path: ClusterPath | None = None
    cache: set[tuple[int, int]] = set()
    for number, vector in enumerate(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)):
        if number % (TOPICS * TURNS) == 0:
            path, cache = None, set()
        before, path = path, steady_route(tree, vector, path, MARGIN)
        blocks = set(enumerate(path, 1))
        if before is not None:
            new = blocks - set(enumerate(before, 1))
            needed, there = needed + len(new), there + len(new & cache)
        cache |= blocks
        for other in likely_paths(tree, vector, path, most):
            cache |= set(enumerate(other, 1))
    return round(there / needed, 3)


def histories(model: MemoryModel, texts: Sequence[list[str]], repeats: int) -> dict[str, Any]:
    """Perplexity of what follows a history: computed under its own memory, or anew."""

    def ids_of(sentences: list[str]) -> list[int]:
        return list(model.tokenizer.encode(" ".join(sentences)))

    assert model.retriever is not None
    long = [t for t in texts if len(ids_of(t)) > LENGTH + 1][: repeats + 1]
    paths = model.retriever.route_many([" ".join(t) for t in long])
    losses: dict[str, list[float]] = {"kept": [], "anew": [], "no_history": []}
    divergence, passes, turns = [], [], []
    for number in tqdm(range(len(long) - 1), desc="histories"):
        history, text = ids_of(long[number])[:LENGTH], ids_of(long[number + 1])[:LENGTH]
        old, new = paths[number], paths[number + 1]
        if old[0] == new[0]:
            continue
        found = {}
        for name, path in (("kept", old), ("anew", new), ("no_history", None)):
            cache = make_prompt_cache(model.anchor)
            start = time.perf_counter()
            if path is not None:
                model(mx.array([history]), paths=[path], cache=cache)
                mx.eval([layer.state for layer in cache])
            between = time.perf_counter()
            logits = model(mx.array([text[:-1]]), paths=[new], cache=cache)[0]
            scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            mx.eval(scores)
            if name == "anew":
                passes.append(between - start)
                turns.append(time.perf_counter() - between)
            chosen = mx.take_along_axis(scores, mx.array(text[1:])[:, None], axis=1)
            losses[name].append(float(-chosen.mean()))
            found[name] = scores
        gap = mx.exp(found["anew"]) * (found["anew"] - found["kept"])
        divergence.append(float(gap.sum(-1).mean()))
    difference = np.subtract(losses["kept"], losses["anew"])
    return {
        "pairs": len(difference),
        "perplexity": {name: round(float(np.exp(np.mean(x))), 3) for name, x in losses.items()},
        "kept_minus_anew_nll": round(float(difference.mean()), 4),
        "standard_error": round(float(difference.std(ddof=1) / len(difference) ** 0.5), 4),
        "divergence": round(float(np.mean(divergence)), 4),
        "history_pass_of_turn": round(float(np.median(np.divide(passes, turns))), 2),
    }


def facts(model: MemoryModel, path: Path, texts: list[list[str]]) -> dict[str, int]:
    """How many atomic numbers are right, by what stands before the question."""
    elements = [e for e in json.loads(path.read_text()) if e["number"] <= 108]
    order = np.random.default_rng(0).permutation(len(elements))
    found = {"asked": len(elements), "alone": 0, "in_a_conversation": 0, "after_three": 0}
    for group in tqdm(np.array_split(order, len(elements) // 4), desc="facts"):
        mixed = Conversation(model, max_tokens=8, prefetch=False, history=False)
        joined = Conversation(model, max_tokens=8, prefetch=False, history=True)
        for sentence in texts[group[0]][:TURNS]:
            for _ in mixed.say(sentence):
                pass
        for index in group:
            name, number = elements[index]["name"].lower(), elements[index]["number"]
            question = f"The atomic number of {name} is"
            streams = {
                "alone": model.stream(question, max_tokens=8),
                "in_a_conversation": mixed.say(question),
                "after_three": joined.say(question),
            }
            for kind, pieces in streams.items():
                answer = "".join(piece.text for piece in pieces)
                found[kind] += answer.strip().rstrip(".") == str(number)
    return found


def replacing(repeats: int) -> dict[str, float]:
    """ms to have 18.9M parameters joined when the last quarter of the rows is new."""
    shape, rows = (24, 3, 256, 1024), (128, 64, 64)
    blocks = [mx.zeros((*shape[:2], r, shape[3]), mx.bfloat16) + r for r in rows]
    mx.eval(blocks)
    layers = [mx.concatenate([b[n] for b in blocks], axis=1) for n in range(shape[0])]
    mx.eval(layers)
    start_row, times = mx.array([sum(rows[:2])]), {"join": [0.0], "replace": [0.0]}
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval([mx.concatenate([b[n] for b in blocks], axis=1) for n in range(shape[0])])
        times["join"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for n in range(shape[0]):
            layers[n] = mx.slice_update(layers[n], blocks[2][n], start_row, axes=[1])
        mx.eval(layers)
        times["replace"].append(time.perf_counter() - start)
    return {name: round(float(np.median(found[1:])) * 1e3, 2) for name, found in times.items()}


def run(args: argparse.Namespace) -> dict[str, Any]:
    model = load(args.model)
    texts = articles(args.file, args.articles)
    if len(texts) < 2 * TOPICS:
        raise UserError("too few articles", f"{len(texts)} with {SENTENCES} sentences", "give more")
    assert model.retriever is not None
    retriever = model.retriever
    if args.tree is not None:
        encoder = load_encoder("static")
        fit = [" ".join(sentences[:6]) for sentences in articles(args.tree, 20_000)]
        vectors = encoder.encode(fit, progress=True)
        retriever = Retriever(encoder, ClusterTree.fit(vectors, branching=16, depth=3))
    result: dict[str, Any] = machine() | {
        "turns": len(texts) * TURNS,
        "clusters": list(retriever.tree.num_clusters),
        "routes": [routes(retriever, texts, setting) for setting in tqdm(SETTINGS, desc="routes")],
        "in_the_cache": {str(most): ahead(retriever, texts, most) for most in (0, 4, 8, 16, 32)},
    }
    if args.tree is None:
        result["histories"] = histories(model, texts, args.repeats)
        result["replacing_ms"] = replacing(9)
    if args.facts is not None:
        result["facts"] = facts(model, args.facts, texts)
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    print(f"{result['turns']} turns, clusters {result['clusters']}; shares per level")
    for row in result["routes"]:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    for name in ("in_the_cache", "histories", "replacing_ms", "facts"):
        if name in result:
            print(f"{name}: {result[name]}")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="articles, one JSON object with `text` a line")
    parser.add_argument("--model", type=Path, default=DEMO, help="default: the demo")
    parser.add_argument("--tree", type=Path, help="articles to fit a larger tree to")
    parser.add_argument("--facts", type=Path, help="elements, a JSON list")
    parser.add_argument("--articles", type=int, default=1200, help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = run(args)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    run_program(main)
