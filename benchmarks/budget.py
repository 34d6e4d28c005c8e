"""Whether ``generate.py --memory-budget`` keeps to it, counted from outside.

``python -m benchmarks.budget [--json] [--anchor openlm-160m openlm-410m] [--budget 400MB 800MB]``

An anchor with random weights in 4 bits and the paper's bank for it in 4 bits (sparse files: 4.6 and
12.7 billion parameters, of which the disk holds the blocks that are read). A conversation with
history, each turn on another topic, until the context of 2,048 tokens is full. ``generate.py``
runs as a person runs it, in a process of its own. The kernel says what that has held at most
(VmHWM), and what an interpreter holds that has imported MLX; the budget is for the difference.

A limit is held from outside as well, as a phone's system holds it: whoever is seen beyond the
budget is killed. With ``--control-group FOLDER``, a group that may have children, the kernel holds
it: the pages that it keeps of read files count then, and are let go of first. (RLIMIT_DATA is
another thing: of anonymous memory it counts what is asked for too, ``data_above_bare_bytes``.)
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from benchmarks.common.banks import GROUP
from benchmarks.common.control_group import ControlGroup, control_group
from benchmarks.common.counting import machine
from benchmarks.common.models import random_texts, write_memory, write_tokenizer
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.budget.resident import parse_bytes
from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.files import save_safetensors, write_atomic

BITS, CONTEXT = 4, 2048
TURNS, WORDS, ANSWER = 5, 380, 32  # 2,060 tokens: the last turn finds the context full
PROGRAM = Path(__file__).parents[1] / "generate.py"
BARE = "import mlx.core; print(open('/proc/self/status').read())"


def write_model(folder: Path, name: str, dtype: str, texts: Sequence[str]) -> int:
    """A model directory of the paper's shape; the parameters of its bank."""
    mx.random.seed(0)
    anchor = Model(PRESETS[name])
    anchor.update(tree_map(lambda array: array.astype(getattr(mx, dtype)), anchor.parameters()))
    nn.quantize(anchor, group_size=GROUP, bits=BITS)
    save_safetensors(folder / "model.safetensors", named_parameters(anchor))
    how = {"quantization": {"group_size": GROUP, "bits": BITS}}
    config = asdict(PRESETS[name]) | {"max_position_embeddings": CONTEXT, "eos_token_id": 1} | how
    write_atomic(folder / "config.json", json.dumps(config))
    write_tokenizer(folder)
    return write_memory(folder, name, texts, BITS)


def status_of(text: str) -> dict[str, int]:
    """The sizes of /proc/PID/status, in bytes."""
    pairs = (line.split(":") for line in text.splitlines() if line.endswith(" kB"))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def bare() -> dict[str, int]:
    """What the interpreter holds with MLX imported."""
    command = [sys.executable, "-c", BARE]
    return status_of(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def converse(
    folder: Path, budget: int, texts: Sequence[str], most: int, group: ControlGroup | None = None
) -> dict[str, Any]:
    """One conversation, watched from here: beyond ``most`` resident bytes it is killed."""
    command = [sys.executable, str(PROGRAM), "--model", str(folder), "--chat"]
    command += ["--max-tokens", str(ANSWER), "--memory-budget", str(budget)]
    if group is not None:
        command = group.command(command)
    peaks: dict[str, int] = {}
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+") as said:
        lines.write("\n".join(["/history on", *texts, "/stats"]))
        lines.seek(0)
        process = subprocess.Popen(command, stdin=lines, stdout=subprocess.DEVNULL, stderr=said)
        while process.poll() is None:
            try:
                now = status_of(Path(f"/proc/{process.pid}/status").read_text())
            except OSError:
                break
            for name in ("VmHWM", "RssAnon", "VmData"):
                peaks[name] = max(peaks.get(name, 0), now.get(name, 0))
            if now.get("VmRSS", 0) > most:
                process.kill()
            time.sleep(0.01)
        process.wait()
        said.seek(0)
        output = said.read().splitlines()
    return {
        "status": process.returncode,
        "seconds": time.perf_counter() - start,
        "topics": sum(line.startswith("memory: fetched") for line in output),
        "peaks": peaks,
        "said": output,
        "control_group": None if group is None else group.counted(),
    }


def measure(name: str, dtype: str, budget: int, parent: Path | None = None) -> dict[str, Any]:
    texts = random_texts(TURNS, WORDS, seed=7)
    before = bare()
    with tempfile.TemporaryDirectory() as place:
        parameters = write_model(Path(place), name, dtype, texts)
        most = before["VmHWM"] + budget
        limited = contextlib.nullcontext() if parent is None else control_group(parent, most)
        with limited as group:
            found = converse(Path(place), budget, texts, most, group)
    return {
        "anchor": name,
        "dtype": dtype,
        "bank_parameters": parameters,
        "budget_bytes": budget,
        "bare_bytes": before["VmHWM"],
        "peak_above_bare_bytes": found["peaks"]["VmHWM"] - before["VmHWM"],
        "data_above_bare_bytes": found["peaks"]["VmData"] - before["VmData"],
    } | found


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    for run in result["runs"]:
        kept = "kept" if run["peak_above_bare_bytes"] <= run["budget_bytes"] else "NOT KEPT"
        ended = "ended well" if run["status"] == 0 else f"ENDED WITH {run['status']}"
        print(
            f"{run['anchor']}, {BITS} bits and {run['dtype']}, bank of "
            f"{run['bank_parameters'] / 1e9:.1f} B parameters: "
            f"{run['peak_above_bare_bytes'] / 1e6:.0f} of {run['budget_bytes'] / 1e6:.0f} MB, "
            f"{kept}; {ended}, {run['topics']} topics, {run['seconds']:.0f} s"
        )
        print(f"  bare interpreter {run['bare_bytes'] / 1e6:.0f} MB")
        if group := run["control_group"]:
            print(
                f"  held by a control group: {group['peak_bytes'] / 1e6:.0f} of "
                f"{group['limit_bytes'] / 1e6:.0f} MB with the pages of read files, "
                f"{group['kills']} programs ended"
            )
        for line in run["said"]:
            print(f"  {line}")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--anchor", nargs="+", default=["openlm-160m", "openlm-410m"])
    parser.add_argument("--budget", nargs="+", default=["400MB", "800MB"], help="of each anchor")
    parser.add_argument(
        "--dtype", default="float32", help="of what is not quantised (default: %(default)s)"
    )
    parser.add_argument(
        "--control-group", type=Path, metavar="FOLDER", help="the group to make a limited one in"
    )
    args = parser.parse_args()
    if len(args.budget) != len(args.anchor):
        parser.error("give as many budgets as anchors")
    if not os.path.exists("/proc/self/status"):
        parser.error("this counts with /proc, which this system has not")
    runs = [
        measure(name, args.dtype, parse_bytes(size, "--budget"), args.control_group)
        for name, size in zip(args.anchor, args.budget, strict=True)
    ]
    result = machine() | {"runs": runs}
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    run_program(main)
