"""Plainly stated facts about chemical elements, from a JSON list of elements.

Of each element: ``name``, ``number``, ``symbol`` and, where not null, ``melt`` and ``boil``
(kelvin, rounded) and ``discovered_by``. The articles' own summaries are left out: they would state
the number once more.

A document is one statement, without filler: the encoder sets a text of several attributes apart
from the bare prompt of one of them. In a tree of 16 × 4 over these documents and 2,000
encyclopaedia articles MiniLM sent 28 to 30 % of the prompts to the leaf of their document when that
stated all facts of its element, and 70 to 77 % when it states one.
"""

import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact
from mlx_hmem.reading import read_json

from ...recipe.keys import check_keys, key
from .repeat import fact_documents

# `discovered_by` also holds places and ages; a discoverer is none of these.
NO_DISCOVERER = re.compile(r"unknown|\d|Ancient|Middle East|India|Bronze Age")


@dataclass(frozen=True)
class ElementsConfig(JsonConfig):
    frequencies: tuple[int, ...] = key(
        (2, 6, 24, 48, 96, 192, 384),
        "how often the facts of an element are stated; elements take turns",
        least=1,
    )
    source: str = key("", "JSON list of elements")

    def __post_init__(self) -> None:
        check_keys(self, "corpus.facts.")


def make_elements(
    values: dict[str, Any], seed: int, source: Path | None
) -> tuple[Iterator[dict[str, Any]], list[Fact]]:
    """Documents and facts, as :func:`train.corpus.facts.make_facts` says."""
    config = ElementsConfig.from_dict(values, "corpus.facts")
    path = source or (Path(config.source) if config.source else None)
    if path is None:
        raise UserError("facts of elements need a table", "no file", "give --facts FILE")
    elements = _read_elements(path)
    times = _times(config, len(elements), seed)
    facts = [
        fact
        for element, count in zip(elements, times, strict=True)
        for fact in _facts(element, count)
    ]
    subjects = [(f"{fact.topic}, {fact.kind}", (fact,)) for fact in facts]
    return fact_documents("elements", subjects, seed), facts


def _times(config: ElementsConfig, count: int, seed: int) -> list[int]:
    """Every run of neighbours by atomic number gets all frequencies, in random order.

    So a bucket of frequencies holds light and heavy elements alike.
    """
    rng = random.Random(f"frequencies {seed}")
    size = len(config.frequencies)
    runs = [rng.sample(config.frequencies, size) for _ in range(0, count, size)]
    return [times for run in runs for times in run][:count]


def _read_elements(path: Path) -> list[dict[str, Any]]:
    elements = read_json(path)
    if not isinstance(elements, list) or not elements:
        raise UserError(f"{path} is not a list of elements", repr(elements)[:60], "name another")
    required = {"name": str, "symbol": str, "number": int}
    optional = {"melt": (int, float), "boil": (int, float), "discovered_by": str}
    for i, element in enumerate(elements):
        if not isinstance(element, dict):
            raise UserError(f"{path} holds no element", repr(element)[:60], f"correct entry {i}")
        for part, kind in required.items():
            if not isinstance(element.get(part), kind):
                raise UserError(f"element {i} has no {part}", repr(element)[:60], f"correct {path}")
        for part, kinds in optional.items():
            value = element.get(part)
            endless = isinstance(value, float) and not math.isfinite(value)
            if endless or not isinstance(value, (type(None), kinds)):  # type: ignore[arg-type]
                raise UserError(f"element {i} has a wrong {part}", element[part], f"correct {path}")
    return sorted(elements, key=lambda element: element["number"])


def _facts(element: dict[str, Any], times: int) -> list[Fact]:
    name = element["name"].lower()
    stated = [
        ("atomic number", f"The atomic number of {name} is", str(element["number"])),
        ("symbol", f"The chemical symbol of {name} is", element["symbol"]),
    ]
    for part, kind in (("melt", "melting"), ("boil", "boiling")):
        if element.get(part) is not None:
            prompt = f"The {kind} point of {name} in kelvin is"
            stated.append((f"{kind} point", prompt, str(round(element[part]))))
    discoverer = element.get("discovered_by")
    if discoverer and not NO_DISCOVERER.match(discoverer):
        answer = re.sub(r" \(.*\)$", "", discoverer)
        stated.append(("discoverer", f"The discoverer of {name} is", answer))
    return [Fact(prompt, answer, (), times, kind, name) for kind, prompt, answer in stated]
