"""What one fetch costs, against the fastest raw read of the same bytes and a copy in memory.

``python -m benchmarks.bank_fetch [--json] [--plot FILE] [--anchors ...] [--bits ...]``

Banks of the paper's shapes (4.6, 12.7 and 21.1 billion parameters) in bfloat16 and quantised to 8
and 4 bits, all of them sparse files with real values in the blocks of a few paths only. They lie in
the temporary folder (set TMPDIR to measure another disk), one at a time, and are deleted
afterwards; each is measured in a process of its own. Cold reads are proven by the kernel's count of
bytes from the disk; only Linux lets a program drop pages.

A first fetch computes the checksums of the blocks it reads, a later one knows them. *In float32* is
what an anchor in float32 is given: fetched, dequantised where quantised, joined and converted. The
first fetch of a process is also the first use of its threads and of so much memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.banks import BITS, R, keys_of, make_bank, paper_config, spread_paths
from benchmarks.common.counting import machine, median
from benchmarks.common.fetch_times import HEATS, byte_counts, fetch_times, first_of_process
from benchmarks.common.plots import Panel, draw
from benchmarks.common.show import add_outputs, report
from mlx_hmem.errors import ArgumentParser, run_program

REPEATS, PROCESSES = 15, 3
PATHS = {"openlm-160m": 4, "openlm-410m": 3, "openlm-1b": 2}


def measure_bank(anchor: str, bits: int, repeats: int) -> dict[str, Any]:
    config = paper_config(anchor)
    paths = spread_paths(config, PATHS[anchor])
    with tempfile.TemporaryDirectory() as place:
        make_bank(Path(place), config, keys_of(config, paths), bits)
        given = ("--child", place, "--anchors", anchor, "--repeats", repeats)
        result: dict[str, Any] = {"anchor": anchor, "bits": bits, **_child("all", *given)}
        for heat in HEATS:
            ms = [_child(heat, *given) for _ in range(PROCESSES)]
            result["times"][heat]["ms"]["first_of_process"] = median(ms)
    return result


def _child(what: str, *arguments: object) -> Any:
    """What another process measures of the bank."""
    command = [sys.executable, "-m", "benchmarks.bank_fetch", "--what", what, *map(str, arguments)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def _measure(folder: Path, anchor: str, what: str, repeats: int) -> Any:
    paths = spread_paths(paper_config(anchor), PATHS[anchor])
    if what in HEATS:
        return first_of_process(folder, paths[0], what)
    counts = byte_counts(folder, paths)
    return counts | {"times": fetch_times(folder, paths, repeats)}


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    for anchor in dict.fromkeys(bank["anchor"] for bank in result["banks"]):
        print()
        _show_anchor([bank for bank in result["banks"] if bank["anchor"] == anchor])


def _show_anchor(banks: Sequence[dict[str, Any]]) -> None:
    def row(label: str, cell: Callable[[dict[str, Any]], str]) -> None:
        print(f"{label:38}" + "".join(f"{cell(bank):>32}" for bank in banks))

    row(banks[0]["anchor"], lambda b: "bfloat16" if b["bits"] == 16 else f"{b['bits']} bits")
    row("parameters of the bank", lambda b: f"{b['bank_parameters'] / 1e9:.2f} B")
    row("bytes of its files", lambda b: f"{b['bank_bytes'] / 1e9:.2f} GB")
    row("  of which the disk holds", lambda b: f"{b['disk_use_bytes'] / 1e9:.2f} GB")
    row("bytes of one path's blocks", lambda b: f"{b['block_bytes']:,}")
    for key, label in (
        ("bytes_by_reader", "read, by the reader's count"),
        ("rchar_by_kernel", "read, by the kernel's count"),
        ("read_bytes_by_kernel", "from the disk, by the kernel's count"),
    ):
        if key in banks[0]:
            row(label, lambda b, key=key: f"{b[key]:,} ({b[key] / b['block_bytes']:.3f} x)")  # type: ignore[misc]
    row("peak memory growth, bytes: open", lambda b: f"{b['memory_of_open']:,}")
    row("  and fetches, nothing kept", lambda b: f"{b['memory_of_fetches']:,}")
    for heat in HEATS:
        _show_heat(row, heat)


def _show_heat(row: Callable[[str, Callable[[dict[str, Any]], str]], None], heat: str) -> None:
    def time(label: str, key: str, *against: str) -> None:
        def cell(bank: dict[str, Any]) -> str:
            ms = bank["times"][heat]["ms"]
            ratios = ", ".join(f"{ms[key] / ms[other]:.2f}" for other in against)
            return f"{ms[key]:.2f} ms" + (f" ({ratios} x)" if ratios else "")

        row(label, cell)

    def ratios(bank: dict[str, Any], against: str) -> str:
        ms = bank["times"]["warm"]["ms"]
        return " and ".join(f"{ms[key] / ms[against]:.2f} x" for key in ("first", "later"))

    def share(bank: dict[str, Any]) -> str:
        least, most = bank["times"][heat]["fetches_from_disk"]
        return f"{least:.3f} to {most:.3f} x"

    time(f"{heat}: fastest raw read", "raw")
    row("  which is", lambda b: b["times"][heat]["fastest_raw"])
    time("  one preadv of each block", "raw_plain", "raw")
    time("  first fetch, with checksum", "first", "raw")
    time("  later fetch", "later", "raw")
    time("  first fetch of a process", "first_of_process", "raw")
    time("  later fetch, in float32", "in_float32")
    row("  from the disk, of the bytes", share)
    if heat == "cold":
        return
    time("  kept in memory by the reader", "kept")
    for key, label in (("copy", "used"), ("copy_fresh", "new")):
        time(f"copy into {label} memory", key)
        row("  first and later fetch", lambda b, key=key: ratios(b, key))  # type: ignore[misc]


def plot(result: dict[str, Any], target: Path) -> None:
    """Ratios of the banks that are not quantised, then ms of all, anchor by anchor."""
    panels, plain = [], [bank for bank in result["banks"] if bank["bits"] == 16]
    for heat, against, what, aim in (
        ("cold", "raw", "the fastest raw read", 1.15),
        ("warm", "copy", "a copy into used memory", 1.5),
    ):
        if heat not in HEATS or not plain:
            continue
        bars = []
        for bank in plain:
            ms = bank["times"][heat]["ms"]
            bars += [(f"{bank['anchor']} {n}", ms[n] / ms[against]) for n in ("first", "later")]
        panels.append(Panel(f"{heat} fetch ÷ {what}, the aim dashed", "ratio", bars, aim))
    for anchor in dict.fromkeys(bank["anchor"] for bank in result["banks"]):
        bars = []
        for bank in (bank for bank in result["banks"] if bank["anchor"] == anchor):
            ms = bank["times"][HEATS[0]]["ms"]
            for key, label in (("raw", "raw"), ("later", "fetch"), ("in_float32", "in float32")):
                bars.append((f"{bank['bits']} bits: {label}", ms[key]))
        panels.append(Panel(f"{anchor}, {HEATS[0]}", "ms", bars))
    draw(target, panels, f"{result['machine']}; {result['versions']}")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_outputs(parser, REPEATS)
    parser.add_argument("--anchors", nargs="+", choices=R, default=list(R))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=BITS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--what", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_measure(args.child, args.anchors[0], args.what, args.repeats)))
        return
    pairs = [(anchor, bits) for anchor in args.anchors for bits in args.bits]
    result = {**machine(), "banks": [measure_bank(a, bits, args.repeats) for a, bits in pairs]}
    report(result, args, show, plot)


if __name__ == "__main__":
    run_program(main)
