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
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.facts import Proportion
from mlx_hmem.evaluate.journal import Journal, kept_rows
from mlx_hmem.evaluate.rag.rag import Rag, RagSummary, in_json, named
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import (
    TOKENS_PER_BATCH,
    Score,
    continue_greedily,
    longest_sequence,
    score_candidates,
)
from mlx_hmem.evaluate.tasks.answers import is_right
from mlx_hmem.evaluate.tasks.few_shot import PromptTokens, build_prompts
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
    categories: dict[str, Proportion]  # empty without categories
    documents: RagSummary | None = None  # where prompts had them
    flops: float | None = None  # to those of the anchor alone
    left_out: int = 0  # rows that could not be scored: an answer fills the context

    @property
    def _parts(self) -> list[Proportion]:
        return [*self.categories.values()] or [Proportion(self.right, self.rows)]

    @property
    def accuracy(self) -> float:
        return sum(part.accuracy for part in self._parts) / len(self._parts)

    @property
    def standard_error(self) -> float:
        """Binomial."""
        return math.sqrt(sum(part.variance for part in self._parts)) / len(self._parts)

    def to_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "task": self.task.label,
            "icl_task_type": self.task.icl_task_type,
            "num_fewshot": self.task.num_fewshot,
            "group": self.task.group or None,
        }
        own = ("file", "memory", "right", "rows", "of_rows", "cut", "left_out", "accuracy")
        values |= {name: getattr(self, name) for name in (*own, "standard_error")}
        values |= in_json(self.documents, self.flops)
        if self.categories:
            values["categories"] = {
                name: {
                    "right": part.right,
                    "rows": part.total,
                    "accuracy": part.accuracy,
                    "standard_error": part.standard_error,
                }
                for name, part in self.categories.items()
            }
        return values


@dataclass(frozen=True)
class Average(JsonConfig):
    """Avg-CK or Avg-SK: the mean of a group's tasks, of those that were scored."""

    name: str
    memory: str
    tasks: tuple[str, ...]
    missing: tuple[str, ...]
    accuracy: float
    standard_error: float


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
    tokens = PromptTokens(model.tokenizer, longest_sequence(model, context))
    chosen: Sequence[int] = range(len(examples))
    if limit is not None and limit < len(examples):
        chosen = sorted(random.Random(0).sample(chosen, limit))
    asked = len(chosen)
    if task.icl_task_type != GENERATION:  # no other row can be scored
        chosen = [i for i in chosen if tokens.has_room(examples[i])]
        if not chosen:
            remedy = f"use a model with a context beyond {tokens.context} tokens"
            raise UserError("no row has room for a question beside its answers", file, remedy)
    settings = {
        "version": 1,
        "model": model_name,
        "task": dataclasses.asdict(task) | {"files": None, "group": None},
        "file": fingerprint(file),
        "memory": memory,
        "context": tokens.context,
        **({"withheld": withheld} if withheld else {}),
        **({"rag": rag.index.fingerprint} if rag else {}),
    }
    label = named(memory, rag)
    name = re.sub(r"[^\w.+-]", "_", f"{task.label}.{task.num_fewshot}-shot.{label}")

    score = partial(
        _score_rows, model, data, tokens, memory, withheld, rag, tokens_per_batch, progress
    )
    rows = kept_rows(
        Journal(out, name, settings), chosen, score, f"{task.name}, {label}", "row", progress
    )
    rights = [bool(row["right"]) for row in rows]
    categories = {}
    for category in dict.fromkeys(e.category for e in examples if e.category):
        pairs = zip(chosen, rights, strict=True)
        if own := [right for i, right in pairs if examples[i].category == category]:
            categories[category] = Proportion.among(own)
    return TaskResult(
        task,
        file.name,
        label,
        right=sum(rights),
        rows=len(rows),
        of_rows=len(examples),
        cut=sum(row["cut"] > 0 for row in rows),
        categories=categories,
        documents=RagSummary.of(rows) if rag else None,
        left_out=asked - len(chosen),
    )


def _score_rows(
    model: MemoryModel,
    data: TaskData,
    tokens: PromptTokens,
    memory: str,
    withheld: int,
    rag: Rag | None,
    tokens_per_batch: int,
    progress: bool,
    rows: Sequence[int],
) -> Iterator[list[dict[str, Any]]]:
    """The results of ``rows``, a batch at a time."""
    task, prompts = data.task, build_prompts(data.task, data.examples)
    some = [prompts[i] for i in rows]
    texts = [prompt.route_text for prompt in some]
    paths = route_texts(model, texts, memory, progress, withheld)
    longest, generates = 0, task.icl_task_type == GENERATION
    try:
        if generates:
            longest = tokens.longest_answer(task, data.examples)
            questions = [[tokens.question(prompt, longest)] for prompt in some]
        else:
            questions = [tokens.candidates(prompt) for prompt in some]
    except UserError as error:
        raise UserError(f"{data.file}: {error.what}", error.value, error.remedy) from None
    documents: list[dict[str, Any]] = [{} for _ in rows]
    if rag is not None:
        shown = rag.show_all(texts, questions, tokens.context - longest)
        documents = [s.kept(q, longest) for s, q in zip(shown, questions, strict=True)]
        questions = [each.candidates for each in shown]
    batches: Iterator[list[tuple[int, Any]]]
    if generates:
        starts = [question[0].context for question in questions]
        batches = continue_greedily(model, starts, longest, memory, paths, tokens_per_batch)
    else:
        batches = score_candidates(model, questions, memory, paths, tokens_per_batch)

    def judged(example: Example, found: Any) -> dict[str, Any]:
        if not generates:
            return judge(task, example.gold, found)
        text = tokens.decode(found)
        return {"right": is_right(task, example, text), "text": text}

    for batch in batches:
        yield [
            {"row": rows[i], "cut": max(c.cut for c in questions[i])}
            | documents[i]
            | judged(some[i].example, found)
            for i, found in batch
        ]


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
