"""Scores the benchmark tasks with each kind of memory, and sums up.

The memory of a row is routed by :func:`mlx_hmem.evaluate.tasks.few_shot.route_text`. A ``limit``
takes some rows at random, always the same ones, with the prompts they have in the whole file.
"""

import dataclasses
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.journal import Journal
from mlx_hmem.evaluate.rag.rag import Rag, RagSummary, in_json, with_rag
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import (
    TOKENS_PER_BATCH,
    Score,
    continue_greedily,
    score_candidates,
)
from mlx_hmem.evaluate.tasks.answers import is_right
from mlx_hmem.evaluate.tasks.few_shot import Prompt, PromptTokens, build_prompts
from mlx_hmem.evaluate.tasks.task import (
    GENERATION,
    GROUPS,
    LANGUAGE,
    TASKS,
    Example,
    Task,
    TaskData,
)
from mlx_hmem.files import fingerprint
from mlx_hmem.model.model import MemoryModel

LONGEST = 2048  # tokens, what the paper trains memories with
Rows = Iterator[list[dict[str, Any]]]


@dataclass(frozen=True)
class TaskResult:
    """What one kind of memory scores on one task. With categories the accuracy is the mean of
    theirs."""

    task: Task
    file: str
    memory: str
    right: int
    rows: int
    of_rows: int  # in the file
    cut: int  # prompts that lost a part of their text to the context
    categories: dict[str, tuple[int, int]]  # right, rows; empty without categories
    documents: RagSummary | None = None  # where prompts had them
    flops: float | None = None  # to those of the anchor alone
    left_out: int = 0  # rows that could not be scored: an answer fills the context

    @property
    def accuracy(self) -> float:
        parts = self.categories.values() or [(self.right, self.rows)]
        return sum(right / rows for right, rows in parts) / len(parts)

    @property
    def standard_error(self) -> float:
        """Binomial."""
        parts = self.categories.values() or [(self.right, self.rows)]
        return math.sqrt(sum(_variance(*part) for part in parts)) / len(parts)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "task": self.task.label,
            "icl_task_type": self.task.icl_task_type,
            "num_fewshot": self.task.num_fewshot,
            "group": self.task.group or None,
            "file": self.file,
            "memory": self.memory,
            "right": self.right,
            "rows": self.rows,
            "of_rows": self.of_rows,
            "cut": self.cut,
            "left_out": self.left_out,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
        }
        values |= in_json(self.documents, self.flops)
        if self.categories:
            values["categories"] = {
                name: {
                    "right": right,
                    "rows": rows,
                    "accuracy": right / rows,
                    "standard_error": math.sqrt(_variance(right, rows)),
                }
                for name, (right, rows) in self.categories.items()
            }
        return values


def _variance(right: int, rows: int) -> float:
    return right / rows * (1 - right / rows) / rows


@dataclass(frozen=True)
class Average:
    """Avg-CK or Avg-SK: the mean of a group's tasks, of those that were scored."""

    name: str
    memory: str
    tasks: tuple[str, ...]
    missing: tuple[str, ...]
    accuracy: float
    standard_error: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def averages(results: Sequence[TaskResult]) -> list[Average]:
    """The averages of the paper, for each kind of memory; a task counts once."""
    found = []
    for group, name in GROUPS.items():
        for memory in dict.fromkeys(r.memory for r in results):
            some = {
                r.task.label: r
                for r in reversed(results)
                if r.task.group == group and r.memory == memory
            }
            if not some:
                continue
            known = [t.label for t in TASKS if t.group == group]
            accuracy = sum(r.accuracy for r in some.values()) / len(some)
            error = math.sqrt(sum(r.standard_error**2 for r in some.values())) / len(some)
            missing = tuple(label for label in known if label not in some)
            found.append(Average(name, memory, tuple(reversed(some)), missing, accuracy, error))
    return found


def model_fingerprint(folder: Path) -> str:
    """What tells a model directory from another: weights, tokenizer, and all that its memory's
    manifest gives checksums of."""
    names = ("config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    files = [folder / name for name in (*names, "hmem.json", "bank/bank.json")]
    return f"{anchor_hash(folder)} {fingerprint(*(f for f in files if f.exists()))}"


def score_task(
    model: MemoryModel,
    data: TaskData,
    memory: str,
    *,
    out: Path,
    model_name: str,
    limit: int | None = None,
    context: int | None = None,
    withheld: int = 0,
    rag: Rag | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = True,
) -> TaskResult:
    """Scores a task, going on with the results that the folder ``out`` holds.

    ``withheld`` is a level whose best cluster no row may fetch
    (:mod:`mlx_hmem.evaluate.paper.blocking`).
    ``rag`` sets a document before each prompt (:mod:`mlx_hmem.evaluate.rag.rag`).

    ``model_name`` tells models apart (:func:`model_fingerprint`). ``context`` is the longest
    sequence in tokens: the anchor's, at most 2,048, unless given.
    """
    task, file, examples = data
    context = min(model.context or LONGEST, context or LONGEST)
    chosen: Sequence[int] = range(len(examples))
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(0).sample(chosen, limit))
    asked = len(chosen)
    if task.icl_task_type != GENERATION:
        chosen = _with_room(PromptTokens(model.tokenizer, context), examples, chosen, file)
    settings = {
        "version": 1,
        "model": model_name,
        "task": dataclasses.asdict(task) | {"files": None, "group": None},
        "file": fingerprint(file),
        "memory": memory,
        "context": context,
        **({"withheld": withheld} if withheld else {}),
        **({"rag": rag.index.fingerprint} if rag else {}),
    }
    label = with_rag(memory) if rag else memory
    name = re.sub(r"[^\w.+-]", "_", f"{task.label}.{task.num_fewshot}-shot.{label}")
    with Journal(out, name, settings).open() as journal:
        missing = [i for i in chosen if i not in journal.rows]
        if missing:
            prompts = build_prompts(task, examples)
            scored = _score_rows(
                model, task, file, prompts, missing, memory, context, tokens_per_batch, progress,
                withheld, rag,
            )  # fmt: skip
            bar = tqdm(total=len(chosen), initial=len(chosen) - len(missing), unit="row",
                       desc=f"{task.name}, {label}", disable=not progress)  # fmt: skip
            with bar:
                for rows in scored:
                    journal.add(rows)
                    bar.update(len(rows))
    right = {i: bool(journal.rows[i]["right"]) for i in chosen}
    categories = {}
    for category in dict.fromkeys(e.category for e in examples if e.category):
        own = [right[i] for i in chosen if examples[i].category == category]
        if own:
            categories[category] = (sum(own), len(own))
    cut = sum(journal.rows[i]["cut"] > 0 for i in chosen)
    documents = RagSummary.of([journal.rows[i] for i in chosen]) if rag else None
    return TaskResult(
        task, file.name, label, sum(right.values()), len(right), len(examples), cut, categories,
        documents, left_out=asked - len(chosen),
    )  # fmt: skip


def _with_room(
    tokens: PromptTokens, examples: Sequence[Example], rows: Sequence[int], file: Path
) -> list[int]:
    """Of ``rows`` those with answers that fit the context; no other can be scored."""
    some = [i for i in rows if tokens.has_room(examples[i])]
    if not some:
        remedy = f"use a model with a context beyond {tokens.context} tokens"
        raise UserError("no row has room for a question beside its answers", file, remedy)
    return some


def _score_rows(
    model: MemoryModel,
    task: Task,
    file: Path,
    prompts: Sequence[Prompt],
    rows: Sequence[int],
    memory: str,
    context: int,
    tokens_per_batch: int,
    progress: bool,
    withheld: int,
    rag: Rag | None,
) -> Rows:
    """The results of ``rows``, a batch at a time."""
    tokens = PromptTokens(model.tokenizer, context)
    some = [prompts[i] for i in rows]
    texts = [prompt.route_text for prompt in some]
    paths = route_texts(model, texts, memory, progress, withheld)
    longest, generates = 0, task.icl_task_type == GENERATION
    try:
        if generates:
            longest = tokens.longest_answer(task, [prompt.example for prompt in prompts])
            questions = [[tokens.question(prompt, longest)] for prompt in some]
        else:
            questions = [tokens.candidates(prompt) for prompt in some]
    except UserError as error:
        raise UserError(f"{file}: {error.what}", error.value, error.remedy) from None
    documents: list[dict[str, Any]] = [{} for _ in rows]
    if rag is not None:
        shown = rag.show_all(texts, questions, context - longest)
        documents = [s.kept(q, longest) for s, q in zip(shown, questions, strict=True)]
        questions = [each.candidates for each in shown]
    results: Iterator[list[tuple[int, dict[str, Any]]]]
    if generates:
        starts = [question[0].context for question in questions]
        new = continue_greedily(model, starts, longest, memory, paths, tokens_per_batch)
        results = (
            [(i, judge_text(task, some[i].example, tokens.decode(ids))) for i, ids in batch]
            for batch in new
        )
    else:
        scores = score_candidates(model, questions, memory, paths, tokens_per_batch)
        results = ([(i, judge(task, some[i].example.gold, s)) for i, s in b] for b in scores)
    for batch in results:
        yield [
            {"row": rows[i], "cut": max(c.cut for c in questions[i])} | documents[i] | found
            for i, found in batch
        ]


def judge_text(task: Task, example: Example, text: str) -> dict[str, Any]:
    """Whether a generated text makes its row right, and what it is."""
    return {"right": is_right(task, example, text), "text": text}


def judge(task: Task, gold: int, scores: Sequence[Score]) -> dict[str, Any]:
    """Whether the scores of a row's candidates make it right, and what they are.

    Language modelling asks that every token be the likeliest; the others, that the gold choice
    have the lowest mean cross-entropy per token, the first of equals being taken.
    """
    means = [round(score.mean, 6) for score in scores]
    if task.icl_task_type == LANGUAGE:
        return {"right": scores[0].greedy, "nats": means}
    choice = min(range(len(scores)), key=lambda i: scores[i].mean)
    return {"right": choice == gold, "choice": choice, "nats": means}
