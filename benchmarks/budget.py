"""Resident memory of our programs: ``python -m benchmarks.budget PART [--json]``.

``chat``: whether ``mlx_hmem.chat --memory-budget`` keeps to it. An anchor with random weights in 4
bits and the paper's bank for it in 4 bits (sparse files: 4.6 and 12.7 billion parameters, of which
the disk holds the blocks that are read). A conversation with history, each turn on another topic,
until the context of 2,048 tokens is full. The kernel says what the program has held at most
(VmHWM), and what an interpreter holds that has imported MLX; the budget is for the difference.
Whoever is seen beyond it is killed, as a phone's system does. With ``--control-group FOLDER``, a
Linux control group (version 1 or 2) that may have children, the kernel holds the limit: the pages
that it keeps of read files count then, and are let go of first. (RLIMIT_DATA is another thing: it
counts what is asked for too, ``data_above_bare_bytes``.)

``resident``: peaks of ``generate.py`` with a bank of 21.1 billion parameters, and without one. The
anchor has OpenLM-1B's shape, 1.4 billion parameters, all zero, so that its file is sparse and its
memory is not. The difference also holds the cluster tree (16 ** 4 leaves, 107 MB), the encoder and
the bank's manifest; in float32 a fetched memory in bfloat16 is converted, and so twice as large.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common.counting import bare, ended, in_turns, returned, run
from benchmarks.common.models import (
    GROUP,
    Anchor,
    Dtype,
    paper_config,
    random_anchor,
    random_texts,
    write_anchor,
    write_config,
    write_memory,
)
from benchmarks.common.show import Result, benchmark
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.budget.resident import parse_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors

CHAT = [sys.executable, "-m", "mlx_hmem", "chat", "--model"]
GENERATE = [sys.executable, str(Path(__file__).parents[1] / "generate.py"), "--model"]
BITS, CONTEXT = 4, 2048
TURNS, WORDS, ANSWER = 5, 380, 32  # 2,060 tokens: the last turn finds the context full
ENTER = 'echo $$ > "$0/cgroup.procs" && exec "$@"'
PROMPT = " ".join(f"w{number}" for number in range(20, 36))


def chat(
    anchor: Sequence[Anchor] = ("openlm-160m", "openlm-410m"),
    budget: Sequence[str] = ("400MB", "800MB"),
    dtype: Dtype = "float32",
    control_group: Path | None = None,
) -> Result:
    """A budget for each anchor; ``dtype`` is that of what is not quantised."""
    if len(budget) != len(anchor):
        raise UserError("budgets and anchors differ in number", len(budget), "give one for each")
    texts, before = random_texts(TURNS, WORDS, seed=7), bare()
    result: Result = {"bare_bytes": before["VmHWM"], "memory": {}}
    for name, text in zip(anchor, budget, strict=True):
        size = parse_bytes(text, "--budget")
        with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
            parameters = write_model(Path(place), name, dtype, texts)
            command, most = [*CHAT, place], before["VmHWM"] + size
            if control_group is not None:
                group = stack.enter_context(limited(control_group, most))
                command = ["sh", "-c", ENTER, str(group), *command]
            found, said = converse(command, size, texts, most)
            if control_group is not None:
                found |= counted(group)
        result["memory"][f"{name}, {BITS} bits and {dtype}"] = {
            "bank_parameters": parameters,
            "budget_bytes": size,
            "peak_above_bare_bytes": found["VmHWM"] - before["VmHWM"],
            "kept": found["VmHWM"] - before["VmHWM"] <= size,
            "data_above_bare_bytes": found["VmData"] - before["VmData"],
            "topics": sum(line.startswith("memory: fetched") for line in said),
            **found,
        }
        result[f"{name} said"] = said
    return result


def write_model(folder: Path, name: str, dtype: str, texts: Sequence[str]) -> int:
    """A model directory of the paper's shape; the parameters of its bank."""
    weights = named_parameters(random_anchor(name, dtype, BITS))
    save_safetensors(folder / "model.safetensors", weights)
    how = {"group_size": GROUP, "bits": BITS}
    write_config(folder, name, max_position_embeddings=CONTEXT, quantization=how)
    return write_memory(folder, name, texts, BITS)


def converse(
    command: Sequence[str], budget: int, texts: Sequence[str], most: int
) -> tuple[dict[str, Any], list[str]]:
    """One conversation, watched from here: beyond ``most`` resident bytes it is killed. Its peaks
    in bytes, and what it said."""
    options = ["--max-tokens", str(ANSWER), "--memory-budget", str(budget)]
    with tempfile.TemporaryFile("w+") as lines:
        lines.write("\n".join(["/history on", *texts, "/stats"]))
        lines.seek(0)
        given = {"stdin": lines, "stdout": subprocess.DEVNULL}
        work = partial(ended, [*command, *options], "stderr", most, **given)
        (said, status, peaks), took = returned(work)
    return {"status": status, "seconds": took.ms / 1e3, **peaks}, said.splitlines()


def _file(group: Path, *names: str) -> Path:
    """That of version 2 or of version 1."""
    found = next((group / name for name in names if (group / name).exists()), None)
    if found is None:
        raise UserError("not a control group of memory", group, f"it must have {names[0]}")
    return found


@contextlib.contextmanager
def limited(parent: Path, limit: int) -> Iterator[Path]:
    """A child of the group ``parent``, a folder of the control group file system, that holds its
    programs to ``limit`` bytes; it is gone at the end."""
    group = parent / f"mlx-hmem-{os.getpid()}"
    try:
        group.mkdir()
        _file(group, "memory.max", "memory.limit_in_bytes").write_text(str(limit))
    except OSError as error:
        raise UserError("cannot make a control group", error, "name one of your own") from None
    try:
        yield group
    finally:
        group.rmdir()


def counted(group: Path) -> dict[str, int]:
    """The most that a group has held in bytes, and how many programs were ended."""
    events = _file(group, "memory.events", "memory.oom_control").read_text().split()
    kills = int(events[events.index("oom_kill") + 1]) if "oom_kill" in events else 0
    peak = int(_file(group, "memory.peak", "memory.max_usage_in_bytes").read_text())
    return {"group_peak_bytes": peak, "group_kills": kills}


def resident(
    anchor: Anchor = "openlm-1b", dtype: Sequence[Dtype] = ("bfloat16",), repeats: int = 3
) -> Result:
    result: Result = {"bank_parameters": paper_config(anchor).bank_parameters}
    for each in dtype:
        with tempfile.TemporaryDirectory() as place:
            result |= peaks_of(Path(place), anchor, each, repeats)
    return result


def peaks_of(place: Path, anchor: str, dtype: str, repeats: int) -> Result:
    """Median peaks of generate.py, and how much more they are than with no bank."""
    for name in ("no bank", "bank"):
        write_anchor(place / name, anchor, dtype)
    write_memory(place / "bank", anchor, [PROMPT])

    def generate(folder: str, memory: str, _: int) -> tuple[int, dict[str, Any]]:
        options = ["--prompt", PROMPT, "--memory", memory, "--max-tokens", "4", "--json"]
        output, peak = run([*GENERATE, str(place / folder), *options])
        return peak, json.loads(output)

    runs = {"no bank": partial(generate, "no bank", "none")}
    for memory in ("none", "generic", "fetched"):
        runs[f"bank, --memory {memory}"] = partial(generate, "bank", memory)
    found = in_turns(runs, repeats, f"generate.py, {dtype}", warm_up=False)
    peaks = {name: [peak for peak, _ in each] for name, each in found.items()}
    [*_, (_, said)] = found["bank, --memory fetched"]
    fetched = sum(block["bytes"] for block in said["memory"]["blocks"])
    least = median(peaks["no bank"])
    rows = {
        name: {
            "peak_mb": median(each) / 1e6,
            "more_mb": (median(each) - least) / 1e6,
            "of_fetched": (median(each) - least) / fetched,
            "spread_mb": (max(each) - min(each)) / 1e6,
            "mlx_peak_mb": found[name][-1][1]["peak_memory_bytes"] / 1e6,
        }
        for name, each in peaks.items()
    }
    return {f"{dtype}: fetched_bytes": fetched, f"{anchor}, {dtype}": rows}


if __name__ == "__main__":
    benchmark(__doc__, {"chat": chat, "resident": resident}, bars=("of_fetched",))
