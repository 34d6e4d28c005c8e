"""Resident memory of ``generate.py`` with a bank of 21.1 billion parameters, less that without one.

``python -m benchmarks.resident [--json] [--plot FILE] [--dtype bfloat16 float32]``

The anchor has OpenLM-1B's shape, 1.4 billion parameters, all zero, so that its file is sparse
and its memory is not; bfloat16 is the paper's dtype. The bank is sparse but for the blocks of the
prompt's path (42 GB of files, 0.3 GB on the disk). The program itself runs as a person runs it, in
a process of its own; the kernel says its peak of resident memory when it ends. Without a bank: the
same anchor in a folder that has none. The difference also holds the cluster tree (16 ** 4 leaves,
107 MB), the encoder and the bank's manifest.

In float32 (5.8 GB of memory) a fetched memory in bfloat16 is converted, and so twice as large in
use as it was on the disk.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import trange

from benchmarks.common.banks import paper_config
from benchmarks.common.counting import machine, median
from benchmarks.common.models import DTYPES, write_anchor, write_memory
from benchmarks.common.plots import Panel, draw
from benchmarks.common.show import add_outputs, report
from mlx_hmem.errors import ArgumentParser, run_program

REPEATS, TOKENS = 3, 4
PROMPT = " ".join(f"w{number}" for number in range(20, 36))
PROGRAM = Path(__file__).parents[1] / "generate.py"
LABELS = {
    "no_bank": "no bank",
    "memory_none": "bank, --memory none",
    "generic": "bank, --memory generic",
    "fetched": "bank, memory fetched",
}


def peak_resident(folder: Path, memory: str) -> tuple[int, dict[str, Any]]:
    """Peak resident bytes of generate.py, and what it says with --json."""
    command = [sys.executable, str(PROGRAM), "--model", str(folder), "--prompt", PROMPT]
    command += ["--memory", memory, "--max-tokens", str(TOKENS), "--json"]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
        output.seek(0)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return peak, json.loads(output.read())


def measure(place: Path, anchor: str, dtype: str, repeats: int) -> dict[str, Any]:
    folders = {name: place / name for name in ("no_bank", "bank")}
    for folder in folders.values():
        folder.mkdir()
        write_anchor(folder, anchor, dtype)
    write_memory(folders["bank"], anchor, [PROMPT])
    runs = {
        "no_bank": (folders["no_bank"], "none"),
        "memory_none": (folders["bank"], "none"),
        "generic": (folders["bank"], "generic"),
        "fetched": (folders["bank"], "fetched"),
    }
    found: dict[str, list[int]] = {name: [] for name in runs}
    said: dict[str, Any] = {}
    for _ in trange(repeats, desc=f"generate.py, {dtype}", leave=False, delay=2):
        for name, run in runs.items():
            peak, said[name] = peak_resident(*run)
            found[name].append(peak)
    peaks = {name: int(median(values)) for name, values in found.items()}
    fetched = sum(block["bytes"] for block in said["fetched"]["memory"]["blocks"])
    return {
        "dtype": dtype,
        "bank_parameters": paper_config(anchor).bank_parameters,
        "fetched_bytes": fetched,
        "peak_bytes": peaks,
        "spread_bytes": {name: max(values) - min(values) for name, values in found.items()},
        "more_by_fetched_bytes": (peaks["fetched"] - peaks["no_bank"]) / fetched,
        "mlx_peak_bytes": {name: result["peak_memory_bytes"] for name, result in said.items()},
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    for run in result["runs"]:
        print(
            f"{result['anchor']}, {run['dtype']}, a bank of {run['bank_parameters'] / 1e9:.1f} B "
            f"parameters, {run['fetched_bytes'] / 1e6:.1f} MB fetched"
        )
        least = run["peak_bytes"]["no_bank"]
        for name, peak in run["peak_bytes"].items():
            ratio = (peak - least) / run["fetched_bytes"]
            print(
                f"  {LABELS[name]:26}{peak / 1e6:10.1f} MB{(peak - least) / 1e6:+10.1f} MB"
                f"{ratio:8.2f} x what is fetched"
            )


def plot(result: dict[str, Any], target: Path) -> None:
    panels = []
    for run in result["runs"]:
        least, size = run["peak_bytes"]["no_bank"], run["fetched_bytes"]
        more = [(LABELS[n], (p - least) / size) for n, p in run["peak_bytes"].items()]
        title = f"peak memory less that without a bank ÷ fetched bytes, {run['dtype']} (aim 2)"
        panels.append(Panel(title, "ratio", more, 2.0))
    draw(target, panels, f"{result['machine']}; {result['versions']}")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_outputs(parser, REPEATS)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--anchor", default="openlm-1b", help="default: %(default)s")
    args = parser.parse_args()
    runs = []
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as place:
            runs.append(measure(Path(place), args.anchor, dtype, args.repeats))
    report(machine() | {"anchor": args.anchor, "runs": runs}, args, show, plot)


if __name__ == "__main__":
    run_program(main)
