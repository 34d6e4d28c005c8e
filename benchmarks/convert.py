"""What converting a model costs: seconds against copying, and peak memory.

``python -m benchmarks.convert memory|gguf … [--rounds N] [--json]``

``memory``: from PyTorch. The model is OpenLM-160M with the paper's bank for it, r = (256, 64, 16,
0) in a tree of 16^4, all bfloat16 (9.6 GB): zeros but for a text's blocks, as ``.pt`` files in
PyTorch's layout, in the temporary folder (set TMPDIR to measure another disk), where 30 GB must be
free. Each round copies the files, converts them in a process of its own, and copies them again,
because a disk may be twice as fast at one moment as at the next; the ratio is the mean of the two
copies ÷ the conversion. Every file is synced; on Linux the page cache is dropped before each part.
Then all is deleted.

``gguf FILE``: a GGUF file, against a copy of what is written. ``--parity FOLDER`` compares besides,
with PyTorch and transformers installed, what they make of the file: every tensor with what the
package ``gguf`` dequantises, the ids of 1,000 first lines of FOLDER/*.jsonl.gz, the logits of the
first three of eight beginnings of 200 tokens (the last long enough of the last file), and the
perplexity of all eight.
"""

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from benchmarks.common.counting import evict, in_own_process, timed
from benchmarks.common.models import paper_config, write_anchor, write_memory
from benchmarks.common.show import Result, benchmark
from convert.anchors.keys import to_torch
from convert.command import main as convert
from convert.gguf.names import NAMES, to_theirs
from convert.torch_files.tensors import open_safetensors
from mlx_hmem.anchors.load import load_anchor, read_config
from mlx_hmem.anchors.openlm import PRESETS
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.errors import UserError, needed
from tests.helpers.places import ROOT

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


def memory(rounds: int = 1) -> Result:
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


def gguf(file: Path, parity: Path | None = None, rounds: int = 3) -> Result:
    with tempfile.TemporaryDirectory() as name:
        model, copy, results = Path(name, "model"), Path(name, "copy"), dict[str, dict[str, Any]]()
        for number in range(rounds):
            shutil.rmtree(model, ignore_errors=True)
            evict([file])
            found = in_own_process(convert_here, file, model)
            found["copy_s"] = copied(model, copy)
            found["copy ÷ convert"] = found["copy_s"] / found["convert_s"]
            results[f"round {number + 1}"] = found
        size = sum(path.stat().st_size for path in files(model))
        result: Result = {"source_bytes": file.stat().st_size, "written_bytes": size}
        result["rounds"] = results
        if parity:
            result["against others"] = against_others(file, model, parity, Path(name))
    return result


def against_others(file: Path, model: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    ours = AutoTokenizer.from_pretrained(model)
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    parts = sorted(corpus.glob("*.jsonl.gz"))
    texts = [
        text.partition("\n")[0] for part in parts for text in documents(part)[: 1000 // len(parts)]
    ]
    last = documents(parts[-1])[-100:]
    ids = [row[:200] for text in last if len(row := ours.encode(text)) >= 200][-8:]
    equal = sum(ours.encode(text) == theirs.encode(text) for text in tqdm(texts))
    found = {"lines": len(texts), "lines_of_equal_ids": equal} | tensors(file, model)
    return found | logits(file, model, np.array(ids), folder)


def documents(part: Path) -> list[str]:
    with gzip.open(part, "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def tensors(file: Path, model: Path) -> dict[str, int]:
    """How many tensors there are, and how many whose bits are those of the package."""
    package, config = needed("gguf", "this comparison"), read_config(model)
    names = NAMES[config["model_type"]]
    made = open_safetensors(sorted(model.glob("model*.safetensors"))).tensors
    shapes = {name: tensor.shape for name, tensor in made.items()}
    targets = to_torch(made, names.rules, shapes)
    # A gain minus one has lost bits: one is taken off theirs instead.
    ours = {target.name: target.pieces[0] for target in targets}
    ours = to_theirs(ours, replace(names, plus_one=False), config)
    found, equal = package.GGUFReader(file).tensors, 0
    for each in tqdm(found):
        numbers = package.dequantize(each.data, each.tensor_type)
        if names.plus_one and each.name.endswith("norm.weight"):
            numbers = numbers - np.float32(1)
        equal += np.array_equal(ours[each.name].read(), numbers.view("<u4"))
    return {"tensors": len(found), "tensors_of_equal_bits": equal}


def logits(file: Path, model: Path, ids: np.ndarray, folder: Path) -> dict[str, Any]:
    """Greatest differences from transformers, and the perplexity of both."""
    np.save(folder / "ids.npy", ids)
    (folder / file.name).symlink_to(file.resolve())
    program = ROOT / "tests" / "helpers" / "torch_models.py"
    subprocess.run([sys.executable, program, "gguf", folder], check=True)
    theirs = np.load(folder / "logits.npy", mmap_mode="r")
    anchor, _ = load_anchor(model)
    rows = [np.array(anchor(mx.array(row[None]))[0]) for row in ids]
    return {
        "greatest_difference": [float(np.abs(rows[i] - theirs[i]).max()) for i in range(3)],
        "greatest_logit": [float(np.abs(rows[i]).max()) for i in range(3)],
        "perplexity": perplexity(rows, ids),
        "transformers_perplexity": perplexity(theirs, ids),
    }


def perplexity(rows: Sequence[np.ndarray], ids: np.ndarray) -> float:
    losses = []
    for numbers, row in zip(rows, ids, strict=True):
        wide = numbers[:-1].astype(np.float64)
        chosen = wide[np.arange(len(row) - 1), row[1:]]
        most = wide.max(axis=1)
        losses.append(np.log(np.exp(wide - most[:, None]).sum(axis=1)) + most - chosen)
    return math.exp(np.concatenate(losses).mean())


if __name__ == "__main__":
    benchmark(__doc__, {"memory": memory, "gguf": gguf})
