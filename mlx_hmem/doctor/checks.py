"""The checks, each run in a process of its own: what a device makes crash is one line of many.

``python -m mlx_hmem.doctor.checks NAME FOLDER`` writes what one found into the folder.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_hmem.errors import UserError

from .found import Found, SkippedError
from .machine import impersonal

LIMIT = 300  # seconds
FOUND = "found.json"  # what programs print would come between
PACKAGE = __package__


class Check(NamedTuple):
    module: str
    function: str
    about: str
    environment: dict[str, str] | None = None


EXACT = {"MLX_ENABLE_TF32": "0"}
CHECKS = {
    "ways": Check("exact", "ways", "a memory attached, fused, in a batch; against the CPU", EXACT),
    "rounding": Check("exact", "rounding", "how exact a float32 product is"),
    "rounding, TF32 off": Check("exact", "rounding", "the same, MLX_ENABLE_TF32=0", EXACT),
    "sums": Check("exact", "sums", "whether a gather's gradient has the same bits each time"),
    "demo": Check("programs", "bundle", "the demo's answers, also as a bundle for a phone"),
    "training": Check("programs", "training", "notes remembered, killed and gone on: same bits"),
    "turns": Check("turns", "turns", "threads, open files and memory in 1,000 turns of chat"),
    "device": Check("speed", "device", "copies, products, small kernels"),
    "fetch": Check("speed", "fetch", "36 MB of blocks, beside a plain read"),
    "decode": Check("speed", "decode", "OpenLM-160M with and without 18M of memory"),
    "gradient": Check("speed", "gradient", "a memory's gradient on the OpenLM-160M"),
}


@dataclass(frozen=True)
class Outcome:
    """``status``: "well", "wrong", "failed" (it raised or crashed) or "skipped"; ``said`` why."""

    name: str
    about: str
    status: str
    seconds: float
    said: str = ""
    figures: dict[str, float] = field(default_factory=dict)


def outcome_of(name: str, limit: float = LIMIT) -> Outcome:
    """Runs one check; what crashes or hangs is an outcome too."""
    check, began = CHECKS[name], time.perf_counter()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        work = Path(folder).resolve()
        said = _run(name, work, limit)
        spent = time.perf_counter() - began
        if said is None:
            found = json.loads((work / FOUND).read_text())
            return Outcome(name, check.about, seconds=spent, **found)
    return Outcome(name, check.about, "failed", spent, impersonal(said, work))


def _run(name: str, work: Path, limit: float) -> str | None:
    """What a check that failed said; None: it has written what it found."""
    # Modules are found where this process finds them. ``-m`` puts the current folder before all,
    # where a file may have a module's name: let it be an empty one. Nothing is downloaded.
    where = os.pathsep.join(map(os.path.abspath, sys.path))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": where}
    environment["PYTHONNODEBUGRANGES"] = "1"  # last words are short
    with subprocess.Popen(
        [sys.executable, "-m", f"{PACKAGE}.checks", name, str(work)],
        cwd=work, env=environment | (CHECKS[name].environment or {}), process_group=0,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        encoding="utf-8", errors="replace",
    ) as process:  # fmt: skip
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            return f"not done after {limit:g} seconds"
        finally:  # the programs that it has started too
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if (status := process.returncode) < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"{names.get(-status, f'signal {-status}')}: {said}"
    return None if status == 0 and (work / FOUND).exists() else said or "it said nothing"


def main() -> None:
    """One check, in this process."""
    name, folder = sys.argv[1:]
    if name not in CHECKS:
        raise UserError("no such check", name, f"use one of {', '.join(CHECKS)}")
    check = CHECKS[name]
    function = getattr(importlib.import_module(f".{check.module}", PACKAGE), check.function)
    try:
        found: Found = function(Path(folder))
    except SkippedError as why:
        said = {"status": "skipped", "said": str(why)}
    else:
        status = "wrong" if found.wrong else "well"
        said = asdict(found) | {"status": status, "said": found.wrong or found.said}
        del said["wrong"]
    (Path(folder) / FOUND).write_text(json.dumps(said))


if __name__ == "__main__":
    main()
