"""Recall of facts: does the greedy continuation of a prompt give the answer?

A number is right when the *first* integer of the continuation equals it, or, with ``integers``
"any", one of them: the paper's rule (section 7), which a model that counts upwards would pass. Any
other answer is right when the continuation starts with it, or with one of its aliases, and the next
character does not extend the word. A continuation is two tokens longer than the longest answer of
all facts asked: the paper does not say how long its are.

Rows of a batch have prompts of one length, each with its own cluster path, and the whole row is
computed again for every new token: prompts are short, and it needs no KV cache.
"""

import dataclasses
import json
import math
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_hmem.config import ClusterPath, JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.rag.rag import RagSummary, in_json
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.texts import read_jsonl
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
    """Reads one fact per line of JSON, as written by :func:`write_facts`."""
    return [Fact.from_dict(row, f"{path}, fact {i}") for i, row in enumerate(read_jsonl(path), 1)]


def format_facts(facts: Sequence[Fact]) -> str:
    """The facts as lines of JSON, which :func:`read_facts` reads back."""
    return "".join(json.dumps(f.to_dict(), ensure_ascii=False) + "\n" for f in facts)


class Proportion:
    """``right`` of ``total``: the accuracy and its binomial standard error."""

    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.total)

    def to_dict(self) -> dict[str, Any]:
        fields: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        if not self.total:
            return fields | {"accuracy": None, "standard_error": None}
        return fields | {"accuracy": self.accuracy, "standard_error": self.standard_error}


@dataclass(frozen=True)
class RecallBucket(Proportion):
    """Recall of the facts of one kind ("all" for every kind) stated ``times`` times (None: any)."""

    kind: str
    times: int | None
    right: int
    total: int


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

    def bucket(self, kind: str = "all", times: int | None = None) -> RecallBucket:
        chosen = [
            right
            for fact, right in zip(self.facts, self.right, strict=True)
            if kind in ("all", fact.kind) and times in (None, fact.times)
        ]
        return RecallBucket(kind, times, sum(chosen), len(chosen))

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(f.kind for f in self.facts))

    @property
    def times(self) -> list[int]:
        return sorted({f.times for f in self.facts})

    def buckets(self) -> list[RecallBucket]:
        """All buckets that hold facts: "all" and every kind, by times stated and altogether."""
        kinds = ["all", *self.kinds] if len(self.kinds) > 1 else ["all"]
        found = [self.bucket(kind, times) for kind in kinds for times in [*self.times, None]]
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
    batch_size: int = 64,
    progress: bool = True,
) -> FactRecall:
    """Greedy answers of ``model`` to the prompts of ``facts``.

    ``memory`` is "fetched", "generic" or "none". ``route`` says what a fetched memory is routed
    by: "prompt", the bare prompt, as in the paper; "statement", the prompt with its answer, which
    is an oracle; "random", a leaf of the tree drawn for each fact by ``seed``. ``routed_by`` gives
    a text per fact in place of these (the document that states it), ``paths`` a cluster path.
    """
    if not facts:
        raise UserError("there are no facts to recall", "an empty list", "give some facts")
    if routed_by is not None and len(routed_by) != len(facts):
        raise UserError("routed_by needs one text per fact", len(routed_by), f"give {len(facts)}")
    if paths is not None and len(paths) != len(facts):
        raise UserError("paths needs one path per fact", len(paths), f"give {len(facts)}")
    if paths is None or memory != "fetched":
        paths = fact_paths(model, facts, memory, route, seed, routed_by, progress)
    continuations = [""] * len(facts)
    with tqdm(total=len(facts), desc=f"facts, {memory}", unit="fact", disable=not progress) as bar:
        for batch in continue_prompts(model, facts, range(len(facts)), memory, paths, batch_size):
            for row, text in batch:
                continuations[row] = text
            bar.update(len(batch))
    right = tuple(is_right(f, c) for f, c in zip(facts, continuations, strict=True))
    return FactRecall(memory, tuple(facts), tuple(continuations), right)


def continue_prompts(
    model: MemoryModel,
    facts: Sequence[Fact],
    rows: Sequence[int],
    memory: str,
    paths: Sequence[ClusterPath] | None,
    batch_size: int = 64,
) -> Iterator[list[tuple[int, str]]]:
    """(row, greedy continuation) of those ``rows`` of ``facts``, a batch at a time; ``paths`` are
    of all facts."""
    tokenizer = model.tokenizer
    prompts, num_tokens = encode_prompts(model, facts)
    for batch in _same_length_batches(prompts, rows, batch_size):
        logits = _last_logits(model, [paths[i] for i in batch] if paths else None, memory)
        new = _greedy(logits, mx.array([prompts[i] for i in batch]), num_tokens)
        texts = [tokenizer.decode(_until_end(tokens, tokenizer)) for tokens in new]
        yield list(zip(batch, texts, strict=True))


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
    if route not in ROUTES:
        raise UserError("unknown route", repr(route), f"use one of {', '.join(ROUTES)}")
    if routed_by is None and route == "random" and memory == "fetched":
        model.require_bank()
        assert model.retriever is not None  # load() makes both or neither
        leaves, rng = model.retriever.tree.leaves(), random.Random(seed)
        return [leaves[rng.randrange(len(leaves))] for _ in facts]
    if routed_by is None:
        routed_by = [f.statement if route == "statement" else f.prompt for f in facts]
    return route_texts(model, routed_by, memory, progress)


def _same_length_batches(
    prompts: list[list[int]], rows: Sequence[int], batch_size: int
) -> Iterator[list[int]]:
    by_length = defaultdict(list)
    for i in rows:
        by_length[len(prompts[i])].append(i)
    for _, same in sorted(by_length.items()):
        for start in range(0, len(same), batch_size):
            yield same[start : start + batch_size]


def _last_logits(
    model: MemoryModel, paths: list[ClusterPath] | None, memory: str
) -> Callable[[mx.array], mx.array]:
    return lambda tokens: model(tokens, paths=paths, memory=memory)[:, -1]


def _greedy(
    logits: Callable[[mx.array], mx.array], tokens: mx.array, num_tokens: int
) -> list[list[int]]:
    """The ``num_tokens`` likeliest next tokens, one by one, of each row of ``tokens``."""
    start = tokens.shape[1]
    for _ in range(num_tokens):
        new = mx.argmax(logits(tokens), axis=-1)[:, None].astype(tokens.dtype)
        tokens = mx.concatenate([tokens, new], axis=1)
        mx.eval(tokens)
    rows: Any = tokens[:, start:].tolist()
    return rows


def _until_end(tokens: list[int], tokenizer: Any) -> list[int]:
    ends = set(tokenizer.eos_token_ids)
    return next((tokens[:i] for i, token in enumerate(tokens) if token in ends), tokens)
