"""What one fetch costs, against the fastest raw read of the same bytes and a copy in memory.

Banks of the paper's shapes in bfloat16 and quantised to 8 and 4 bits, one at a time, measured in
processes of their own. A read is *cold* when the files' pages were dropped before it; the kernel's
count of the bytes that then came from the disk proves it. Contenders take turns.

A first fetch computes the checksums of the blocks it reads, a later one knows them. A quantised
block is fetched when its packed bytes are here. *In float32* is what an anchor in float32 is given:
fetched, joined, and on a CPU made floats. The first fetch of a process is also the first use of its
threads and of so much memory.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.common.counting import (
    HEATS,
    Timed,
    compared,
    forget_peak,
    in_own_process,
    in_turns,
    io_counts,
    timed,
)
from benchmarks.common.models import (
    ANCHORS,
    BITS,
    Anchor,
    Bits,
    FilePart,
    file_parts,
    keys_of,
    make_bank,
    paper_config,
    spread_paths,
)
from benchmarks.common.show import Result
from benchmarks.fetch.raw_reads import PLAIN, fastest_ways, make_ready, raw_read
from mlx_hmem.bank import Bank
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.config import ClusterPath
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.memory.packed import Rows, arrays_of

PROCESSES = 3  # whose first fetches are timed
SCREENING = 3  # rounds in which every raw way is tried
PATHS = {"openlm-160m": 4, "openlm-410m": 3, "openlm-1b": 2}
Paths = Sequence[ClusterPath]


def measure(
    anchors: Sequence[Anchor] = ANCHORS, bits: Sequence[Bits] = BITS, repeats: int = 15
) -> Result:
    """A table of bytes, and one of times for each bank and heat."""
    result: Result = {"bytes": {}}
    for name, anchor, each in [(f"{a}, {b} bits", a, b) for a in anchors for b in bits]:
        config = paper_config(anchor)
        paths = spread_paths(config, PATHS[anchor])
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            make_bank(folder, config, keys_of(config, paths), each)
            result["bytes"][name] = in_own_process(byte_counts, folder, paths)
            for heat in HEATS:
                way, rows = in_own_process(fetch_times, folder, paths, heat, repeats)
                result[f"{name}, {heat}: the fastest raw read"] = way
                result[f"{name}, {heat}"] = rows
                given = (first_of_process, folder, paths[0], heat)
                ms = median(in_own_process(*given) for _ in range(PROCESSES))
                rows["first_of_process"] = {"ms": ms, "of_raw": ms / rows["raw"]["ms"]}
    return result


def here(memory: FetchedMemory) -> FetchedMemory:
    """The memory when its blocks are here as they are stored."""
    mx.eval(arrays_in(memory))
    return memory


def arrays_in(memory: FetchedMemory) -> list[mx.array]:
    return [array for block in memory.stored if block is not None for array in arrays_of(block)]


def in_float32(memory: FetchedMemory) -> Rows:
    """What an anchor in float32 is given."""
    rows = memory.ready(mx.float32)
    assert rows is not None
    mx.eval(rows)
    return rows


def parts_of(folder: Path, paths: Paths) -> list[list[FilePart]]:
    """Where the blocks of each path lie."""
    with Bank.open(folder) as bank:
        keys = [sorted(keys_of(bank.config, [path])) for path in paths]
        return [file_parts(folder, bank.manifest, each) for each in keys]


def byte_counts(folder: Path, paths: Paths) -> dict[str, Any]:
    """The bytes that one fetch reads by three counts, and the memory that fetches take. To be run
    first in its process."""
    first = io_counts()
    own = {key: value - first[key] for key, value in io_counts().items()}  # what looking costs
    mx.eval(mx.zeros((1,)).view(mx.uint32))
    forget_peak()
    start = peak_resident_bytes()
    with Bank.open(folder, cache_bytes=0) as bank:
        opened = peak_resident_bytes() - start
        parts = file_parts(folder, bank.manifest, sorted(keys_of(bank.config, paths[:1])))
        make_ready(parts, HEATS[0])
        before = io_counts()
        held = sum(array.nbytes for array in arrays_in(bank.fetch(paths[0])))
        after = io_counts()
        result = {
            "bank_parameters": bank.config.bank_parameters,
            "bank_bytes": sum(p.stat().st_size for p in folder.iterdir()),
            "disk_use_bytes": sum(p.stat().st_blocks * 512 for p in folder.iterdir()),
            "fetched_parameters": bank.config.fetched_parameters,
            "block_bytes": sum(part.nbytes for part in parts),
            "bytes_by_reader": bank.bytes_read,
            "bytes_held": held,
            **{f"{key}_by_kernel": after[key] - before[key] - own[key] for key in after},
            "memory_of_open": opened,
        }
        for path in [*paths, *paths]:
            bank.fetch(path)
        return result | {"memory_of_fetches": peak_resident_bytes() - start}


def fetch_times(
    folder: Path, paths: Paths, heat: str, repeats: int
) -> tuple[str, dict[str, dict[str, Any]]]:
    """The fastest raw way, and the times of all contenders."""
    all_parts = parts_of(folder, paths)
    nbytes = sum(part.nbytes for part in all_parts[0])
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)

    def fetch(
        number: int, known: bool = False, wanted: Callable[[FetchedMemory], object] = here
    ) -> Timed:
        path, other = paths[number % len(paths)], paths[(number + 1) % len(paths)]
        with Bank.open(folder, cache_bytes=0) as bank:
            here(bank.fetch(other))  # threads are running, and there are buffers to use again
            if known:
                here(bank.fetch(path))  # its checksums are computed, and known to be right
            make_ready(all_parts[number % len(paths)], heat)
            return timed(lambda: wanted(bank.fetch(path)))

    def kept(number: int) -> Timed:
        path = paths[number % len(paths)]
        with Bank.open(folder, cache_bytes=1 << 30) as bank:
            bank.fetch(path)
            return timed(lambda: here(bank.fetch(path)))

    ways = dict.fromkeys([*fastest_ways(all_parts[0], heat, SCREENING), PLAIN])
    contenders: dict[str, Callable[[int], Timed]] = {
        str(way): partial(raw_read, all_parts, way, heat) for way in ways
    }
    contenders |= {
        "first": fetch,
        "later": partial(fetch, known=True),
        "in_float32": partial(fetch, known=True, wanted=in_float32),
    }
    copies: tuple[str, ...] = ()
    if heat == "warm":
        copies = ("copy", "copy_fresh")  # into memory that was used before, and into new memory
        contenders |= {
            "kept": kept,
            "copy": lambda _: timed(lambda: np.copyto(target, source)),
            "copy_fresh": lambda _: timed(lambda: np.copyto(np.empty_like(source), source)),
        }
    found = in_turns(contenders, repeats, f"fetching, {heat}", warm_up=False)
    raws = {str(way): found.pop(str(way)) for way in ways}
    fastest = min(raws, key=lambda way: median(t.ms for t in raws[way]))
    found = {"raw": raws[fastest], "raw_plain": raws[str(PLAIN)], **found}
    return fastest, compared(found, "raw", *copies)


def first_of_process(folder: Path, path: ClusterPath, heat: str) -> float:
    """ms of the very first fetch of this process: threads begin and memory is new."""
    make_ready(parts_of(folder, [path])[0], heat)
    with Bank.open(folder) as bank:
        return timed(lambda: here(bank.fetch(path))).ms
