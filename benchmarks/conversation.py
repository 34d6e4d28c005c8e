"""How routes follow a conversation, and what a history under an earlier memory costs.

``python -m benchmarks.conversation FILE.jsonl.gz [--model DIR] [--tree FILE.jsonl.gz] [--json]``

Conversations are made of articles: four topics of four turns, each turn
a sentence of the article for the person and the next one as the answer. The *right* path of a topic
is that of its eight sentences together. *flaps* is the share of turns within a topic that change
the path, *at once* the share of first turns on a new topic that are on its right path, *right* the
share of all turns that are. Routed are the demo's tree, or one of 16 x 16 x 16 clusters that is
fitted to the articles of ``--tree`` with the static encoder.

*In the cache* is the share of the blocks that a change of path asks for that have been fetched
before or read ahead, with caches (the bank's, the system's) that hold all.

With ``--facts elements.json`` (a list of objects with ``name`` and ``number``) also: of how many
elements the model gives the atomic number, four in each conversation after four sentences of an
article, where each turn is a text of its own and where the turns before stand before it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from benchmarks.common.counting import Timed, in_turns, returned, timed
from benchmarks.common.show import Result, benchmark
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.texts import read_texts
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.generation.topic import MARGIN, WEIGHT, WINDOW
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


def read_articles(path: Path, most: int) -> list[list[str]]:
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


def turns(
    retriever: Retriever, texts: list[list[str]], weight: float, window: int, margin: float
) -> Iterator[tuple[int, np.ndarray, ClusterPath | None, ClusterPath]]:
    """Of each turn its number, its vector, the path before it, None where a conversation begins,
    and its own."""
    own = retriever.encoder.encode([t[2 * k] for t in texts for k in range(TURNS)])
    said = [" ".join(words) for words in _said(texts, window)]
    vectors = weight * own + (1 - weight) * retriever.encoder.encode(said)
    path: ClusterPath | None = None
    for number, vector in enumerate(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)):
        before = path if number % (TOPICS * TURNS) else None
        path = steady_route(retriever.tree, vector, before, margin)
        yield number, vector, before, path


def _said(texts: list[list[str]], window: int) -> Iterator[list[str]]:
    """The last words of the conversation at each turn, the turn's own among them."""
    words: list[str] = []
    for number, sentences in enumerate(texts):
        words = words if number % TOPICS else []
        for turn in range(TURNS):
            words = (words + sentences[2 * turn].split())[-window:]
            yield words
            words = words + sentences[2 * turn + 1].split()


def routes(retriever: Retriever, texts: list[list[str]], setting: tuple[float, int, float]) -> Any:
    """Shares over all turns, per level."""
    right = retriever.route_many([" ".join(t) for t in texts])
    shares: dict[str, list[np.ndarray]] = {"flaps": [], "at_once": [], "right": []}
    for number, _, before, path in turns(retriever, texts, *setting):
        shares["right"].append(np.equal(path, right[number // TURNS]))
        if before is not None and number % TURNS:
            shares["flaps"].append(np.not_equal(path, before))
        elif before is not None:
            shares["at_once"].append(shares["right"][-1])
    return {name: np.mean(each, axis=0).tolist() for name, each in shares.items()}


def ahead(retriever: Retriever, texts: list[list[str]], most: int) -> float:
    """The share of newly needed blocks that are in the cache, ``most`` paths being read ahead."""
    needed = there = 0
    cache: set[tuple[int, int]] = set()
    for _, vector, before, path in turns(retriever, texts, WEIGHT, WINDOW, MARGIN):
        cache = cache if before is not None else set()
        new = set(enumerate(path, 1)) - set(enumerate(before or path, 1))
        needed, there = needed + len(new), there + len(new & cache)
        for other in (path, *likely_paths(retriever.tree, vector, path, most)):
            cache |= set(enumerate(other, 1))
    return there / needed


def histories(model: MemoryModel, texts: Sequence[list[str]], repeats: int) -> dict[str, Any]:
    """Perplexity of what follows a history: computed under its own memory, or anew."""

    def ids_of(sentences: list[str]) -> list[int]:
        return list(model.tokenizer.encode(" ".join(sentences)))

    def read(ids: list[int], path: ClusterPath, cache: Any, scored: bool) -> mx.array:
        logits = model(mx.array([ids]), paths=[path], cache=cache)[0]
        scores = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(scores if scored else [layer.state for layer in cache])
        return scores

    assert model.retriever is not None
    long = [t for t in texts if len(ids_of(t)) > LENGTH + 1][: repeats + 1]
    paths = model.retriever.route_many([" ".join(t) for t in long])
    losses: dict[str, list[float]] = {"kept": [], "anew": [], "no_history": []}
    divergence, passes = [], []
    for number in tqdm(range(len(long) - 1), desc="histories"):
        history, text = ids_of(long[number])[:LENGTH], ids_of(long[number + 1])[:LENGTH]
        old, new = paths[number], paths[number + 1]
        if old[0] == new[0]:
            continue
        found = {}
        for name, path in (("kept", old), ("anew", new), ("no_history", None)):
            cache: Any = make_prompt_cache(model.anchor)
            before = timed(partial(read, history, path, cache, False)) if path else Timed(0, 0)
            found[name], after = returned(partial(read, text[:-1], new, cache, True))
            if name == "anew":
                passes.append(before.ms / after.ms)
            target = mx.array(text[1:])
            losses[name].append(float(nn.losses.nll_loss(found[name], target, reduction="mean")))
        gap = nn.losses.kl_div_loss(found["kept"], found["anew"], reduction="mean")
        divergence.append(float(gap))
    difference = np.subtract(losses["kept"], losses["anew"])
    return {
        "pairs": len(difference),
        "perplexity": {name: float(np.exp(np.mean(x))) for name, x in losses.items()},
        "kept_minus_anew_nll": float(difference.mean()),
        "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        "divergence": mean(divergence),
        "history_pass_of_turn": median(passes),
    }


def recalled(model: MemoryModel, path: Path, texts: list[list[str]]) -> dict[str, int]:
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
    start = mx.array([sum(rows[:2])])

    def joined() -> list[mx.array]:
        return [mx.concatenate([b[n] for b in blocks], axis=1) for n in range(shape[0])]

    def replace() -> None:
        for n in range(shape[0]):
            layers[n] = mx.slice_update(layers[n], blocks[2][n], start, axes=[1])
        mx.eval(layers)

    mx.eval(blocks, layers := joined())
    contenders = {
        "join": lambda _: timed(lambda: mx.eval(joined())),
        "replace": lambda _: timed(replace),
    }
    found = in_turns(contenders, repeats, "replacing")
    return {name: median(t.ms for t in times) for name, times in found.items()}


def measure(
    file: Path,
    model: Path = DEMO,
    tree: Path | None = None,
    facts: Path | None = None,
    articles: int = 1200,
    repeats: int = 200,
) -> Result:
    whole, texts = load(model), read_articles(file, articles)
    if len(texts) < 2 * TOPICS:
        raise UserError("too few articles", f"{len(texts)} with {SENTENCES} sentences", "give more")
    assert whole.retriever is not None
    retriever = whole.retriever
    if tree is not None:
        encoder = load_encoder("static")
        fit = [" ".join(sentences[:6]) for sentences in read_articles(tree, 20_000)]
        vectors = encoder.encode(fit, progress=True)
        retriever = Retriever(encoder, ClusterTree.fit(vectors, branching=16, depth=3))
    result: Result = {
        "turns": len(texts) * TURNS,
        "clusters": list(retriever.tree.num_clusters),
        "shares per level": {
            "weight {}, window {}, margin {}".format(*setting): routes(retriever, texts, setting)
            for setting in tqdm(SETTINGS, desc="routes")
        },
        "in_the_cache": {str(most): ahead(retriever, texts, most) for most in (0, 4, 8, 16, 32)},
    }
    if tree is None:
        result |= histories(whole, texts, repeats)
        result["replacing_ms"] = replacing(9)
    if facts is not None:
        result["facts"] = recalled(whole, facts, texts)
    return result


if __name__ == "__main__":
    benchmark(__doc__, measure)
