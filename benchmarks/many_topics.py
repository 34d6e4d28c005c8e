"""Routing, and many topics in a row: the parts of benchmarks/topics.py that need a retriever.

A thousand random texts are routed and recalled one after the other, as ``generate.py`` does before
an answer; every second memory is asked for layer by layer while it arrives. The bank's kept blocks
(256 MB) and MLX's cache of buffers fill during the first hundred, so growth is counted after those.
"""

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.counting import Timed, median, open_files, timed
from benchmarks.common.models import random_retriever, random_texts, write_tokenizer
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.bank import Bank
from mlx_hmem.bank.read.arriving import ArrivingMemory
from mlx_hmem.budget.resident import resident_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.model.load import read_tokenizer
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import Retriever, load_encoder
from mlx_hmem.retriever.static import StaticEncoder

TOPICS, WARM_UP = 1000, 100
WORDS, PROMPTS, SLOW_PROMPTS = 50, 200, 9
NAMES = {
    "tree": "tree alone",
    "static_new": "static encoder and tree, words it has not met",
    "static": "static encoder and tree, words it has met",
    "minilm": "MiniLM and tree",
}


def route_times() -> dict[str, dict[str, float]]:
    """Median ms, and CPU ms, of one route in a full tree of 16 ** 4; none of MiniLM where it would
    have to be downloaded.

    A person's prompt is mostly words that the static encoder has met: it keeps their word pieces.
    """
    retriever, texts = random_retriever(), random_texts(PROMPTS, WORDS, seed=2)
    encoder, tree = retriever.encoder, retriever.tree
    assert isinstance(encoder, StaticEncoder)
    vectors = encoder.encode(texts)
    found: dict[str, list[Timed]] = {name: [] for name in NAMES}
    for text, vector in zip(texts, vectors, strict=True):
        found["tree"].append(timed(partial(tree.route, vector)))
        found["static"].append(timed(partial(retriever.route, text)))
        encoder.pieces.cache.clear()
        found["static_new"].append(timed(partial(retriever.route, text)))
    try:
        slow = Retriever(load_encoder("minilm"), tree)
    except UserError:  # it is downloaded
        del found["minilm"]
    else:
        slow.route(texts[0])
        for text in texts[:SLOW_PROMPTS]:
            found["minilm"].append(timed(partial(slow.route, text)))
    return {
        name: {"ms": median(t.ms for t in times), "cpu_ms": median(t.cpu_ms for t in times)}
        for name, times in found.items()
    }


def walk(model: MemoryModel, texts: list[str]) -> list[tuple[int, int]]:
    """Resident bytes and open files after each topic."""
    found = []
    for number, text in enumerate(tqdm(texts, desc="topics", leave=False, delay=2)):
        recall = model.recall(text, wait=number % 2 == 0)
        if isinstance(recall.rows, ArrivingMemory):
            recall.rows.wait()
        del recall
        found.append((resident_bytes(), open_files()))
    return found


def growth(found: list[tuple[int, int]], warm_up: int) -> dict[str, Any]:
    """Resident bytes, mean and most, and the most open files in each fifth of the topics after
    ``warm_up``; the means move by some blocks, as other ones are kept."""
    fifths = np.array_split(np.array(found[warm_up:]), 5)
    return {
        "topics": len(found),
        "warm_up": warm_up,
        "mean_resident_bytes": [int(fifth[:, 0].mean()) for fifth in fifths],
        "most_resident_bytes": [int(fifth[:, 0].max()) for fifth in fifths],
        "open_files": [int(fifth[:, 1].max()) for fifth in fifths],
    }


def model_of(bank: Bank, folder: Path) -> MemoryModel:
    """A model around a bank of OpenLM-160M's shape. Its anchor has no weights yet: nothing asks for
    them. The tokenizer is written to ``folder``."""
    write_tokenizer(folder)
    args = PRESETS["openlm-160m"]
    tokenizer = read_tokenizer(folder, {"eos_token_id": 1})
    context = {"max_position_embeddings": args.max_position_embeddings}
    return MemoryModel(Model(args), context, tokenizer, random_retriever(), bank)


def walk_in_child(bank: Path, topics: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.many_topics", str(bank), str(topics)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def show_routes(routes: dict[str, dict[str, float]]) -> None:
    print(f"routing a prompt of {WORDS} words")
    for name, found in routes.items():
        print(f"  {NAMES[name]:48}{found['ms']:9.3f} ms{found['cpu_ms']:9.3f} ms of CPU time")


def show_walk(result: dict[str, Any]) -> None:
    print(f"{result['topics']:,} random topics; after {result['warm_up']}, each fifth of the rest")
    for key in ("mean_resident_bytes", "most_resident_bytes", "open_files"):
        unit, scale = ("", 1.0) if key == "open_files" else (", MB", 1e6)
        label = key.removesuffix("_bytes").replace("_", " ") + unit
        print(f"  {label:24}" + "".join(f"{value / scale:9.0f}" for value in result[key]))
    print(f"  {result['ms']:.1f} ms a topic, {result['level_1']} level-1 clusters met")


def main() -> None:
    folder, topics = Path(sys.argv[1]), int(sys.argv[2])
    warm_up = min(WARM_UP, topics // 10)
    with Bank.open(folder) as bank:
        model, texts = model_of(bank, folder), random_texts(topics, WORDS, seed=3)
        assert model.retriever is not None
        level_1 = len({path[0] for path in model.retriever.route_many(texts)})
        start = time.perf_counter()
        found = walk(model, texts)
        ms = (time.perf_counter() - start) * 1e3 / topics
    result = growth(found, warm_up) | {"ms": ms, "level_1": level_1}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
