"""Recall of facts: does the greedy continuation of a prompt give the answer?

A number is right when the *first* integer of the continuation equals it (the paper, section 7,
takes all integers and one match is enough; a model that counts upwards would pass that). Any other
answer is right when the continuation starts with it, or with one of its aliases, and the next
character does not extend the word. Rows of a batch have prompts of one length, each with its own
cluster path, and the whole row is computed again for every new token: prompts are short, and it
needs no KV cache.
"""

import dataclasses
import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.texts import read_jsonl
from mlx_hmem.model import MemoryModel

EXTRA_TOKENS = 2  # beyond the longest answer: a leading space of its own, the next character


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


@dataclass(frozen=True)
class RecallBucket:
    """Recall of the facts of one kind ("all" for every kind) stated ``times`` times (None: any)."""

    kind: str
    times: int | None
    right: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.right / self.total

    @property
    def standard_error(self) -> float:
        """Binomial standard error of the accuracy."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.total)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
        }


@dataclass(frozen=True)
class FactRecall:
    """What :func:`recall` found: every fact with its continuation and whether that is right."""

    memory: str
    facts: tuple[Fact, ...]
    continuations: tuple[str, ...]
    right: tuple[bool, ...]

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
        return {"memory": self.memory, "buckets": [b.to_dict() for b in self.buckets()]}


def is_right(fact: Fact, continuation: str) -> bool:
    """Whether ``continuation`` answers ``fact``; the module's docstring gives the rule."""
    return any(_matches(answer, continuation) for answer in (fact.answer, *fact.aliases))


def _matches(answer: str, continuation: str) -> bool:
    if answer.isdecimal():
        first = re.search(r"\d+", continuation)
        return first is not None and first.group() == answer
    text = continuation.strip()
    return text.startswith(answer) and not text[len(answer) : len(answer) + 1].isalnum()


def recall(
    model: MemoryModel,
    facts: Sequence[Fact],
    memory: str = "fetched",
    *,
    routed_by: Sequence[str] | None = None,
    batch_size: int = 64,
    progress: bool = True,
) -> FactRecall:
    """Greedy answers of ``model`` to the prompts of ``facts``.

    ``memory`` is "fetched" (each prompt routes itself, as in the paper), "generic" or "none".
    ``routed_by`` gives a text per fact that routes in place of its prompt: the fact's own document
    makes an oracle.
    """
    if not facts:
        raise UserError("there are no facts to recall", "an empty list", "give some facts")
    if routed_by is not None and len(routed_by) != len(facts):
        raise UserError("routed_by needs one text per fact", len(routed_by), f"give {len(facts)}")
    tokenizer = model.tokenizer
    prompts = [list(tokenizer.encode(fact.prompt)) for fact in facts]
    answers = [a for fact in facts for a in (fact.answer, *fact.aliases)]
    num_tokens = EXTRA_TOKENS + max(len(tokenizer.encode(" " + a)) for a in answers)
    longest = max(map(len, prompts)) + num_tokens
    if model.context is not None and longest > model.context:
        raise UserError(
            "a prompt with its answer is longer than the context",
            f"{longest} tokens",
            f"leave out facts of more than {model.context} tokens",
        )
    paths = route_texts(model, routed_by or [f.prompt for f in facts], memory, progress)
    continuations = [""] * len(facts)
    with tqdm(total=len(facts), desc=f"facts, {memory}", unit="fact", disable=not progress) as bar:
        for rows in _same_length_batches(prompts, batch_size):
            logits = _last_logits(model, [paths[i] for i in rows] if paths else None, memory)
            tokens = mx.array([prompts[i] for i in rows])
            for row, new in zip(rows, _greedy(logits, tokens, num_tokens), strict=True):
                continuations[row] = tokenizer.decode(_until_end(new, tokenizer))
            bar.update(len(rows))
    right = tuple(is_right(f, c) for f, c in zip(facts, continuations, strict=True))
    return FactRecall(memory, tuple(facts), tuple(continuations), right)


def _same_length_batches(prompts: list[list[int]], batch_size: int) -> Iterator[list[int]]:
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    for _, rows in sorted(by_length.items()):
        for start in range(0, len(rows), batch_size):
            yield rows[start : start + batch_size]


def _last_logits(
    model: MemoryModel, paths: list[tuple[int, ...]] | None, memory: str
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
