"""What one fetch costs: bytes read, resident memory and time, out of a 4.6B-parameter bank.

``python -m benchmarks.bank_fetch [--json]``

The bank has the shape of the paper's for OpenLM-160M, r = (256, 64, 16, 0), in bfloat16: 9.2 GB,
sparse, with real values in the blocks of four paths. It lies in the temporary folder (set TMPDIR
to measure another disk) and is deleted afterwards. The small bank has blocks of the same size but
two children per cluster. Each bank is measured in a process of its own. A read is cold when the
files' pages were dropped from the page cache before it, which only Linux lets a program do.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import trange

from mlx_hmem.bank import Bank, write_bank
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, run_program

R = (256, 64, 16, 0)
LARGE = MemoryConfig(512, 35, R, (16, 16, 16, 16))
SMALL = MemoryConfig(512, 35, R, (2, 2, 2, 2))
REPEATS = 9
IO, STATUS = Path("/proc/self/io"), Path("/proc/self/status")
CAN_DROP = hasattr(os, "posix_fadvise")


def some_paths(config: MemoryConfig) -> list[tuple[int, ...]]:
    """Four paths spread over the bank."""
    last = config.num_clusters[-1]
    leaves = [last * i // 4 + i for i in range(4)]
    below = [math.prod(config.branching[i + 1 :]) for i in range(config.num_levels)]
    return [tuple(leaf // n for n in below) for leaf in leaves]


def make(folder: Path, config: MemoryConfig) -> None:
    rng = np.random.default_rng(0)
    paths = some_paths(config)

    def blocks(level: int) -> Iterator[np.ndarray | None]:
        wanted = {path[level - 1] for path in paths}
        for cluster in range(config.num_clusters[level - 1]):
            shape = config.block_shape(level)
            yield rng.standard_normal(shape, np.float32) if cluster in wanted else None

    levels = [blocks(level) if r else None for level, r in enumerate(config.r, 1)]
    write_bank(folder, config, levels, None, dtype="bfloat16", anchor_hash="none", tree_hash="none")


def io_counts() -> dict[str, int]:
    """The kernel's counts for this process: bytes asked of files, and bytes read from the disk."""
    if not IO.exists():
        return {}
    pairs = (line.split(": ") for line in IO.read_text().splitlines())
    return {key: int(value) for key, value in pairs if key in ("rchar", "read_bytes")}


def peak_memory() -> int:
    """Highest resident memory of this process so far, in bytes."""
    if STATUS.exists():  # getrusage on Linux counts the parent's memory before exec
        return int(STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def drop_pages(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path) -> dict[str, Any]:
    """Everything about one bank; to be run in a fresh process."""
    first = io_counts()
    own = {key: value - first[key] for key, value in io_counts().items()}  # what looking costs
    mx.eval(mx.zeros((1,)).view(mx.uint32))
    with contextlib.suppress(OSError):  # Linux: let the peak of the imports be forgotten
        Path("/proc/self/clear_refs").write_text("5")
    before_memory = peak_memory()
    with Bank.open(folder, cache_bytes=0) as bank:
        open_memory = peak_memory() - before_memory
        config, paths = bank.config, some_paths(bank.config)
        if CAN_DROP:
            drop_pages(folder)
        before = io_counts()
        bank.fetch(paths[0])
        after = io_counts()
        result = {
            "bank_parameters": config.bank_parameters,
            "bank_bytes": sum(p.stat().st_size for p in folder.iterdir()),
            "block_bytes": config.fetched_parameters * 2,
            "bytes_by_reader": bank.bytes_read,
            **{f"{key}_by_kernel": after[key] - before[key] - own[key] for key in after},
            "memory_of_open": open_memory,
        }
        for path in paths * 2:
            bank.fetch(path)
        result["memory_of_fetches"] = peak_memory() - before_memory
    return {**result, "ms": times(folder, paths)}


def times(folder: Path, paths: list[tuple[int, ...]]) -> dict[str, float]:
    """Medians in ms; raw reads and fetches of the same bytes take turns."""
    found: dict[str, list[float]] = defaultdict(list)
    with Bank.open(folder) as bank:
        pieces = {path: list(raw_pieces(folder, bank, path)) for path in paths}
    buffers = [memoryview(bytearray(size)) for _, _, size in pieces[paths[0]]]
    heats = ("cold", "warm") if CAN_DROP else ("warm",)

    for repeat, heat in product(trange(REPEATS, desc="fetching", leave=False, delay=2), heats):
        path = paths[repeat % len(paths)]

        def timed(name: str, work: Callable[[], object], heat: str = heat) -> None:
            if heat == "cold":
                drop_pages(folder)
            start = time.perf_counter()
            work()
            found[f"{name}_{heat}"].append((time.perf_counter() - start) * 1e3)

        def raw(path: tuple[int, ...] = path) -> None:
            for (file, offset, _), buffer in zip(pieces[path], buffers, strict=True):
                assert os.preadv(file, [buffer], offset) == len(buffer)

        timed("raw", raw)
        with Bank.open(folder, cache_bytes=0) as bank:
            fetch = partial(bank.fetch, path)
            timed("first", fetch)
            timed("later", fetch)
        with Bank.open(folder) as bank:
            bank.fetch(path)
            timed("cached", partial(bank.fetch, path), heat="warm")
    return {key: statistics.median(values) for key, values in found.items()}


def raw_pieces(folder: Path, bank: Bank, path: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(file descriptor, offset, bytes) of each block of a path, worked out from the manifest."""
    for level in bank.manifest.levels:
        cluster = path[level.level - 1]
        shard = next(s for s in reversed(level.shards) if s.first_cluster <= cluster)
        handle = os.open(folder / shard.file, os.O_RDONLY)
        row = cluster - shard.first_cluster
        yield handle, bank.manifest.page_size + row * level.block_stride, level.block_bytes


def run() -> dict[str, Any]:
    result: dict[str, Any] = {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "versions": f"Python {platform.python_version()}, mlx {version('mlx')}",
    }
    with tempfile.TemporaryDirectory() as place:
        for name, config in (("large", LARGE), ("small", SMALL)):
            folder = Path(place) / name
            make(folder, config)
            command = [sys.executable, "-m", "benchmarks.bank_fetch", "--measure", str(folder)]
            child = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            result[name] = json.loads(child.stdout)
    return result


def show(result: dict[str, Any]) -> None:
    banks = (result["large"], result["small"])
    print(f"{result['machine']}; {result['versions']}")

    def row(label: str, cells: Iterable[str]) -> None:
        print(f"{label:34}" + "".join(f"{cell:>22}" for cell in cells))

    row("", ("large bank", "small bank"))
    row("parameters", (f"{b['bank_parameters'] / 1e9:.3f} B" for b in banks))
    row("bytes of the files", (f"{b['bank_bytes'] / 1e9:.3f} GB" for b in banks))
    row("bytes of one path's blocks", (f"{b['block_bytes']:,}" for b in banks))
    for key, label in (
        ("bytes_by_reader", "read, by the reader's count"),
        ("rchar_by_kernel", "read, by the kernel's count"),
        ("read_bytes_by_kernel", "read from disk, kernel's count"),
    ):
        if key in banks[0]:
            row(label, (f"{b[key]:,} ({b[key] / b['block_bytes']:.3f} x)" for b in banks))
    row("peak memory growth, bytes: open", (f"{b['memory_of_open']:,}" for b in banks))
    row("  and nine fetches, no cache", (f"{b['memory_of_fetches']:,}" for b in banks))
    times = [b["ms"] for b in banks]
    for heat in ("cold", "warm"):
        if f"raw_{heat}" not in times[0]:
            continue
        row(f"{heat}: raw preadv of the bytes", (f"{ms[f'raw_{heat}']:.2f} ms" for ms in times))
        for key, label in (("first", "first fetch, with checksum"), ("later", "later fetch")):
            name, raw = f"{key}_{heat}", f"raw_{heat}"
            row(f"  {label}", (f"{ms[name]:.2f} ms ({ms[name] / ms[raw]:.2f} x)" for ms in times))
    row("fetch from the reader's cache", (f"{ms['cached_warm']:.3f} ms" for ms in times))


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    result = run()
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    run_program(main)
