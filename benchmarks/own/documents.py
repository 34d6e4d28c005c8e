"""Invented documents, each with five facts, and the ways to ask for these."""

import re
from typing import NamedTuple

import numpy as np

from .kinds import KINDS, PEOPLE

FIRST = ("Bar", "Cal", "Dren", "El", "Fen", "Gar", "Hol", "Ist", "Jor", "Kel", "Lum", "Mar")
MIDDLE = ("ba", "co", "di", "la", "mo", "ni", "ra", "so", "ta", "ve")
LAST = ("by", "dale", "grim", "ham", "lock", "mere", "nor", "ridge", "stead", "wick")
GIVEN = ("Agnes", "Bruno", "Clara", "Dorian", "Edda", "Felix", "Greta", "Hugo", "Ines", "Jonas")


class Question(NamedTuple):
    """``prompts``: what leads up to ``answer``, by the way of asking."""

    document: int
    answer: str
    prompts: dict[str, str]


class Document(NamedTuple):
    title: str
    text: str


WAYS = ("own words", "another wording", "question")


def _word(rng: np.random.Generator, used: set[str]) -> str:
    while True:
        word = "".join(str(rng.choice(part)) for part in (FIRST, MIDDLE, MIDDLE, LAST))
        if word not in used:
            used.add(word)
            return word


def make_documents(count: int, seed: int) -> tuple[list[Document], list[Question]]:
    """``count`` documents, the kinds in turn, and five questions on each; no two things or people
    have one name."""
    rng, used = np.random.default_rng([seed, 25]), set[str]()
    documents, questions = list[Document](), list[Question]()
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        values = {"name": _word(rng, used)}
        for fact, own in kind.facts.items():
            if own.values is PEOPLE:
                values[fact] = f"{rng.choice(GIVEN)} {_word(rng, used)}"
            else:
                values[fact] = str(rng.choice(own.values))
        documents.append(Document(kind.title.format(**values), kind.text.format(**values)))
        for fact, own in kind.facts.items():
            before = kind.text[: kind.text.index("{" + fact + "}")].format(**values)
            prompts = (before.strip(), own.other.format(**values), own.question.format(**values))
            questions.append(Question(number, values[fact], dict(zip(WAYS, prompts, strict=True))))
    return documents, questions


def is_right(said: str, answer: str) -> bool:
    """Whether the first line of a continuation that is not blank says the answer."""
    lines = said.strip().splitlines()
    return bool(lines) and re.search(rf"\b{re.escape(answer)}\b", lines[0], re.I) is not None
