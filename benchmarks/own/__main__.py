"""What a model knows of documents that it has remembered, against everything else, in one run.

``python -m benchmarks.own MODEL --work FOLDER [--json]``

Invented documents of five facts each are remembered. Each fact is then asked for in the document's
own words, in another wording and as a question; an answer counts if the first line of 24 likeliest
tokens says it. Beside the memory: the anchor alone, the document in its prompt, the passage that
``--with-passages 1`` puts there, passage and memory, and mlx-lm's LoRA of as many parameters in as
many steps on the same rows, all documents together.
``--corpus`` adds the perplexity of text that has nothing to do with them, ``--forget`` what is left
after so many of the documents are forgotten; ``--clusters`` side by side in place of the tree
that the plan would have. A run that was stopped goes on in the same folder.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from tqdm import tqdm

from benchmarks.common.counting import timed
from benchmarks.common.show import Result, benchmark
from benchmarks.own.documents import WAYS, Document, Question, is_right, make_documents
from mlx_hmem.anchors.load import load_anchor, num_embedded
from mlx_hmem.documents.files import Faults
from mlx_hmem.evaluate.perplexity import document_losses
from mlx_hmem.evaluate.scoring import continue_greedily
from mlx_hmem.folders import whole_folder
from mlx_hmem.generation.passages import Passages
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel
from train.corpus.readers import corpus_files, documents_of
from train.loop.loop import learning_rate_at
from train.recipe.recipe import TrainerConfig
from train.remember import plan
from train.remember.command import main as remember
from train.remember.export import open_base, text_of
from train.remember.forget import forget as forget_documents
from train.remember.rows import Passes, Rows
from train.remember.run import Settings
from train.remember.run import documents_of as documents_of_run
from train.step.candidates import Counting, candidates_for, counted_loss, counting_of
from train.step.gradient import fitting_parts
from train.step.loss import chunk_size

TOKENS = 24  # of an answer
UNRELATED, CHARACTERS = 8, 1000  # articles, and of each


class Arm(NamedTuple):
    """A model with the memory that it uses; ``before`` is what stands in front of a prompt."""

    model: MemoryModel
    memory: str
    before: Callable[[Question, str], str] = lambda question, prompt: ""


def prompt_of(question: Question, way: str) -> str:
    asked = question.prompts[way]
    return f"Question: {asked}\nAnswer:" if way == "question" else asked


def recall(arm: Arm, questions: Sequence[Question]) -> dict[str, int]:
    """How many of the questions are answered rightly in each way of asking."""
    model, found = arm.model, dict.fromkeys(WAYS, 0)
    for way in WAYS:
        prompts = [prompt_of(q, way) for q in questions]
        texts = [arm.before(q, p) + p for q, p in zip(questions, prompts, strict=True)]
        paths = [near(arm, p) for p in prompts]
        for path in dict.fromkeys(paths):  # one memory for all rows of a batch
            own = [i for i, each in enumerate(paths) if each == path]
            ids = [model.tokenizer.encode(texts[i]) for i in own]
            given = ("none", None) if path is None else ("fetched", [path] * len(own))
            for batch in continue_greedily(model, ids, TOKENS, *given):
                for place, tokens in batch:
                    answer = questions[own[place]].answer
                    found[way] += is_right(model.tokenizer.decode(tokens), answer)
    return found


def near(arm: Arm, text: str) -> Any:
    """The path of the memory that a text fetches; None for none."""
    return arm.model.require_banks().route(text)[1] if arm.memory == "fetched" else None


def perplexity_of(arm: Arm, texts: Sequence[str]) -> float:
    """Over all texts, each with the memory that it fetches."""
    nats = tokens = 0.0
    for text in texts:
        memory = "none" if near(arm, text) is None else "fetched"
        losses = document_losses(arm.model, [text], memory, progress=False)
        nats, tokens = nats + losses.nats.sum(), tokens + losses.tokens.sum()
    return math.exp(nats / tokens)


def unrelated(corpus: Path) -> list[str]:
    """The beginnings of the first articles of a corpus."""
    files, texts = corpus_files(corpus), list[str]()
    for _, _, text in documents_of(files[0], Faults()):
        if len(text) >= CHARACTERS:
            texts.append(text[:CHARACTERS])
        if len(texts) == UNRELATED:
            break
    return texts


def train_lora(model: Path, rows: Rows, passes: Passes, settings: Settings, rate: float) -> Any:
    """The anchor with mlx-lm's LoRA of about as many parameters as a fetched memory, on the same
    rows, and how many it has."""
    anchor, _ = load_anchor(model)
    anchor.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(anchor, len(anchor.layers), {"rank": 1, "scale": 20.0, "dropout": 0.0})
    leaves: Any = tree_flatten(anchor.trainable_parameters())
    a_rank = sum(array.size for _, array in leaves)
    rank = max(1, round(settings.memory.fetched_parameters / a_rank))
    anchor, _ = load_anchor(model)
    anchor.freeze()
    linear_to_lora_layers(anchor, len(anchor.layers), {"rank": rank, "scale": 20.0, "dropout": 0.0})
    training = TrainerConfig.from_dict(
        settings.training | {"learning_rate": rate, "final_learning_rate": rate / 10}
    )
    optimiser: Any = optim.AdamW(rate, [training.beta1, training.beta2], weight_decay=1e-3)
    text = [rows.tokens.windows[number] for number in range(rows.windows)]
    candidates = candidates_for(anchor, text, rows.tokens.windows.tokens)
    chunk = chunk_size(num_embedded(anchor))

    def loss(model: Any, batch: mx.array, counting: Counting, all_counted: mx.array) -> mx.array:
        total, _ = counted_loss(model, model.model(batch[:, :-1]), counting, chunk)
        return total / all_counted

    step = nn.value_and_grad(anchor, loss)
    for number in tqdm(range(passes.num_steps), desc=f"LoRA, {rate:g}", unit=" steps", delay=2):
        chosen, gradient = passes.rows(number), None
        rng = np.random.default_rng([0, number])
        drawn = None if candidates is None else candidates.draw(rng)
        counted = mx.array(int((rows.lengths - rows.given)[chosen].sum()))
        for part, length in fitting_parts(rows.lengths[chosen], settings.part_tokens):
            own = chosen[part]
            tokens, at = rows.tokens[own][:, : length + 1], np.arange(1, length + 1)
            counts = (at >= rows.given[own, None]) & (at < rows.lengths[own, None])
            counting = counting_of(tokens, counts, chunk, drawn)
            _, more = step(anchor, mx.array(tokens.astype(np.int32)), counting, counted)
            gradient = more if gradient is None else tree_map(mx.add, gradient, more)
            mx.eval(gradient)
        gradient, _ = optim.clip_grad_norm(gradient, training.grad_clip)
        optimiser.learning_rate = learning_rate_at(number, passes.num_steps, training)
        optimiser.update(anchor, gradient)
        mx.eval(anchor.parameters(), optimiser.state)
    return anchor, rank


def write_documents(documents: Sequence[Document], folder: Path) -> None:
    if folder.exists():  # written again they would be other files to a run that goes on
        return
    with whole_folder(folder) as part:
        for document in documents:
            (part / f"{document.title}.txt").write_text(document.text, encoding="utf-8")


def measure(
    model: Path,
    *,
    work: Path,
    documents: int = 12,
    ask: int = 0,
    seed: int = 1,
    passes: int = 0,
    lora_rates: Sequence[float] = (),
    corpus: Path | None = None,
    forget: int = 0,
    clusters: int = 0,
) -> Result:
    """In ``work``: so many ``documents`` of this ``seed``, ``passes`` over them, those of the plan
    unless it is said; ``ask``: about how many of the questions are asked, all unless it is said."""
    texts, questions = make_documents(documents, seed)
    if ask:  # no multiple of five, or all would be about the same kind of fact
        step = len(questions) // ask
        questions = questions[:: step + (step % 5 == 0)]
    write_documents(texts, work / "documents")
    out, run = work / "model", work / "model.run"
    command = [str(work / "documents"), "--model", str(model), "--out", str(out)]
    command += ["--passes", str(passes)] if passes else []
    with patch.object(plan, "branching_for", lambda *_: (clusters,)) if clusters else nullcontext():
        seconds = timed(lambda: remember(command)).ms / 1e3
    after, settings = load(out), Settings.load(run)
    nearest = Passages(run, after).nearest

    def passage(question: Question, prompt: str) -> str:
        return "".join(f"{p.text}\n\n" for p in nearest(prompt, 1))

    arms = {
        "anchor alone": Arm(after, "none"),
        "document in the prompt": Arm(
            after, "none", lambda q, prompt: texts[q.document].text + "\n\n"
        ),
        "nearest passage in the prompt": Arm(after, "none", passage),
        "memory": Arm(after, "fetched"),
        "memory and passage": Arm(after, "fetched", passage),
    }
    text, tokenizer = text_of(open_base(str(model)), documents_of_run(run))
    anywhere = np.zeros((len(text.windows), settings.memory.num_levels), np.int32)
    rows = Rows.of(text, np.arange(len(text.windows)), anywhere, settings, tokenizer, 0)
    whole = Passes(rows, settings, 0)
    for rate in lora_rates:
        lora = train_lora(model, rows, whole, settings, rate)
        name = f"LoRA of rank {lora[1]}, {rate:g}"
        arms[name] = Arm(MemoryModel(lora[0], after.anchor_config, after.tokenizer), "none")
    other = unrelated(corpus) if corpus else []
    table: dict[str, dict[str, Any]] = {}
    for name, arm in arms.items():
        table[name] = dict(recall(arm, questions))
        if "prompt" in name:
            table[name]["own words"] = None  # they stand in it
        elif other:
            table[name]["unrelated text"] = perplexity_of(arm, other)
        print(name, table[name], file=sys.stderr, flush=True)
    result: Result = {
        "documents": documents,
        "questions": len(questions),
        "tokens": len(text.windows.tokens),
        "steps": whole.num_steps,
        "seconds": seconds,
        "right": table,
    }
    if forget:
        names = [f"{document.title}.txt" for document in texts[:forget]]
        result |= measure_forget(out, run, questions, names)
    return result


def measure_forget(
    out: Path, run: Path, questions: Sequence[Question], names: Sequence[str]
) -> dict[str, Any]:
    """Forgets the first documents, by ``names``; asks for their facts and those of the others."""
    less = out.with_name("less")
    seconds = timed(lambda: forget_documents(out, names, [run], less, None)).ms / 1e3
    rows = {}
    for when, folder in (("before", out), ("after", less)):
        arm = Arm(load(folder), "fetched")
        for name, those in (("forgotten", True), ("others", False)):
            asked = [q for q in questions if (q.document < len(names)) is those]
            rows[f"{name}, {when}"] = {"questions": len(asked), **recall(arm, asked)}
    return {"seconds_to_forget": seconds, "forgetting": rows}


if __name__ == "__main__":
    benchmark(__doc__, measure)
