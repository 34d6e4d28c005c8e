"""The times of fetches, raw reads and copies of the same bytes, for benchmarks/bank_fetch.py.

A read is *cold* when the files' pages were dropped before it; the kernel's count of the bytes that
then came from the disk proves it. Contenders take turns in each round, another first each time; the
figures are medians.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from benchmarks.common.banks import FilePart, file_parts, keys_of
from benchmarks.common.counting import (
    CAN_DROP,
    Timed,
    evict,
    forget_peak,
    io_counts,
    median,
    timed,
)
from benchmarks.common.raw_reads import PLAIN, RawReader, Way, fastest_ways
from mlx_hmem.bank import Bank
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.config import ClusterPath
from mlx_hmem.memory import FetchedMemory

HEATS = ("cold", "warm") if CAN_DROP else ("warm",)
SCREENING = 3  # rounds in which every raw way is tried
FETCHES = ("first", "later", "in_float32")
Work = Callable[[], object]


def here(memory: FetchedMemory) -> FetchedMemory:
    """The memory when its blocks have been dequantised."""
    mx.eval([block for block in memory.blocks if block is not None])
    return memory


def in_float32(memory: FetchedMemory) -> tuple[mx.array, ...]:
    """What an anchor in float32 is given."""
    assert memory.rows is not None
    rows = tuple(group.astype(mx.float32) for group in memory.rows)
    mx.eval(*rows)
    return rows


def parts_of(bank: Bank, folder: Path, path: ClusterPath) -> list[FilePart]:
    return file_parts(folder, bank.manifest, sorted(keys_of(bank.config, [path])))


def make_ready(parts: Sequence[FilePart], heat: str) -> None:
    """Parts of files out of the page cache, or in it."""
    if heat == "cold":
        evict({part.file for part in parts})
    else:
        with RawReader(parts, PLAIN) as reader:
            reader.read()


def byte_counts(folder: Path, paths: Sequence[ClusterPath]) -> dict[str, Any]:
    """The bytes that one fetch reads by three counts, and the memory that fetches take. To be run
    first in its process."""
    first = io_counts()
    own = {key: value - first[key] for key, value in io_counts().items()}  # what looking costs
    mx.eval(mx.zeros((1,)).view(mx.uint32))
    forget_peak()
    start = peak_resident_bytes()
    with Bank.open(folder, cache_bytes=0) as bank:
        opened = peak_resident_bytes() - start
        parts = parts_of(bank, folder, paths[0])
        make_ready(parts, HEATS[0])
        before = io_counts()
        bank.fetch(paths[0])
        after = io_counts()
        result = {
            "bank_parameters": bank.config.bank_parameters,
            "bank_bytes": sum(p.stat().st_size for p in folder.iterdir()),
            "disk_use_bytes": sum(p.stat().st_blocks * 512 for p in folder.iterdir()),
            "fetched_parameters": bank.config.fetched_parameters,
            "block_bytes": sum(part.nbytes for part in parts),
            "bytes_by_reader": bank.bytes_read,
            **{f"{key}_by_kernel": after[key] - before[key] - own[key] for key in after},
            "memory_of_open": opened,
        }
        for path in [*paths, *paths]:
            bank.fetch(path)
        return result | {"memory_of_fetches": peak_resident_bytes() - start}


def fetch_times(folder: Path, paths: Sequence[ClusterPath], repeats: int) -> dict[str, Any]:
    """For each heat: the raw ways that were tried in earnest, medians in ms, and the share of the
    blocks' bytes that came from the disk in a fetch (least and most)."""
    with Bank.open(folder) as bank:
        parts = {path: parts_of(bank, folder, path) for path in paths}
    size = sum(part.nbytes for part in parts[paths[0]])
    result: dict[str, Any] = {}
    for heat in HEATS:
        best = fastest_ways(parts[paths[0]], heat == "cold", SCREENING)
        rounds = _Rounds(folder, list(dict.fromkeys([*best, PLAIN])), heat)
        for repeat in tqdm(range(repeats), desc=f"fetching, {heat}", leave=False, delay=2):
            path, other = paths[repeat % len(paths)], paths[(repeat + 1) % len(paths)]
            rounds.run(path, other, parts[path])
        result[heat] = rounds.result(size)
    return result


class _Rounds:
    """Times of the contenders; each runs once in a round."""

    def __init__(self, folder: Path, ways: Sequence[Way], heat: str):
        self.folder, self.ways, self.heat = folder, ways, heat
        self.found: dict[str, list[Timed]] = defaultdict(list)
        self.count = 0

    def run(self, path: ClusterPath, other: ClusterPath, parts: Sequence[FilePart]) -> None:
        contenders: list[Work] = [partial(self._raw, way, parts) for way in self.ways]
        contenders.append(partial(self._fetches, path, other, parts))
        if self.heat == "warm":
            contenders += [
                partial(self._kept, path),
                partial(self._copies, sum(part.nbytes for part in parts)),
            ]
        turn = self.count % len(contenders)
        for work in contenders[turn:] + contenders[:turn]:
            work()
        self.count += 1

    def result(self, size: int) -> dict[str, Any]:
        ms = {name: median(t.ms for t in found) for name, found in self.found.items()}
        raw = {str(way): ms.pop(str(way)) for way in self.ways}
        fetches = [t.disk_bytes / size for name in FETCHES for t in self.found[name]]
        reads = [t.disk_bytes / size for way in self.ways for t in self.found[str(way)]]
        return {
            "raw": raw,
            "fastest_raw": min(raw, key=raw.__getitem__),
            "ms": ms | {"raw": min(raw.values()), "raw_plain": raw[str(PLAIN)]},
            "cpu_ms": {name: median(t.cpu_ms for t in self.found[name]) for name in FETCHES},
            "fetches_from_disk": [min(fetches), max(fetches)],
            "raw_from_disk": [min(reads), max(reads)],
        }

    def _raw(self, way: Way, parts: Sequence[FilePart]) -> None:
        make_ready(parts, self.heat)
        with RawReader(parts, way) as reader:
            self.found[str(way)].append(timed(reader.read))

    def _fetches(self, path: ClusterPath, other: ClusterPath, parts: Sequence[FilePart]) -> None:
        works: list[Work] = [
            lambda: here(bank.fetch(path)),  # its checksums are computed
            lambda: here(bank.fetch(path)),  # and known to be right
            lambda: in_float32(bank.fetch(path)),
        ]
        with Bank.open(self.folder, cache_bytes=0) as bank:
            here(bank.fetch(other))  # threads are running, and there are buffers to use again
            for name, work in zip(FETCHES, works, strict=True):
                make_ready(parts, self.heat)
                self.found[name].append(timed(work))

    def _kept(self, path: ClusterPath) -> None:
        with Bank.open(self.folder, cache_bytes=1 << 30) as bank:
            bank.fetch(path)
            self.found["kept"].append(timed(lambda: here(bank.fetch(path))))

    def _copies(self, nbytes: int) -> None:
        """Plain copies: into memory that was used before, and into new memory."""
        source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        np.copyto(target, source)
        self.found["copy"].append(timed(lambda: np.copyto(target, source)))
        self.found["copy_fresh"].append(timed(lambda: np.copyto(np.empty_like(source), source)))


def first_of_process(folder: Path, path: ClusterPath, heat: str) -> float:
    """ms of the very first fetch of this process: threads begin and memory is new."""
    with Bank.open(folder) as bank:
        make_ready(parts_of(bank, folder, path), heat)
        return timed(lambda: here(bank.fetch(path))).ms
