"""How fast is this machine at what this library asks of it? Ratios within one run, no verdict."""

import fcntl
import mmap
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import generate_step

from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.bank import Bank, Manifest, rewrite_bank
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.model.stream import AnchorWithMemory

from .found import Found
from .models import LARGE, PAPER, blocks, is_gpu, make, native, rows

F_NOCACHE = 48  # of macOS
PIECE = 8 << 20
ROUNDS = 5
PROMPT, TOKENS = 256, 24
LAUNCHES = 500


def seconds(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median, after a round that counts for nothing."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return median(times[1:])


def device(work: Path) -> Found:
    """Copies, products and small kernels."""
    large, size = mx.zeros((64 << 20) // 4) + 1, 2048 if is_gpu() else 768
    figures = {"copy, GB/s": 2 * large.nbytes / seconds(lambda: mx.eval(large + 1)) / 1e9}
    for dtype in dict.fromkeys((mx.float32, native())):
        a = mx.random.normal((size, size)).astype(dtype)
        mx.eval(a)
        spent = seconds(lambda a=a: mx.eval(a @ a))  # type: ignore[misc]
        figures[f"product, TFLOP/s, {str(dtype)[9:]}"] = 2 * size**3 / spent / 1e12

    def launches() -> None:
        x = mx.zeros(8)
        for _ in range(LAUNCHES):
            x = mx.sin(x)
        mx.eval(x)

    figures["a small kernel, µs"] = seconds(launches) / LAUNCHES * 1e6
    return Found(figures)


def fetch(work: Path) -> Found:
    """A path of the paper's 160M, 36 MB, fetched from the disk and from the page cache, beside a
    plain read of the same bytes."""
    config = MemoryConfig(LARGE.hidden_size, LARGE.num_hidden_layers, PAPER, (2, 2, 2, 2))
    rng = np.random.default_rng(0)

    def block(level: int, cluster: int) -> np.ndarray | None:
        shape = config.block_shape(level)
        return None if cluster or not level else rng.standard_normal(shape, np.float32)

    manifest = rewrite_bank(
        work / "bank", Manifest.planned(config, "bfloat16", None, "none", "none"), block
    )
    parts = [(level.shards[0].file, level.block_bytes) for level in manifest.levels]

    target = memoryview(mmap.mmap(-1, sum(size for _, size in parts)))
    target[:: mmap.PAGESIZE] = bytes(len(target[:: mmap.PAGESIZE]))

    def fetches(folder: Path) -> Callable[[], object]:
        bank = Bank.open(folder, cache_bytes=0)
        return lambda: mx.eval([b for b in bank.fetch((0, 0, 0, 0)).blocks if b is not None])

    def reads(folder: Path) -> Callable[[], object]:
        starts = [sum(size for _, size in parts[:i]) for i in range(len(parts))]
        cut = [target[s : s + size] for s, (_, size) in zip(starts, parts, strict=True)]
        files = [open(folder / name, "rb", buffering=0) for name, _ in parts]  # noqa: SIM115
        where = manifest.page_size
        return lambda: [os.preadv(f.fileno(), [t], where) for f, t in zip(files, cut, strict=True)]

    figures = {"MB": len(target) / 1e6}
    ways = {"fetch": fetches, "plain read": reads}
    for name, way in ways.items():
        figures[f"{name}, cold, ms"] = median(_cold(work, way) for _ in range(ROUNDS)) * 1e3
    for name, way in ways.items():
        figures[f"{name}, warm, ms"] = seconds(way(work / "bank")) * 1e3
    return Found(figures, said="a cold copy is one written past the page cache")


def _cold(work: Path, way: Callable[[Path], Callable[[], object]]) -> float:
    """Seconds to read a copy of the bank that is not in the page cache."""
    folder = work / "cold"
    folder.mkdir()
    for source in (work / "bank").iterdir():
        _copy_past_cache(source, folder / source.name)
    read = way(folder)
    start = time.perf_counter()
    read()
    spent = time.perf_counter() - start
    shutil.rmtree(folder)
    return spent


def _copy_past_cache(source: Path, target: Path) -> None:
    with open(source, "rb") as old, open(target, "wb", buffering=0) as new:
        if sys.platform == "darwin":
            fcntl.fcntl(new.fileno(), F_NOCACHE, 1)
        while piece := old.read(PIECE):
            new.write(piece)
        os.fsync(new.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(new.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def decode(work: Path) -> Found:
    """The paper's 160M with random weights, alone and with 18M parameters of memory."""
    model = make(LARGE, "ffn", PAPER, native())
    prompt, figures = mx.arange(PROMPT), dict[str, float]()

    def measure(name: str, anchor: object) -> None:
        # The first for nothing: a GPU makes kernels for some lengths when they first come.
        for tokens in (TOKENS if is_gpu() else 2, TOKENS):
            times = [time.perf_counter()]
            for _ in generate_step(prompt, anchor, max_tokens=tokens):  # type: ignore[arg-type]
                times.append(time.perf_counter())
        figures[f"first token, ms, {name}"] = (times[1] - times[0]) * 1e3
        figures[f"tokens/s, {name}"] = (TOKENS - 1) / (times[-1] - times[1])

    def attached(memory: object) -> AnchorWithMemory:
        return AnchorWithMemory(model.anchor, model.slot, memory)  # type: ignore[arg-type]

    measure("alone", attached(None))
    measure("memory attached", attached(rows(model.config, 1, native())))
    with FusedMemory(model.anchor, model.config) as fused:
        fused.set((*blocks(model.config, 1, native()), None))
        measure("memory fused", fused.anchor)
    return Found(figures | {"peak, GB": peak_resident_bytes() / 1e9})


def gradient(work: Path) -> Found:
    """Loss and gradient of a memory on the 160M's frozen anchor, two sequences of 128 tokens."""
    model = make(LARGE, "ffn", PAPER, native())
    ids = mx.random.randint(0, LARGE.vocab_size, (2, 129), key=mx.random.key(2))
    memory = rows(model.config, 1, native())

    def loss(*groups: mx.array) -> mx.array:
        logits = model.logits(ids[:, :-1], groups)
        return nn.losses.cross_entropy(logits.astype(mx.float32), ids[:, 1:], reduction="mean")

    step = mx.value_and_grad(loss, tuple(range(len(memory))))
    spent = seconds(lambda: mx.eval(step(*memory)), 2)
    return Found({"tokens/s": ids[:, 1:].size / spent, "peak, GB": peak_resident_bytes() / 1e9})
