"""What converting a whole model from PyTorch costs: seconds against copying, and peak memory.

``python -m benchmarks.convert [--rounds N] [--json]``

The model is OpenLM-160M with the paper's bank for it, r = (256, 64, 16, 0) in a tree of 16^4, all
bfloat16 (9.6 GB): zeros but for a text's blocks, as ``.pt`` files in PyTorch's layout, in the
temporary folder (set TMPDIR to measure another disk), where 30 GB must be free. Each round copies
the files, converts them in a process of its own, and copies them again, because a disk may be twice
as fast at one moment as at the next; the ratio is the mean of the two copies ÷ the conversion.
Every file is synced; on Linux the page cache is dropped before each part. Then all is deleted.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common.counting import evict, in_own_process, timed
from benchmarks.common.models import paper_config, write_anchor, write_memory
from benchmarks.common.show import Result, benchmark
from convert.command import main as convert
from mlx_hmem.anchors.openlm import PRESETS
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.errors import UserError

ANCHOR = "openlm-160m"
MEMORY = paper_config(ANCHOR)
NEED = 30 << 30
TEXT = "the chemistry of iron and other metals"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def copied(source: Path, target: Path) -> float:
    """Seconds to copy all files, each synced."""

    def work() -> None:
        shutil.copytree(source, target)
        for path in files(target):
            with open(path, "rb") as file:
                os.fsync(file.fileno())

    evict(files(source))
    seconds = timed(work).ms / 1e3
    shutil.rmtree(target)
    return seconds


def convert_here(source: Path, target: Path) -> dict[str, Any]:
    """Seconds and peak memory of a conversion in this process, which should be a fresh one."""
    before, cpu = peak_resident_bytes(), os.times()
    seconds, after = timed(lambda: convert([str(source), str(target)])).ms / 1e3, os.times()
    return {
        "convert_s": seconds,
        "user_s": after.user - cpu.user,
        "system_s": after.system - cpu.system,
        "resident_bytes_before": before,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def measure(rounds: int = 1) -> Result:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if shutil.disk_usage(folder).free < NEED:
            raise UserError("no room on the disk", name, f"{NEED:,} bytes are needed; set TMPDIR")
        source, model, copy = folder / "source", folder / "model", folder / "copy"
        before = folder / "before"
        write_anchor(before, ANCHOR, "bfloat16")
        write_memory(before, ANCHOR, [TEXT])
        convert([str(before), str(source), "--to", "pytorch"])
        results, last = dict[str, dict[str, Any]](), copied(source, copy)
        for number in range(rounds):
            evict(files(source))
            found = in_own_process(convert_here, source, model)
            shutil.rmtree(model)
            after = copied(source, copy)
            found |= {"copy_before_s": last, "copy_after_s": after}
            found["copy ÷ convert"] = (last + after) / 2 / found["convert_s"]
            results[f"round {number + 1}"], last = found, after
        size = sum(path.stat().st_size for path in files(source))
    tables = [n * r for n, r in zip(MEMORY.num_clusters, MEMORY.r, strict=True)]
    return {
        "source_bytes": size,
        "bank_parameters": MEMORY.bank_parameters,
        "largest_tensor_bytes": 2 * max(PRESETS[ANCHOR].vocab_size, *tables) * MEMORY.hidden_size,
        "rounds": results,
    }


if __name__ == "__main__":
    benchmark(__doc__, measure)
