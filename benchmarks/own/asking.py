"""Whether questions find their documents, and those about nothing that was said find none.

``python -m benchmarks.own.asking [--contexts CONTEXTS.jsonl …] [--general QUESTIONS.jsonl]``

No memory is trained: routes follow from documents, encoder and tree. The invented documents have
names, and the questions about nothing differ from theirs in the name alone. ``--contexts`` are
paragraphs with questions of people, ``Context: …\\nQuestion: …\\nAnswer:`` in each line; 12 or 120
of them are remembered, and 60 questions on the others are about nothing. ``--general`` is general
knowledge, in the same layout without the context.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common.show import Result, benchmark
from mlx_hmem.generation.passages import passages_of
from mlx_hmem.model.load import DEMO, load
from mlx_hmem.retriever import ClusterTree, Encoder, Retriever, load_encoder
from mlx_hmem.retriever.words import NEAR, WordIndex, words_of
from train.remember.export import joined_tree

from .documents import WAYS, make_documents
from .kinds import KINDS

WINDOWS_IN_LEAF = 12  # as remember plans it; a document is a window
NEVER = 60  # questions about what was never said
# That say nothing by themselves.
BARE = ("And where?", "When was it built?", "Tell me more about it.", "Who was that?", "Why so?")


class Asked(NamedTuple):
    """Documents; questions by the way of asking, each with the number of its document; questions on
    a document after one that names it, which say "it", with the last words; the same of ``BARE``
    ones; what is asked ``before`` one about nothing; questions about nothing."""

    texts: list[str]
    questions: dict[str, list[tuple[int, str]]]
    follow: list[tuple[int, str, str]]
    bare: list[tuple[int, str, str]]
    before: str
    never: list[str]


def invented(count: int, seed: int) -> Asked:
    documents, questions = make_documents(count, seed)
    ways = {way: [(q.document, q.prompts[way]) for q in questions] for way in WAYS}
    follow, bare = [], []
    for first, then in zip(questions[::5], questions[1::5], strict=True):
        title, asked = documents[first.document].title, then.prompts["question"]
        asked = asked.replace(title, "it").replace(title[0].lower() + title[1:], "it")
        said = f"{first.prompts['question']} {first.answer}"
        follow.append((first.document, asked, f"{said} {asked}"))
        bare += [(first.document, each, f"{said} {each}") for each in BARE]
    said, common = " ".join(d.text for d in documents), {w for k in KINDS for w in k.title.split()}
    foreign, about = make_documents(3 * NEVER, seed + 100)
    names = [set(document.title.split()) - common for document in foreign]
    others = [
        q.prompts["question"] for q in about if not any(name in said for name in names[q.document])
    ]
    order = np.random.default_rng(seed).permutation(len(others))[:NEVER]
    before = f"{questions[0].prompts['question']} {questions[0].answer}"
    texts = [document.text for document in documents]
    return Asked(texts, ways, follow, bare, before, [others[i] for i in order])


def of_people(path: Path, count: int, seed: int) -> Asked:
    found: dict[str, list[str]] = {}
    for line in path.read_text().strip().split("\n"):
        context, asked = json.loads(line)["context"].rsplit("\nQuestion: ", 1)
        found.setdefault(context, []).append(asked.removesuffix("\nAnswer:"))
    texts = [*found]
    order = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
    own, rest = order[:count], order[count:]
    questions = [(n, asked) for n, text in enumerate(own) for asked in found[text]]
    never = [asked for text in rest for asked in found[text]][:NEVER]
    own = [text.removeprefix("Context: ") for text in own]
    return Asked(own, {"question": questions}, [], [], questions[0][1], never)


def retriever_of(
    encoder: Encoder, texts: Sequence[str], old: ClusterTree | None
) -> tuple[Retriever, list[tuple[int, ...]]]:
    """A retriever that knows the texts, in clusters behind those of ``old``, and their leaves."""
    vectors = encoder.encode(texts)
    leaves = max(2, -(-len(texts) // WINDOWS_IN_LEAF))
    if old is not None:
        branching = (max(2, -(-leaves // old.branching[1])), old.branching[1])
    else:
        branching = (round((2 * leaves) ** 0.5), -(-leaves // round((2 * leaves) ** 0.5)))
    tree = ClusterTree.fit(vectors, branching if min(branching) > 1 else (leaves,), seed=0)
    first = np.cumprod((old.branching[0] if old else 0, *tree.branching[1:]))
    paths = [tuple(path) for path in (tree.route_batch(vectors) + first).tolist()]
    words = [" ".join(words_of(encoder.tokenizer, text)) for text in texts]
    taught = list(zip(paths, words, strict=True))
    return Retriever(encoder, joined_tree(old, tree), taught), paths


def measured(asked: Asked, encoder: Encoder, old: ClusterTree, general: list[str]) -> Result:
    """Shares, in per cent, and of 60 questions about nothing the number that found something."""
    result: Result = {}
    for place, tree in (("", None), (" beside the demo", old)):
        retriever, leaves = retriever_of(encoder, asked.texts, tree)
        for way, questions in asked.questions.items():
            vectors = encoder.encode([text for _, text in questions])
            nearest = [tuple(path) for path in retriever.tree.route_batch(vectors).tolist()]
            near = [retriever.near(text) for _, text in questions]
            right = [leaves[n] for n, _ in questions]
            pairs = zip(near, right, strict=True)
            result[f"{way}{place}: nearest centroid"] = 100 * np.mean(
                [path == leaf for path, leaf in zip(nearest, right, strict=True)]
            )
            result[f"{way}{place}: words"] = 100 * np.mean(
                [found is not None and found.path == leaf for found, leaf in pairs]
            )
    for name, turns in (("said of it", asked.follow), ("and where?", asked.bare)):
        found = [(retriever.near(t, window), leaves[n]) for n, t, window in turns]
        if found:
            result[f"{name}, after a question"] = 100 * np.mean(
                [near is not None and near.path == leaf for near, leaf in found]
            )
    for name, texts in (("never said", asked.never), ("general", general[:NEVER])):
        windows = [f"{asked.before} {text}" for text in texts]
        later = [retriever.near(*pair) for pair in zip(texts, windows, strict=True)]
        result[f"{name}, of {len(texts)}"] = sum(retriever.near(t) is not None for t in texts)
        result[f"{name}, after a question"] = sum(near is not None for near in later)
    return result | passages(asked, encoder)


def passages(asked: Asked, encoder: Encoder) -> Result:
    """How often the nearest passage, by words or by the encoder, is of the right document."""
    pairs = [(n, part) for n, text in enumerate(asked.texts) for part in passages_of(text)]
    index = WordIndex(encoder.tokenizer, [words_of(encoder.tokenizer, text) for _, text in pairs])
    questions = asked.questions["question"]
    vectors = encoder.encode([text for _, text in pairs])
    near = encoder.encode([text for _, text in questions]) @ vectors.T
    words = [index.covered(text) for _, text in questions]
    right = [n for n, _ in questions]
    return {
        f"passage by {name}": 100
        * np.mean([pairs[int(s.argmax())][0] == n for s, n in zip(scores, right, strict=True)])
        for name, scores in (("words", words), ("encoder", near))
    } | {"passage shown": 100 * np.mean([scores.max() >= NEAR for scores in words])}


def measure(
    contexts: Sequence[Path] = (), general: Path | None = None, encoder: str = "static"
) -> Result:
    lines = [] if general is None else general.read_text().strip().split("\n")
    texts = [json.loads(line)["context"] for line in lines]
    known = [t.removeprefix("Question: ").removesuffix("\nAnswer:") for t in texts]
    chosen, old = load_encoder(encoder), load(DEMO).require_retriever().tree
    made = {f"invented {n}": [invented(n, seed) for seed in (1, 2, 3)] for n in (12, 100, 400)}
    for path in contexts:
        for n in (12, 120):
            made[f"{path.stem} {n}"] = [of_people(path, n, seed) for seed in (1, 2, 3)]
    rows = {}
    for name, sets in made.items():
        results = [measured(asked, chosen, old, known) for asked in sets]
        rows[name] = {key: float(np.mean([r[key] for r in results])) for key in results[0]}
    return {"encoder": encoder, "asking": rows}


if __name__ == "__main__":
    benchmark(__doc__, measure)
