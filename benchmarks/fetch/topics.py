"""What a change of topic costs: other blocks out of a flat bank and out of a hierarchical one.

The paper models, for imagined hardware, 198 ms for a flat bank, 38 ms for a hierarchical one and
47 ms for a change of topic inside the same upper levels; 47 to 198 is as the 80 rows of levels 2
and 3 to all 336. Here the same cases are measured on one disk, with banks of one size (4.6 billion
parameters) that give 18 million in bfloat16 for a topic. A flat bank can keep nothing, for topics
share nothing. It is measured as three large blocks a topic, the best that it can be, and as 336
blocks of one row each scattered over its file, by our reader and by one preadv after the other. The
hierarchical bank is measured with nothing kept, with level 1 on a RAM disk, and as the reader does
by itself, with the upper levels kept from the topic before.

Every block is read for the first time, so its checksum is computed. *Cold*: the pages were dropped
before; the kernel's count of bytes from the disk proves it. 440 MB lie on the RAM disk.

A thousand random texts are routed and fetched one after the other, as ``generate.py`` does before
an answer; every second memory is asked for layer by layer while it arrives. The bank's kept blocks
(256 MB) and MLX's cache of buffers fill during the first hundred, so growth is counted after those.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.common.counting import (
    HEATS,
    Timed,
    compared,
    evict,
    in_own_process,
    in_turns,
    open_files,
    returned,
    timed,
)
from benchmarks.common.models import (
    Key,
    file_parts,
    keys_of,
    make_bank,
    model_of,
    paper_config,
    random_retriever,
    random_texts,
    sibling,
    spread_paths,
)
from benchmarks.common.show import Result
from benchmarks.fetch.raw_reads import PLAIN, raw_read
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.bank import Bank, Manifest
from mlx_hmem.bank.read.arriving import ArrivingMemory
from mlx_hmem.budget.resident import resident_bytes
from mlx_hmem.config import ClusterPath, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.retriever import Retriever, load_encoder
from mlx_hmem.retriever.static import StaticEncoder

NUM_TOPICS = 4
LARGE = 3  # blocks; one alone, of over 32 MB, costs glibc's malloc a page fault for each page
RAM_DISK = Path("/dev/shm")
PAPER = {"flat": 198, "levels_ram_disk": 38, "same_level_1": 47}
WARM_UP = 100
WORDS, PROMPTS, SLOW_PROMPTS = 50, 200, 9


class Change(NamedTuple):
    """From the blocks ``before`` to the blocks ``keys`` of the bank in ``folder``."""

    folder: Path
    before: Sequence[Key]
    keys: Sequence[Key]
    keep: bool = False
    level_folders: dict[int, Path] | None = None


@contextmanager
def at_topic(change: Change) -> Iterator[Bank]:
    """The bank after it has read what was ``before``."""
    cache = 256 << 20 if change.keep else 0
    with Bank.open(change.folder, cache_bytes=cache, level_folders=change.level_folders) as bank:
        bank.blocks(change.before)
        yield bank


def changes_of_levels(folder: Path, config: MemoryConfig, topic: ClusterPath) -> dict[str, Change]:
    """Changes to ``topic`` from topics that share nothing, level 1, or levels 1 and 2 with it."""
    keys, *others = (
        sorted(keys_of(config, [path]))
        for path in (topic, *(sibling(config, topic, level) for level in (1, 2, 3)))
    )
    return {
        "levels": Change(folder, others[0], keys),
        "same_level_1": Change(folder, others[1], keys, keep=True),
        "same_levels_1_2": Change(folder, others[2], keys, keep=True),
    }


class Cases:
    """The banks in ``place``, and the changes to each of some topics."""

    def __init__(self, place: Path, ram: Path | None, config: MemoryConfig, num_topics: int):
        rows, topics = sum(config.r), spread_paths(config, num_topics)
        clusters = round(config.bank_parameters / config.fetched_parameters)
        sizes = (config.hidden_size, config.num_hidden_layers)
        large, scattered = (_draw(clusters, each, 2 * num_topics) for each in (LARGE, rows))
        self.changes = [
            {
                "flat": Change(place / "flat", large[~n], large[n]),
                "flat_scattered": Change(place / "scattered", scattered[~n], scattered[n]),
                **changes_of_levels(place / "levels", config, topic),
            }
            for n, topic in enumerate(topics)
        ]
        flat = MemoryConfig(*sizes, (rows // LARGE,), (clusters * LARGE,))
        one_row = MemoryConfig(*sizes, (1,), (clusters * rows,))
        self._make(place / "levels", config)
        self._make(place / "flat", flat)
        manifest = self._make(place / "scattered", one_row, shard_bytes=4 << 30)
        self.scattered = [
            file_parts(place / "scattered", manifest, keys) for keys in scattered[:num_topics]
        ]
        if ram is not None:
            for each in self.changes:
                each["levels_ram_disk"] = each["levels"]._replace(level_folders={1: ram})
            for file in (place / "levels").glob("level-1.*"):
                shutil.copy(file, ram)

    def _make(self, folder: Path, config: MemoryConfig, **how: Any) -> Manifest:
        """The bank with values in all blocks that the changes need."""
        changes = [c for some in self.changes for c in some.values() if c.folder == folder]
        keys = {key for c in changes for key in (*c.before, *c.keys)}
        return make_bank(folder, config, keys, **how)


def _draw(clusters: int, each: int, times: int) -> list[list[Key]]:
    """So many times ``each`` blocks out of the ``clusters * each`` of a flat bank, none twice."""
    drawn = np.random.default_rng(0).permutation(clusters * each)[: each * times]
    return [[(1, int(i)) for i in some] for some in drawn.reshape(times, each)]


def change(cases: Cases, name: str, heat: str, number: int) -> Timed:
    change = cases.changes[number % NUM_TOPICS][name]
    with at_topic(change) as bank:
        if heat == "cold":
            evict(change.folder.glob("*.safetensors"))
        else:
            with Bank.open(change.folder, cache_bytes=0) as reader:
                reader.blocks(change.keys)
        return timed(lambda: bank.blocks(change.keys))


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
    return {
        f"topics {warm_up} to {topics}": growth(found, warm_up),
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


def growth(found: list[tuple[int, int]], warm_up: int) -> dict[str, dict[str, int]]:
    """Resident bytes, mean and most, and the most open files in each fifth of the topics after
    ``warm_up``; the means move by some blocks, as other ones are kept."""
    rows: dict[str, dict[str, int]] = {
        name: {} for name in ("mean_resident_bytes", "most_resident_bytes", "open_files")
    }
    for number, fifth in enumerate(np.array_split(np.array(found[warm_up:]), 5), 1):
        figures = (fifth[:, 0].mean(), fifth[:, 0].max(), fifth[:, 1].max())
        for row, figure in zip(rows.values(), figures, strict=True):
            row[f"{number}/5"] = int(figure)
    return rows


def measure(topics: int = 1000, repeats: int = 15) -> Result:
    result: Result = {}
    with ExitStack() as places:
        place = Path(places.enter_context(tempfile.TemporaryDirectory()))
        ram = None
        if RAM_DISK.is_dir():
            ram = Path(places.enter_context(tempfile.TemporaryDirectory(dir=RAM_DISK)))
        cases = Cases(place, ram, paper_config("openlm-160m"), NUM_TOPICS)
        for heat in HEATS:
            contenders: dict[str, Callable[[int], Timed]] = {
                name: partial(change, cases, name, heat) for name in cases.changes[0]
            }
            contenders["flat_preadv"] = partial(raw_read, cases.scattered, PLAIN, heat)
            rows = compared(in_turns(contenders, repeats, heat, warm_up=False), "flat")
            for name, ms in PAPER.items():
                if name in rows:
                    rows[name] |= {"paper_ms": ms, "paper_of_flat": ms / PAPER["flat"]}
            result[heat] = rows
        result["routing a prompt"] = route_times()
        return result | in_own_process(walk, place / "levels", topics)
