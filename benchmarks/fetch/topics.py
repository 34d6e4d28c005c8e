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
"""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common.banks import (
    FilePart,
    Key,
    file_parts,
    keys_of,
    make_bank,
    paper_config,
    sibling,
    spread_paths,
)
from benchmarks.common.counting import (
    HEATS,
    Timed,
    compared,
    evict,
    in_own_process,
    in_turns,
    timed,
)
from benchmarks.common.show import Result
from benchmarks.fetch.raw_reads import PLAIN, raw_read
from benchmarks.fetch.walk import route_times, walk
from mlx_hmem.bank import Bank
from mlx_hmem.config import ClusterPath, MemoryConfig

NUM_TOPICS = 4
LARGE = 3  # blocks; one alone, of over 32 MB, costs glibc's malloc a page fault for each page
RAM_DISK = Path("/dev/shm")
PAPER = {"flat": 198, "levels_ram_disk": 38, "same_level_1": 47}


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
        self.changes: list[dict[str, Change]] = []
        for n, topic in enumerate(topics):
            of_levels = changes_of_levels(place / "levels", config, topic)
            self.changes.append(
                {
                    "flat": Change(place / "flat", large[~n], large[n]),
                    "flat_scattered": Change(place / "scattered", scattered[~n], scattered[n]),
                    **of_levels,
                }
            )
            if ram is not None:
                elsewhere = of_levels["levels"]._replace(level_folders={1: ram})
                self.changes[-1]["levels_ram_disk"] = elsewhere
        self._make(place / "levels", config)
        flat = MemoryConfig(*sizes, (rows // LARGE,), (clusters * LARGE,))
        self._make(place / "flat", flat)
        parts = self._make(
            place / "scattered", MemoryConfig(*sizes, (1,), (clusters * rows,)), 4 << 30
        )
        self.scattered = [[parts[key] for key in keys] for keys in scattered[:num_topics]]
        if ram is not None:
            for file in (place / "levels").glob("level-1.*"):
                shutil.copy(file, ram)

    def _make(
        self, folder: Path, config: MemoryConfig, shard_bytes: int = 64 << 20
    ) -> dict[Key, FilePart]:
        """The bank with values in all blocks that the changes need, and where those lie."""
        changes = [c for some in self.changes for c in some.values() if c.folder == folder]
        keys = sorted({key for c in changes for key in (*c.before, *c.keys)})
        manifest = make_bank(folder, config, set(keys), shard_bytes=shard_bytes)
        return dict(zip(keys, file_parts(folder, manifest, keys), strict=True))


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
