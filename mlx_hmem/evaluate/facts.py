"""Recall of facts: does the greedy continuation of a prompt give the answer?

A number is right when the *first* integer of the continuation equals it, or, with ``integers``
"any", one of them: the paper's rule (section 7), which a model that counts upwards would pass. Any
other answer is right when the continuation starts with it, or with one of its aliases, and the next
character does not extend the word. A continuation is two tokens longer than the longest answer of
all facts asked: the paper does not say how long its are.
"""

import json
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_hmem.config import ClusterPath, JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.rag.rag import RagSummary, in_json
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import continue_greedily, one_by_one
from mlx_hmem.evaluate.texts import numbered_jsonl
from mlx_hmem.model.model import MemoryModel

EXTRA_TOKENS = 2  # beyond the longest answer: a leading space of its own, the next character
ROUTES = ("prompt", "statement", "random")


@dataclass(frozen=True)
class Fact(JsonConfig):
    """A statement ``prompt + " " + answer + "."`` that the training text makes ``times`` times."""

    prompt: str
    answer: str
    aliases: tuple[str, ...]  # other answers that count as right
    times: int
    kind: str  # the attribute, e.g. "city"
    topic: str

    def __post_init__(self) -> None:
        texts = (self.prompt, self.answer, self.kind, self.topic, *self.aliases)
        if not all(isinstance(t, str) for t in texts) or not all(t.strip() for t in texts[:2]):
            raise UserError("a fact needs a prompt and an answer", texts[:2], "correct the file")
        if type(self.times) is not int or self.times < 0:
            raise UserError(
                "`times` of a fact is not a count", repr(self.times), "correct the file"
            )

    @property
    def statement(self) -> str:
        return f"{self.prompt} {self.answer}."


def read_facts(path: Path) -> list[Fact]:
    """Reads one fact per line of JSON, as written by :func:`format_facts`."""
    return [Fact.from_dict(row, f"{path}, line {n}") for n, row in numbered_jsonl(path)]


def format_facts(facts: Sequence[Fact]) -> str:
    """The facts as lines of JSON, which :func:`read_facts` reads back."""
    return "".join(json.dumps(f.to_dict(), ensure_ascii=False) + "\n" for f in facts)


@dataclass(frozen=True)
class Proportion:
    """``right`` of ``total``, the accuracy and its binomial standard error; ``of`` says of what."""

    right: int
    total: int
    of: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def among(cls, right: Sequence[bool], **of: Any) -> "Proportion":
        return cls(sum(right), len(right), of)

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def variance(self) -> float:
        return self.accuracy * (1 - self.accuracy) / self.total

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.variance)

    def to_dict(self) -> dict[str, Any]:
        counts = self.of | {"right": self.right, "total": self.total}
        if not self.total:
            return counts | {"accuracy": None, "standard_error": None}
        return counts | {"accuracy": self.accuracy, "standard_error": self.standard_error}


@dataclass(frozen=True)
class FactRecall:
    """What :func:`recall` found: every fact with its continuation and whether that is right; with
    documents in the prompts, what is said of these, and FLOPs to those of the anchor alone."""

    memory: str
    facts: tuple[Fact, ...]
    continuations: tuple[str, ...]
    right: tuple[bool, ...]
    documents: RagSummary | None = None
    flops: float | None = None

    def bucket(self, kind: str = "all", times: int | None = None) -> Proportion:
        """Of the facts of one kind ("all" for every kind) stated ``times`` times (None: any)."""
        chosen = [
            right
            for fact, right in zip(self.facts, self.right, strict=True)
            if kind in ("all", fact.kind) and times in (None, fact.times)
        ]
        return Proportion.among(chosen, kind=kind, times=times)

    @property
    def kinds(self) -> list[str]:
        """ "all", and every kind where there are several."""
        kinds = dict.fromkeys(f.kind for f in self.facts)
        return ["all", *kinds] if len(kinds) > 1 else ["all"]

    @property
    def times(self) -> list[int | None]:
        """How often facts were stated, rising; None, for any, is the last."""
        return [*sorted({f.times for f in self.facts}), None]

    def buckets(self) -> list[Proportion]:
        """All buckets that hold facts: "all" and every kind, by times stated and altogether."""
        found = [self.bucket(kind, times) for kind in self.kinds for times in self.times]
        return [b for b in found if b.total]

    def to_dict(self) -> dict[str, Any]:
        found = {"memory": self.memory, "buckets": [b.to_dict() for b in self.buckets()]}
        return found | in_json(self.documents, self.flops)


def is_right(fact: Fact, continuation: str, integers: str = "first") -> bool:
    """Whether ``continuation`` answers ``fact``; the module's docstring gives the rule."""
    answers = (fact.answer, *fact.aliases)
    return any(_matches(answer, continuation, integers == "any") for answer in answers)


def _matches(answer: str, continuation: str, any_integer: bool) -> bool:
    if answer.isdecimal():
        found = re.findall(r"\d+", continuation)
        return answer in (found if any_integer else found[:1])
    text = continuation.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def recall(
    model: MemoryModel,
    facts: Sequence[Fact],
    memory: str = "fetched",
    *,
    route: str = "prompt",
    seed: int = 0,
    routed_by: Sequence[str] | None = None,
    paths: Sequence[ClusterPath] | None = None,
    progress: bool = True,
) -> FactRecall:
    """Greedy answers of ``model`` to the prompts of ``facts``.

    ``memory`` is "fetched", "generic" or "none". ``route`` says what a fetched memory is routed
    by: "prompt", the bare prompt, as in the paper; "statement", the prompt with its answer, which
    is an oracle; "random", a leaf of the tree drawn for each fact by ``seed``. ``routed_by`` gives
    a text per fact in place of these (the document that states it), ``paths`` a cluster path.
    """
    if routed_by is not None and len(routed_by) != len(facts):
        raise UserError("routed_by needs one text per fact", len(routed_by), f"give {len(facts)}")
    if paths is None or memory != "fetched":
        paths = fact_paths(model, facts, memory, route, seed, routed_by, progress)
    prompts, new = encode_prompts(model, facts)
    continuations = [""] * len(facts)
    batches = continue_greedily(model, prompts, new, memory, paths)
    for row, tokens in one_by_one(batches, len(facts), f"facts, {memory}", "fact", progress):
        continuations[row] = model.tokenizer.decode(tokens)
    right = tuple(is_right(f, c) for f, c in zip(facts, continuations, strict=True))
    return FactRecall(memory, tuple(facts), tuple(continuations), right)


def encode_prompts(model: MemoryModel, facts: Sequence[Fact]) -> tuple[list[list[int]], int]:
    """The prompts as tokens, and how many to generate after each: the longest answer's and
    ``EXTRA_TOKENS``."""
    encode = model.tokenizer.encode
    prompts = [list(encode(fact.prompt)) for fact in facts]
    answers = [a for fact in facts for a in (fact.answer, *fact.aliases)]
    num_tokens = EXTRA_TOKENS + max(len(encode(" " + a)) for a in answers)
    longest = max(map(len, prompts)) + num_tokens
    if model.context is not None and longest > model.context:
        raise UserError(
            "a prompt with its answer is longer than the context",
            f"{longest} tokens",
            f"leave out facts of more than {model.context} tokens",
        )
    return prompts, num_tokens


def fact_paths(
    model: MemoryModel,
    facts: Sequence[Fact],
    memory: str = "fetched",
    route: str = "prompt",
    seed: int = 0,
    routed_by: Sequence[str] | None = None,
    progress: bool = False,
) -> list[ClusterPath] | None:
    """The cluster path of each fact, routed as :func:`recall` says; None where ``memory`` needs
    none."""
    if not facts:
        raise UserError("there are no facts to recall", "an empty list", "give some facts")
    if route not in ROUTES:
        raise UserError("unknown route", repr(route), f"use one of {', '.join(ROUTES)}")
    if routed_by is None and route == "random" and memory == "fetched":
        leaves, rng = model.require_retriever().tree.leaves(), random.Random(seed)
        return [leaves[rng.randrange(len(leaves))] for _ in facts]
    if routed_by is None:
        routed_by = [f.statement if route == "statement" else f.prompt for f in facts]
    return route_texts(model, routed_by, memory, progress)
