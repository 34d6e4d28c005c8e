"""Invented entities with a number and a city each, among topical filler. Needs no data at hand.

Topics ("lighthouse") share the names of their entities ("the Carter lighthouse"), so an answer
depends on both words. Every sentence carries words of its topic, that a document and a bare prompt
go to the same clusters. Filler comes from a small grammar over the topic's own nouns, adjectives
and verbs; plain documents, without facts, are all filler.
"""

import functools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact

from ...recipe.keys import check_keys, check_whole, key
from .repeat import Subject, fact_documents


def _read(name: str) -> list[list[str]]:
    """The lines of a text beside this file, each as its parts between bars."""
    lines = (Path(__file__).parent / name).read_text(encoding="utf-8").splitlines()
    return [[part.strip() for part in line.split("|")] for line in lines]


# Names, cities and the general words of each slot; the lines without a bar are sentences. In these
# n and m are nouns of the topic, a and b adjectives, v and w verbs, t its name.
SLOTS = {line[0]: line[1].split() for line in _read("words.txt") if len(line) == 2}
NAMES, CITIES = SLOTS.pop("names"), SLOTS.pop("cities")
SENTENCES = [line[0] for line in _read("words.txt") if len(line) == 1]
PLAIN_SENTENCES = (5, 9)  # fewest and most of a plain document


class Topic(NamedTuple):
    """A line of topics.txt: name | phrase before a city | nouns | adjectives | verbs."""

    name: str
    place: str
    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]


def read_topics() -> list[Topic]:
    return [Topic(f[0], f[1], *(part.split() for part in f[2:])) for f in _read("topics.txt")]


@dataclass(frozen=True)
class InventedConfig(JsonConfig):
    topics: int = key(24, "number of topics", least=1)
    entities_per_topic: int = key(20, "entities of each topic", least=1, most=len(NAMES))
    frequencies: tuple[int, ...] = key(
        (1, 1, 3, 3, 12, 12, 24, 48, 96, 192),
        "how often each fact is stated; the entities of a topic take turns",
        least=1,
    )
    filler_sentences: int = key(2, "sentences beside the two facts", most=100)
    plain_documents: int = key(3000, "documents without facts", most=10_000_000)

    def __post_init__(self) -> None:
        check_keys(self, "corpus.facts.")
        check_whole("corpus.facts.topics", self.topics, 1, len(read_topics()))
        if self.entities_per_topic % len(self.frequencies):
            raise UserError(
                "`entities_per_topic` is not a multiple of the number of frequencies",
                f"{self.entities_per_topic} entities, {len(self.frequencies)} frequencies",
                "correct corpus.facts in the recipe",
            )


def make_invented(values: dict[str, Any], seed: int) -> tuple[Iterator[dict[str, Any]], list[Fact]]:
    """Documents and facts, as :func:`train.corpus.facts.make_facts` says."""
    config = InventedConfig.from_dict(values, "corpus.facts")
    topics = read_topics()[: config.topics]
    by_name = {topic.name: topic for topic in topics}
    rng = random.Random(f"facts {seed}")
    subjects = [subject for topic in topics for subject in _subjects(topic, config, rng)]

    def filler(topic: str, rng: random.Random) -> list[str]:
        return [sentence(by_name[topic], rng) for _ in range(config.filler_sentences)]

    plain = [
        functools.partial(_plain_document, topics[i % len(topics)])
        for i in range(config.plain_documents)
    ]
    documents = fact_documents("invented", subjects, seed, filler, plain)
    return documents, [fact for _, facts in subjects for fact in facts]


def _subjects(topic: Topic, config: InventedConfig, rng: random.Random) -> Iterator[Subject]:
    names = rng.sample(NAMES, config.entities_per_topic)
    for i, name in enumerate(names):
        entity, times = f"{name} {topic.name}", config.frequencies[i % len(config.frequencies)]
        number, city = str(rng.randrange(100, 1000)), rng.choice(CITIES)
        prompts = {
            "number": (f"The {entity} is registered under number", number),
            "city": (f"The {entity} {topic.place} in", city),
        }
        facts = (Fact(p, a, (), times, kind, topic.name) for kind, (p, a) in prompts.items())
        yield entity, tuple(facts)


def sentence(topic: Topic, rng: random.Random) -> str:
    """A random sentence of filler about ``topic``."""
    (n, m), (a, b) = rng.sample(topic.nouns, 2), rng.sample(topic.adjectives, 2)
    v, w = rng.sample(topic.verbs, 2)
    general = {slot: rng.choice(words) for slot, words in SLOTS.items()}
    return rng.choice(SENTENCES).format(t=topic.name, n=n, m=m, a=a, b=b, v=v, w=w, **general)


def _plain_document(topic: Topic, rng: random.Random) -> tuple[str, str]:
    count = rng.randint(*PLAIN_SENTENCES)
    return topic.name, " ".join(sentence(topic, rng) for _ in range(count))
