"""Do different ways of computing one thing agree on this device?

Each check returns figures and what is wrong with them, nothing where all is well.
"""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.config import KINDS

from .found import Found
from .models import SMALL, blocks, make, native, rows

R = (8, 4)
# Of the logits' norm: some times what rounding alone is seen to do (1e-6, 0.05, 0.007), below what
# a level left out does (0.12). The largest difference alone would not tell these apart.
BOUNDS = {mx.float32: 1e-4, mx.bfloat16: 0.1, mx.float16: 0.02}
RUNS = 10


def ways(work: Path) -> Found:
    """A memory attached, fused and in a batch, in every kind, against the CPU in float32."""
    ids = mx.random.randint(0, SMALL.vocab_size, (2, 24), key=mx.random.key(1))
    figures, wrong = dict[str, float](), list[str]()
    for dtype in BOUNDS:
        name = str(dtype).removeprefix("mlx.core.")
        for kind in KINDS:
            for way, off in _differences(kind, dtype, ids).items():
                figures[f"{name}, {way}"] = max(off, figures.get(f"{name}, {way}", 0.0))
                if not off <= BOUNDS[dtype]:
                    wrong.append(f"{kind} {way} in {name}: off by {off:.2g} of the logits' norm")
    return Found(figures, "; ".join(wrong), "off by so much of the logits' norm, at most")


def _differences(kind: str, dtype: mx.Dtype, ids: mx.array) -> dict[str, float]:
    """Of the logits, by their norm."""
    model, exact = make(SMALL, kind, R, dtype), make(SMALL, kind, R, mx.float32)
    memories = [rows(model.config, seed, dtype) for seed in (1, 2)]
    alone = [model.logits(ids[i : i + 1], m) for i, m in enumerate(memories)]
    together = tuple(mx.stack(list(groups)) for groups in zip(*memories, strict=True))
    with mx.stream(mx.cpu):
        wanted = exact.logits(ids[:1], rows(exact.config, 1, mx.float32))
        mx.eval(wanted)
    found = {
        "device": _off(alone[0], wanted),
        "batch": _off(model.logits(ids, together), mx.concatenate(alone)),
    }
    if kind == "ffn":
        with FusedMemory(model.anchor, model.config) as fused:
            fused.set(tuple(blocks(model.config, 1, dtype)))
            found["fused"] = _off(fused.anchor(ids[:1]), alone[0])
    return found


def _off(found: mx.array, wanted: mx.array) -> float:
    a, b = (np.array(x.astype(mx.float32), np.float64) for x in (found, wanted))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def rounding(work: Path) -> Found:
    """How exact a float32 product is here; ``MLX_ENABLE_TF32`` is as the environment has it."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((512, 512), np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    off = np.abs(np.array(mx.array(a) @ mx.array(b)) - exact).max() / np.abs(exact).max()
    bits = "TF32, ten bits of fraction" if off > 1e-5 else "float32, 23 bits of fraction"
    asked = os.environ.get("MLX_ENABLE_TF32", "not set")
    return Found({"error of a product": float(off)}, said=f"{bits}; MLX_ENABLE_TF32 is {asked}")


def sums(work: Path) -> Found:
    """Whether the gradient of a gather whose rows repeat has the same bits each time. Training does
    not rest on it (train/step/sums.py)."""
    rng = np.random.default_rng(0)
    picks = mx.array(rng.integers(0, 8, 4096), mx.int32)
    weights = mx.array(rng.standard_normal((4096, 256), np.float32)).astype(native())
    table = mx.zeros((8, 256), native())

    def total(table: mx.array) -> mx.array:
        return (table[picks] * weights).sum()

    first, same = mx.grad(total)(table), 0
    for _ in range(RUNS):
        same += bool(mx.array_equal(mx.grad(total)(table), first))
    return Found({f"the same bits, of {RUNS} runs": same})
