"""What a change of topic costs: other blocks out of a flat bank and out of a hierarchical one.

``python -m benchmarks.topics [--json] [--plot FILE]``

The paper models, for imagined hardware, 198 ms for a flat bank, 38 ms for a hierarchical one and
47 ms for a change of topic inside the same upper levels; 47 to 198 is as the 80 rows of levels 2
and 3 to all 336. Here the same cases are measured on one disk, with banks of one size (4.6 billion
parameters) that give 18 million in bfloat16 for a topic. A flat bank can keep nothing, for topics
share nothing. It is measured as three large blocks a topic, the best that it can be, and as 336
blocks of one row each scattered over its file, by our reader and by one preadv after the other. The
hierarchical bank is measured with nothing kept, with level 1 on a RAM disk, and as the reader does
by itself, with the upper levels kept from the topic before.

Every block is read for the first time, so its checksum is computed. *Cold*: the pages were dropped
before; the kernel's count of bytes from the disk proves it. The banks are sparse files in the
temporary folder (TMPDIR), and 440 MB on the RAM disk.

Also what routing costs, and memory and open files over 1,000 topics in a row (many_topics.py).
"""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

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
from benchmarks.common.counting import CAN_DROP, Timed, evict, machine, median, timed
from benchmarks.common.plots import Panel, draw
from benchmarks.common.raw_reads import PLAIN, RawReader
from benchmarks.common.show import add_outputs, report
from benchmarks.many_topics import TOPICS, route_times, show_routes, show_walk, walk_in_child
from mlx_hmem.bank import Bank
from mlx_hmem.config import ClusterPath, MemoryConfig
from mlx_hmem.errors import ArgumentParser, run_program

REPEATS, NUM_TOPICS = 15, 4
LARGE = 3  # blocks; one alone, of over 32 MB, costs glibc's malloc a page fault for each page
RAM_DISK = Path("/dev/shm")
HEATS = ("cold", "warm") if CAN_DROP else ("warm",)
LABELS = {
    "flat": "flat: 3 large blocks",
    "flat_scattered": "flat: 336 scattered blocks",
    "flat_preadv": "  one preadv after the other",
    "levels": "hierarchical, nothing kept",
    "levels_ram_disk": "  level 1 on a RAM disk",
    "same_level_1": "  inside the same level 1",
    "same_levels_1_2": "  inside the same levels 1 and 2",
}
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


def measure(change: Change, heat: str) -> Timed:
    with at_topic(change) as bank:
        bank_files = list(change.folder.glob("*.safetensors"))
        if heat == "cold":
            evict(bank_files)
        else:
            with Bank.open(change.folder, cache_bytes=0) as reader:
                reader.blocks(change.keys)
        return timed(lambda: bank.blocks(change.keys))


def measure_preadv(parts: Sequence[FilePart], heat: str) -> Timed:
    with RawReader(parts, PLAIN) as reader:
        if heat == "cold":
            evict({part.file for part in parts})
        else:
            reader.read()
        return timed(reader.read)


def change_times(place: Path, ram: Path | None, config: MemoryConfig, repeats: int) -> Any:
    """For each heat and each case: median ms, its ratio to the flat bank, bytes from the disk."""
    cases = Cases(place, ram, config, NUM_TOPICS)
    result: dict[str, Any] = {}
    for heat in HEATS:
        found: dict[str, list[Timed]] = defaultdict(list)
        for repeat in tqdm(range(repeats), desc=f"changes, {heat}", leave=False, delay=2):
            changes = cases.changes[repeat % NUM_TOPICS]
            names = list(changes)
            for name in names[repeat % len(names) :] + names[: repeat % len(names)]:
                found[name].append(measure(changes[name], heat))
            parts = cases.scattered[repeat % NUM_TOPICS]
            found["flat_preadv"].append(measure_preadv(parts, heat))
        flat = median(t.ms for t in found["flat"])
        result[heat] = {
            name: {
                "ms": median(t.ms for t in found[name]),
                "of_flat": median(t.ms for t in found[name]) / flat,
                "disk_bytes": median(t.disk_bytes for t in found[name]),
            }
            for name in LABELS
            if name in found
        }
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    for heat in HEATS:
        print(f"{heat:36}{'ms':>9}{'of flat':>9}{'MB from disk':>14}{'paper, ms':>11}{'':>9}")
        for name, case in result["changes"][heat].items():
            paper = f"{PAPER[name]:11}{PAPER[name] / PAPER['flat']:9.2f}" if name in PAPER else ""
            print(
                f"  {LABELS[name]:34}{case['ms']:9.2f}{case['of_flat']:9.2f}"
                f"{case['disk_bytes'] / 1e6:14.2f}{paper}"
            )
    show_routes(result["routes"])
    show_walk(result["walk"])


def plot(result: dict[str, Any], target: Path) -> None:
    panels = []
    for heat in HEATS:
        bars = [(LABELS[n].strip(), c["ms"]) for n, c in result["changes"][heat].items()]
        panels.append(Panel(f"another topic's blocks, {heat}", "ms", bars))
    paper = [(LABELS[name].strip(), float(ms)) for name, ms in PAPER.items()]
    panels.append(Panel("the paper's model", "ms", paper))
    draw(target, panels, f"{result['machine']}; {result['versions']}")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_outputs(parser, REPEATS)
    parser.add_argument("--topics", type=int, default=TOPICS, help="in a row; default: %(default)s")
    args = parser.parse_args()
    config = paper_config("openlm-160m")
    with ExitStack() as places:
        place = Path(places.enter_context(tempfile.TemporaryDirectory()))
        ram = None
        if RAM_DISK.is_dir():
            ram = Path(places.enter_context(tempfile.TemporaryDirectory(dir=RAM_DISK)))
        result = machine() | {"changes": change_times(place, ram, config, args.repeats)}
        result["routes"] = route_times()
        result["walk"] = walk_in_child(place / "levels", args.topics)
    report(result, args, show, plot)


if __name__ == "__main__":
    run_program(main)
