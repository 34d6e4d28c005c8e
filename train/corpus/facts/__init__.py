"""Facts that the training text states an exactly known number of times.

Recall by that number shows what memory adds where text is rare: the long tail. Three kinds:
``invented`` needs no data at hand, ``elements`` states what a table of chemical elements holds,
``people`` the years of birth that encyclopaedia articles begin with.
A document states each of its facts once, as ``prompt + " " + answer + "."``; where it has several
sentences, each repetition puts them in a new order. A fact's ``times`` counts the statements in one
pass over *all* documents: text held out must be taken from the plain ones (ids ``plain-…``), and a
run of several passes multiplies it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mlx_hmem.documents.files import Document
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact

from .elements import ElementsConfig, make_elements
from .invented import InventedConfig, make_invented
from .people import PeopleConfig, make_people

__all__ = ["FACT_KINDS", "Fact", "documents_of_facts", "make_facts"]

FACT_KINDS = {
    "corpus.facts of kind invented": InventedConfig,
    "corpus.facts of kind elements": ElementsConfig,
    "corpus.facts of kind people": PeopleConfig,
}


def make_facts(
    config: dict[str, Any], seed: int, source: Path | None = None, articles: Iterable[Document] = ()
) -> tuple[Iterator[dict[str, Any]], list[Fact]]:
    """Documents {id, title, text} in random order, repeated by frequency, and the facts they state.

    A document that states facts has their ``times`` too. ``config`` is one entry of the recipe's
    ``corpus.facts``: ``kind`` ("invented", "elements" or "people") and the keys of that kind's
    configuration. ``source`` is the table of elements, ``articles`` are (id, title, text) to take
    people from. The same arguments give the same documents. Raises UserError for a wrong
    configuration.
    """
    values = {key: value for key, value in config.items() if key != "kind"}
    match config.get("kind"):
        case "invented":
            return make_invented(values, seed)
        case "elements":
            return make_elements(values, seed, source)
        case "people":
            return make_people(values, seed, articles)
    known = "use invented, elements or people"
    raise UserError("unknown kind of facts", repr(config.get("kind")), known)


def documents_of_facts(facts: Iterable[Fact], documents: Iterable[dict[str, Any]]) -> list[str]:
    """The text of one document that states each fact: what an oracle routes by."""
    texts = {d["title"]: d["text"] for d in documents if d["id"].startswith("fact-")}.values()
    found = []
    for fact in facts:
        text = next((t for t in texts if fact.statement in t), None)
        if text is None:
            raise UserError("no document states a fact", fact.statement, "pass all documents")
        found.append(text)
    return found
