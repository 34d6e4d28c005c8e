"""Routing, and many topics in a row: the parts of ``topics`` that need a retriever.

A thousand random texts are routed and fetched one after the other, as ``generate.py`` does before
an answer; every second memory is asked for layer by layer while it arrives. The bank's kept blocks
(256 MB) and MLX's cache of buffers fill during the first hundred, so growth is counted after those.
"""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.counting import Timed, in_turns, open_files, returned, timed
from benchmarks.common.models import model_of, random_retriever, random_texts
from benchmarks.common.show import Result
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.bank import Bank
from mlx_hmem.bank.read.arriving import ArrivingMemory
from mlx_hmem.budget.resident import resident_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import Retriever, load_encoder
from mlx_hmem.retriever.static import StaticEncoder

WARM_UP = 100
WORDS, PROMPTS, SLOW_PROMPTS = 50, 200, 9


def route_times() -> dict[str, dict[str, float]]:
    """Median ms, and CPU ms, of one route in a full tree of 16 ** 4; none of MiniLM where it would
    have to be downloaded.

    A person's prompt is mostly words that the static encoder has met: it keeps their word pieces.
    """
    retriever, texts = random_retriever(), random_texts(PROMPTS, WORDS, seed=2)
    encoder, tree = retriever.encoder, retriever.tree
    assert isinstance(encoder, StaticEncoder)
    pieces, vectors = encoder.pieces, encoder.encode(texts)

    def of_text(retriever: Retriever, number: int) -> Timed:
        return timed(partial(retriever.route, texts[number]))

    def not_met(number: int) -> Timed:
        pieces.cache.clear()
        return of_text(retriever, number)

    def met(number: int) -> Timed:
        retriever.route(texts[number])
        return of_text(retriever, number)

    contenders: dict[str, Callable[[int], Timed]] = {
        "tree alone": lambda number: timed(partial(tree.route, vectors[number])),
        "static encoder and tree, words it has not met": not_met,
        "static encoder and tree, words it has met": met,
    }
    found = in_turns(contenders, PROMPTS, "routing")
    with suppress(UserError):  # it is downloaded
        slow = partial(of_text, Retriever(load_encoder("minilm"), tree))
        found |= in_turns({"MiniLM and tree": slow}, SLOW_PROMPTS, "routing")
    return {
        name: {"ms": median(t.ms for t in times), "cpu_ms": median(t.cpu_ms for t in times)}
        for name, times in found.items()
    }


def fetch_all(model: MemoryModel, text: str, wait: bool) -> None:
    fetch = model.fetch(text, wait=wait)
    if isinstance(fetch.rows, ArrivingMemory):
        fetch.rows.wait()


def walk(folder: Path, topics: int) -> Result:
    """Memory and open files over so many topics, in each fifth of those after the warm-up."""
    with tempfile.TemporaryDirectory() as place, Bank.open(folder) as bank:
        # The anchor has no weights yet: nothing asks for them.
        model = model_of(Path(place), Model(PRESETS["openlm-160m"]), random_retriever(), bank)
        texts = random_texts(topics, WORDS, seed=3)
        assert model.retriever is not None
        level_1 = len({path[0] for path in model.retriever.route_many(texts)})
        found, each = returned(lambda: one_after_the_other(model, texts), times=topics)
    warm_up = min(WARM_UP, topics // 10)
    fifths = {
        name: {f"{i}/5": value for i, value in enumerate(values, 1)}
        for name, values in growth(found, warm_up).items()
    }
    return {
        f"topics {warm_up} to {topics}": fifths,
        "ms_a_topic": each.ms,
        "level_1_clusters_met": level_1,
    }


def one_after_the_other(model: MemoryModel, texts: list[str]) -> list[tuple[int, int]]:
    """Resident bytes and open files after each topic."""
    found = []
    for number, text in enumerate(tqdm(texts, desc="topics", leave=False, delay=2)):
        fetch_all(model, text, wait=number % 2 == 0)
        found.append((resident_bytes(), open_files()))
    return found


def growth(found: list[tuple[int, int]], warm_up: int) -> dict[str, Any]:
    """Resident bytes, mean and most, and the most open files in each fifth of the topics after
    ``warm_up``; the means move by some blocks, as other ones are kept."""
    fifths = np.array_split(np.array(found[warm_up:]), 5)
    return {
        "mean_resident_bytes": [int(fifth[:, 0].mean()) for fifth in fifths],
        "most_resident_bytes": [int(fifth[:, 0].max()) for fifth in fifths],
        "open_files": [int(fifth[:, 1].max()) for fifth in fifths],
    }
