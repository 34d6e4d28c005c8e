"""What a model knows of documents that it has remembered, against LoRA and retrieval, in one run.

``python -m benchmarks.remember --corpus CORPUS --work FOLDER [--json]``

Articles of the corpus whose ids have the largest md5, where a recipe that samples takes those with
the smallest; none about a person, whose year of birth the demo may have been told. Of each, some
sentences are taken out for the perplexity before ``train remember`` sees it: those that it holds
out itself have chosen when it stops. A fact is a year in a sentence that was trained on: the
sentence up to the year is given, and the greedy continuation has to be the year.

LoRA is mlx-lm's on all layers of the anchor, with as many optimiser steps on batches of the same
size of the same text, packed without regard to clusters; the best of some learning rates by the
held-out sentences counts, which favours it. Retrieval puts the nearest window (by the encoder that
also routes) in front of the question, within the context of the anchor alone.
"""

import heapq
import json
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.utils import linear_to_lora_layers
from tqdm import tqdm

from benchmarks.common.counting import returned, timed
from benchmarks.common.show import Result, benchmark
from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.scoring import Candidate, continue_greedily, score_candidates
from mlx_hmem.model.load import DEMO, load
from mlx_hmem.model.model import MemoryModel
from train.corpus.cleaning import clean, cut
from train.corpus.files import Faults
from train.corpus.readers import corpus_files, documents_of
from train.corpus.sample import hashes
from train.data.order import Stream
from train.data.sequences import pack_anchor
from train.remember.blocks import results_of
from train.remember.command import main as remember
from train.remember.command import text_of
from train.remember.export import open_base
from train.remember.forget import forget
from train.remember.run import OwnText, Settings
from train.remember.run import documents_of as documents_of_run
from train.remember.text import OwnDocument, hold_out, sentences
from train.step.gradient import packed_mask
from train.step.loss import masked_loss

YEAR = re.compile(r"\b(1[0-9]{3}|20[01][0-9])\b")
PERSON = re.compile(r"\bborn\b|\([^)]*\d{4}[^)]*[–-]")
PREFIX_SHARE = 0.6  # of the context, for what retrieval puts in front


class Question(NamedTuple):
    """What is given and what is asked for; of a held-out sentence nothing is given."""

    document: int
    given: str
    asked: str


class Arm(NamedTuple):
    """A model with the memory that it uses; ``prefix`` gives what stands before a question."""

    model: MemoryModel
    memory: str
    prefix: Callable[[str], str] | None = None


def choose_articles(corpus: Path, count: int, characters: int) -> list[tuple[str, str]]:
    """(title, text) of the articles with the largest md5, the largest first."""
    found = (
        (hashes(name)[0], title, text)
        for file in corpus_files(corpus)
        for name, title, text in documents_of(file, Faults())
        if len(text) >= 600 and not PERSON.search(text[:300])
    )
    return [(t, cut(clean(text), characters)) for _, t, text in heapq.nlargest(count, found)]


def write_articles(articles: Sequence[tuple[str, str]], folder: Path) -> list[Question]:
    """Writes each without some of its sentences, which come back."""
    folder.mkdir(parents=True, exist_ok=True)
    taken = []
    for number, (title, text) in enumerate(articles):
        name = re.sub(r"[^A-Za-z0-9]+", "-", title)[:40]
        kept, out = hold_out(OwnDocument(f"test {title}", title, text))
        (folder / f"{number:04d}-{name}.txt").write_text(kept, encoding="utf-8")
        taken += [Question(number, "", sentence.text) for sentence in out]
    return taken


def facts_of(documents: Sequence[OwnDocument]) -> list[Question]:
    """The first year of each document that a sentence leads up to."""
    facts = []
    for number, document in enumerate(documents):
        kept, _ = hold_out(document)
        for start, end in sentences(kept):
            found = YEAR.search(kept, start, end)
            if found and found.start() - start >= 30:
                facts.append(Question(number, kept[start : found.start()].strip(), found.group()))
                break
    return facts


def _context(arm: Arm, question: Question) -> list[int]:
    """The ids that are given, the beginning of a text first."""
    ids: list[int] = arm.model.tokenizer.encode(question.given)
    if arm.prefix is None:
        return ids
    front = arm.model.tokenizer.encode(arm.prefix(question.given or question.asked) + "\n")
    most = int(PREFIX_SHARE * (arm.model.context or 2048))
    return front[:most] + ids[1:]


def _paths(arm: Arm, questions: Sequence[Question]) -> list[tuple[int, ...]] | None:
    """Routed by what is given; of a held-out sentence by itself, as perplexity is."""
    if arm.memory != "fetched":
        return None
    return [arm.model.route(q.given or q.asked)[1] for q in questions]


def interval(right: np.ndarray) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion."""
    n, p, z = len(right), float(right.mean()), 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def recall(arm: Arm, questions: Sequence[Question]) -> dict[str, Any]:
    """Of how many questions the year is what follows."""
    right = np.zeros(len(questions), bool)
    prompts = [_context(arm, q) for q in questions]
    for batch in continue_greedily(arm.model, prompts, 8, arm.memory, _paths(arm, questions)):
        for i, tokens in batch:
            said = arm.model.tokenizer.decode(tokens).strip()
            right[i] = re.match(rf"{questions[i].asked}(?!\d)", said) is not None
    return {"facts": len(right), "recalled": int(right.sum()), "interval": interval(right)}


def figures(arm: Arm, held: Sequence[Question], facts: Sequence[Question]) -> dict[str, Any]:
    """The perplexity of the held-out sentences, and the facts."""
    nats, tokens, most, rows = 0.0, 0, arm.model.context or 2048, []
    for question in held:
        context, ids = _context(arm, question), arm.model.tokenizer.encode(question.asked)[1:]
        rows.append([Candidate(context, ids[: most - len(context)])])
    for batch in score_candidates(arm.model, rows, arm.memory, _paths(arm, held)):
        for _, (score,) in batch:
            nats, tokens = nats + score.nats, tokens + score.tokens
    perplexity = math.exp(nats / tokens) if tokens else math.nan
    return {"held_out_perplexity": perplexity, "held_out_tokens": tokens, **recall(arm, facts)}


def train_lora(
    folder: Path, text: OwnText, settings: Settings, steps: int, rank: int, rate: float, rows: Path
) -> nn.Module:
    """The anchor with mlx-lm's LoRA after so many steps on the same text."""
    anchor, _ = load_anchor(folder)
    anchor.freeze()
    mx.random.seed(0)
    # mlx-lm's own scale and dropout.
    linear_to_lora_layers(anchor, len(anchor.layers), {"rank": rank, "scale": 20.0, "dropout": 0.0})
    tokens, size = pack_anchor(text.windows, settings.context, 0, rows), 8
    eot, stream = settings.begin[0], Stream(len(tokens), 0)
    masked = settings.training["document_mask"]
    optimiser: Any = optim.AdamW(learning_rate=optim.linear_schedule(0, rate, 10))

    def loss(model: Any, batch: mx.array) -> mx.array:
        inputs = batch[:, :-1]
        logits = model(inputs, mask=packed_mask(inputs, eot)) if masked else model(inputs)
        return masked_loss(logits, batch, eot)

    step = nn.value_and_grad(anchor, loss)
    for number in tqdm(range(steps), desc=f"LoRA, {rate:g}", unit=" steps", delay=2):
        batch = mx.array(tokens[stream.numbers(number * size, size)].astype(np.int32))
        _, gradient = step(anchor, batch)
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimiser.update(anchor, gradient)
        mx.eval(anchor.parameters(), optimiser.state)
    return anchor


def retrieval(model: MemoryModel, text: OwnText) -> Callable[[str], str]:
    """The nearest window of the documents to a question."""
    assert model.retriever is not None
    encoder, tokenizer = model.retriever.encoder, model.tokenizer
    texts = list(text.windows.texts(tokenizer))
    vectors = encoder.encode(texts)
    return lambda question: texts[int((vectors @ encoder.encode([question])[0]).argmax())]


def measure(
    *,
    corpus: Path,
    work: Path,
    model: Path = DEMO,
    articles: int = 300,
    characters: int = 2000,
    passes: int | None = None,
    forget: int = 20,
    lora_rank: int = 8,
    lora_rates: Sequence[float] = (1e-4, 3e-4, 1e-3),
) -> Result:
    """In ``work``, a new folder: ``articles`` of ``characters`` at most, in so many ``passes``; so
    many to ``forget``, or 0."""
    if work.exists():
        raise UserError("the folder exists", work, "give a new one: its times are measured")
    chosen = choose_articles(corpus, articles + forget, characters)
    held = write_articles(chosen[:articles], work / "documents")
    write_articles(chosen[articles:], work / "control")
    out, run = work / "model", work / "model.run"
    options = [] if passes is None else ["--passes", str(passes)]
    command = [str(work / "documents"), "--model", str(model), "--out", str(out), *options]
    seconds = timed(lambda: remember(command)).ms / 1e3
    settings, documents = Settings.load(run), documents_of_run(run)
    text, _ = text_of(open_base(str(model)), documents)
    facts = facts_of(documents)
    numbers = sorted(int(folder.name) for folder in (run / "subtrees").iterdir())
    steps = sum(result["steps"] for result in results_of(run, numbers))
    after, before = load(out), load(model)
    arms = {"anchor": Arm(after, "none"), "remembered": Arm(after, "fetched")}
    if before.bank is not None:
        arms["memory it had"] = Arm(before, "fetched")
    arms["retrieval"] = Arm(after, "none", retrieval(after, text))
    rows = {name: figures(arm, held, facts) for name, arm in arms.items()}
    for rate in lora_rates:
        given = (out, text, settings, steps, lora_rank, rate, work / "rows.npy")
        anchor, took = returned(partial(train_lora, *given))
        arm = Arm(MemoryModel(anchor, after.anchor_config, after.tokenizer), "none")
        rows[f"LoRA, {rate:g}"] = {**figures(arm, held, facts), "seconds": took.ms / 1e3}
    result: Result = {
        "articles": len(documents),
        "tokens": len(text.windows.tokens),
        "steps": steps,
        "seconds": seconds,
        "arms": rows,
    }
    return result | (measure_forget(out, run, documents, facts, forget) if forget else {})


def measure_forget(
    out: Path, run: Path, documents: list[OwnDocument], facts: list[Question], count: int
) -> dict[str, Any]:
    """Forgets ``count`` documents, and asks for the facts of these and of all others."""
    gone = {d.sha256 for d in documents[:count]}  # by hash, so they are anywhere in the tree
    less = out.with_name("less")
    control = out.with_name("control")
    seconds = timed(lambda: forget(out, sorted(gone), [run], less, control)).ms
    result: Result = json.loads((Path(f"{less}.run") / "forgotten.json").read_text())
    for name in ("forgotten", "control"):
        del result[name]["documents"]
    rows = {}
    for when, folder in (("before", out), ("after", less)):
        arm = Arm(load(folder), "fetched")
        for name, those in (("forgotten", True), ("others", False)):
            asked = [q for q in facts if (documents[q.document].sha256 in gone) is those]
            rows[f"{name}, {when}"] = recall(arm, asked) if asked else {}
    return {"seconds_to_forget": seconds / 1e3, **result, "facts": rows}


if __name__ == "__main__":
    benchmark(__doc__, measure)
