"""Subjects of facts and the repetition of their documents."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_hmem.evaluate import Fact


@dataclass(frozen=True)
class Subject:
    """What a document is about, with the facts that each repetition of the document states."""

    title: str
    topic: str
    facts: tuple[Fact, ...]

    @property
    def times(self) -> int:
        return self.facts[0].times


def fact_documents(
    kind: str,
    subjects: Sequence[Subject],
    seed: int,
    filler: Callable[[Subject, random.Random], list[str]],
    plain: Sequence[Callable[[random.Random], tuple[str, str]]] = (),
) -> Iterator[dict[str, Any]]:
    """Each subject's document as often as its facts are stated, and each plain one, all shuffled.

    ``times`` of a document says how often. ``kind`` keeps the ids apart from those of other kinds
    in one corpus. ``filler`` gives the further sentences of one repetition, ``plain`` titles and
    texts.
    """
    rng = random.Random(f"documents {seed}")
    order = [i for i, subject in enumerate(subjects) for _ in range(subject.times)]
    order += range(len(subjects), len(subjects) + len(plain))
    rng.shuffle(order)
    for number, i in enumerate(order):
        if i < len(subjects):
            sentences = [fact.statement for fact in subjects[i].facts] + filler(subjects[i], rng)
            rng.shuffle(sentences)
            title, text = subjects[i].title, " ".join(sentences)
            identifier, times = f"fact-{kind}-{number:07d}", subjects[i].times
            yield {"id": identifier, "title": title, "text": text, "times": times}
        else:
            title, text = plain[i - len(subjects)](rng)
            yield {"id": f"plain-{number:07d}", "title": title, "text": text}
