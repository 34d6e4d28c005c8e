"""Subjects of facts and the repetition of their documents."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mlx_hmem.evaluate import Fact

# The title of a document, and the facts that each repetition of it states: of one topic, and as
# often.
Subject = tuple[str, tuple[Fact, ...]]


def fact_documents(
    kind: str,
    subjects: Sequence[Subject],
    seed: int,
    filler: Callable[[str, random.Random], list[str]] = lambda topic, rng: [],
    plain: Sequence[Callable[[random.Random], tuple[str, str]]] = (),
) -> Iterator[dict[str, Any]]:
    """Each subject's document as often as its facts are stated, and each plain one, all shuffled.

    ``times`` of a document says how often. ``kind`` keeps the ids apart from those of other kinds
    in one corpus. ``filler`` gives the further sentences of one repetition, by its topic; ``plain``
    titles and texts.
    """
    rng = random.Random(f"documents {seed}")
    order = [i for i, (_, facts) in enumerate(subjects) for _ in range(facts[0].times)]
    order += range(len(subjects), len(subjects) + len(plain))
    rng.shuffle(order)
    for number, i in enumerate(order):
        if i < len(subjects):
            title, facts = subjects[i]
            sentences = [fact.statement for fact in facts] + filler(facts[0].topic, rng)
            rng.shuffle(sentences)
            identifier, text = f"fact-{kind}-{number:07d}", " ".join(sentences)
            yield {"id": identifier, "title": title, "text": text, "times": facts[0].times}
        else:
            title, text = plain[i - len(subjects)](rng)
            yield {"id": f"plain-{number:07d}", "title": title, "text": text}
