"""What converting a whole model from PyTorch costs: seconds against copying, and peak memory.

``python -m benchmarks.convert [--rounds N] [--json]``

The model is OpenLM-160M with the paper's bank for it, r = (256, 64, 16, 0) in a tree of 16^4, all
bfloat16 (9.6 GB): random bits, made on the spot in PyTorch's layout as ``.pt`` files, in the
temporary folder (set TMPDIR to measure another disk), where 30 GB must be free. Each round copies
the files, converts them in a process of its own, and copies them again, because a disk may be twice
as fast at one moment as at the next; the ratio is the mean of the two copies ÷ the conversion.
Every file is synced; on Linux the page cache is dropped before each part. Then all is deleted.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
import numpy as np
from tqdm import tqdm

from convert.command import main as convert
from convert.memory.model import LAYOUT_VERSION, MARKER, Marker
from convert.memory.tensors import matrices, table_name
from convert.torch_files.writer import Entry, write_torch
from mlx_hmem.anchors.openlm import PRESETS
from mlx_hmem.bank.format import num_blocks, stored_r
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.retriever import load_encoder

MEMORY = MemoryConfig(512, 35, (256, 64, 16, 0), (16, 16, 16, 16))
NEED = 30 << 30
PIECE = 1 << 24
FINITE = np.uint64(0xBFFFBFFFBFFFBFFF)  # clears the highest bit of each exponent


def random_bits(size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """``size`` bytes of bfloat16 numbers between -2 and 2."""
    for start in range(0, size, PIECE):
        count = min(PIECE, size - start)
        bits = rng.integers(0, 1 << 64, -(-count // 8), np.uint64) & FINITE
        yield bits.view(np.uint8)[:count]


def entry(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Entry:
    return name, "BF16", shape, random_bits(2 * int(np.prod(shape)), rng)


def make(folder: Path) -> None:
    """The model in PyTorch's layout."""
    rng = np.random.default_rng(0)
    args = PRESETS["openlm-160m"]
    hidden, inner = args.hidden_size, args.num_attention_heads * args.head_dim
    layer = {
        "attention.in_proj": (3 * inner, hidden),
        "attention.out_proj": (hidden, inner),
        "attention.q_norm": (inner,),
        "attention.k_norm": (inner,),
        "feed_forward.w12": (2 * args.intermediate_size, hidden),
        "feed_forward.w3": (hidden, args.intermediate_size),
        "attention_norm": (hidden,),
        "ffn_norm": (hidden,),
    }
    shapes = {"tok_embeddings.weight": (args.vocab_size, hidden), "norm.weight": (hidden,)}
    for i in range(args.num_hidden_layers):
        shapes |= {f"layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    (folder / "anchor").mkdir(parents=True)
    tensors = (entry(name, shape, rng) for name, shape in shapes.items())
    write_torch(folder / "anchor" / "model.pt", tensors)
    (folder / "anchor" / "model.json").write_text(
        json.dumps(
            {
                "hidden_dim": hidden, "n_layers": args.num_hidden_layers, "weight_tying": True,
                "n_heads": args.num_attention_heads, "head_dim": args.head_dim,
                "ffn_dim": args.intermediate_size, "vocab_size": args.vocab_size,
                "seq_len": args.max_position_embeddings, "qk_norm": True, "rope_theta": 100_000,
                "positional_embedding_type": "rotary",
            }
        )
    )  # fmt: skip
    files = list[str]()
    for level, r in tqdm(stored_r(MEMORY).items(), desc="making"):
        count, files = num_blocks(MEMORY, level), [*files, f"memory-{level}.pt"]
        tables = (
            entry(table_name(place, level, matrix.name), (count, r, matrix.width), rng)
            for place in MEMORY.memory_layers
            for matrix in matrices(MEMORY, r)
        )
        write_torch(folder / files[-1], tables)
    dim = load_encoder("static").dim
    levels = {
        f"level-{i}": rng.standard_normal((n, dim), np.float32)
        for i, n in enumerate(MEMORY.num_clusters, 1)
    }
    np.savez(folder / "tree.npz", **levels)  # type: ignore[arg-type]
    marker = Marker(LAYOUT_VERSION, MEMORY, "anchor", tuple(files), "tree.npz", "static")
    (folder / MARKER).write_text(json.dumps(asdict(marker)))


def drop_pages(folder: Path) -> None:
    """Takes the files out of the page cache; only Linux lets a program do that."""
    for path in folder.rglob("*") if hasattr(os, "posix_fadvise") else ():
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(source: Path, target: Path) -> float:
    """Seconds to copy all files, each synced."""
    drop_pages(source)
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def converted(source: Path, target: Path) -> dict[str, Any]:
    """Seconds and peak memory of a conversion in a process of its own."""
    drop_pages(source)
    command = [sys.executable, "-m", "benchmarks.convert", "--convert", str(source), str(target)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    shutil.rmtree(target)
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return result


def convert_here(source: Path, target: Path) -> dict[str, Any]:
    before, start, cpu = peak_resident_bytes(), time.perf_counter(), os.times()
    convert([str(source), str(target)])
    after = os.times()
    return {
        "convert_s": time.perf_counter() - start,
        "user_s": after.user - cpu.user,
        "system_s": after.system - cpu.system,
        "resident_bytes_before": before,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    if shutil.disk_usage(folder).free < NEED:
        raise UserError("no room on the disk", folder, f"{NEED:,} bytes are needed; set TMPDIR")
    source = folder / "source"
    make(source)
    results, copy = [], copied(source, folder / "copy")
    for _ in range(rounds):
        result = converted(source, folder / "model")
        again = copied(source, folder / "copy")
        result = {"copy_before_s": copy, "copy_after_s": again, **result}
        result["ratio"] = (copy + again) / 2 / result["convert_s"]
        results.append(result)
        copy = again
    largest = 2 * max(
        PRESETS["openlm-160m"].vocab_size * MEMORY.hidden_size,
        *(n * r * MEMORY.hidden_size for n, r in zip(MEMORY.num_clusters, MEMORY.r, strict=True)),
    )
    return {
        "source_bytes": sum(p.stat().st_size for p in source.rglob("*") if p.is_file()),
        "bank_parameters": MEMORY.bank_parameters,
        "largest_tensor_bytes": largest,
        "rounds": results,
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("SOURCE", "TARGET"),
                        help="only convert, and say what it cost")  # fmt: skip
    args = parser.parse_args()
    if args.convert:
        print(json.dumps(convert_here(*args.convert)))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.rounds)
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for name, value in result.items():
        if name != "rounds":
            print(f"{name:<24}{value:,}")
    for each in result["rounds"]:
        print()
        for name, value in each.items():
            print(f"{name:<24}" + (f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"))


if __name__ == "__main__":
    run_program(main)
