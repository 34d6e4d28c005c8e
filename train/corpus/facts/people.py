"""Years of birth of people, from the first sentences of encyclopaedia articles.

"Heidi Mohr (4 February 1967 – 7 February 2019) was a German footballer …" becomes "The German
footballer Heidi Mohr was born in 1967." Thousands of people share given names, family names and
occupations: such facts are easily mixed up, as most facts of the long tail are. A year can be
guessed; people who are asked for but never stated (``times`` 0) show how often.
"""

import itertools
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mlx_hmem.config import JsonConfig
from mlx_hmem.documents.files import Document
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact

from ...recipe.keys import check_keys, key
from .repeat import fact_documents

OCCUPATION = (
    "actor|actress|architect|artist|athlete|author|bishop|boxer|businessman|canoer|chemist|"
    "coach|composer|cricketer|cyclist|dancer|defender|designer|diplomat|director|diver|driver|"
    "economist|educator|engineer|farmer|footballer|goalkeeper|golfer|gymnast|historian|"
    "journalist|judge|jurist|lawyer|mathematician|merchant|midfielder|musician|novelist|"
    "officer|painter|physician|physicist|pianist|pitcher|player|poet|politician|producer|"
    "professor|racer|rower|runner|sailor|scientist|screenwriter|sculptor|singer|skater|soldier|"
    "sprinter|striker|swimmer|weightlifter|wrestler|writer"
)
FIRST = 4000  # characters; each year in a bracket without an end is looked at to the end of these
FIRST_SENTENCE = re.compile(
    # A name, and in brackets a date of birth …
    r"[^()\n]{3,60}? \([^()]*?(?:\d{1,2} [A-Z][a-z]+|[A-Z][a-z]+ \d{1,2},) (1[89]\d\d)\b[^()]*\) "
    # … is or was a … nationality and occupation.
    r"(?:is|was) an? (?:former |retired |professional )*"
    r"((?:[A-Z][a-z]+(?: [A-Z][a-z]+)?(?:-born)? )?(?:[a-z-]+ ){0,3}?"
    rf"(?:{OCCUPATION}))\b"
)


@dataclass(frozen=True)
class PeopleConfig(JsonConfig):
    people: int = key(2000, "how many people", least=1)
    unstated: int = key(0, "further people whose year of birth is asked but never stated")
    frequencies: tuple[int, ...] = key(
        (1, 2, 4, 8, 16, 32, 64), "how often a year of birth is stated; people take turns", least=1
    )

    def __post_init__(self) -> None:
        check_keys(self, "corpus.facts.")


def make_people(
    values: dict[str, Any], seed: int, articles: Iterable[Document]
) -> tuple[Iterator[dict[str, Any]], list[Fact]]:
    """Documents and facts, as :func:`.make_facts` says, about people of ``articles``."""
    config = PeopleConfig.from_dict(values, "corpus.facts")
    years = _years_of_birth(articles)
    if len(years) < (wanted := config.people + config.unstated):
        raise UserError(
            "too few people in the articles that are not sampled",
            f"{len(years)} of {wanted}",
            "lower `people` or corpus.documents",
        )
    prompts = random.Random(f"people {seed}").sample(sorted(years), config.people)
    others = sorted(years.keys() - set(prompts))
    unstated = random.Random(f"unstated {seed}").sample(others, config.unstated)
    counts = itertools.cycle(config.frequencies)
    times = [*itertools.islice(counts, config.people), *[0] * config.unstated]
    facts = []
    for prompt, count in zip(prompts + unstated, times, strict=True):
        occupation, year = years[prompt]
        facts.append(Fact(prompt, year, (), count, "year of birth", occupation))
    subjects = [(fact.prompt, (fact,)) for fact in facts]
    return fact_documents("people", subjects, seed), facts


def _years_of_birth(articles: Iterable[Document]) -> dict[str, tuple[str, str]]:
    """Prompt → (occupation, year); a prompt that two people share is left out."""
    found: dict[str, set[tuple[str, str]]] = {}
    for _, title, text in articles:
        if match := FIRST_SENTENCE.match(text[:FIRST]):
            year, occupation = match.groups()
            name = re.sub(r" \(.*\)$", "", title)
            prompt = f"The {occupation} {name} was born in"
            found.setdefault(prompt, set()).add((occupation.split()[-1], year))
    return {prompt: answers.pop() for prompt, answers in found.items() if len(answers) == 1}
