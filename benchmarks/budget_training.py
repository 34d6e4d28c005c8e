"""Whether training memories keeps to a memory budget, counted from outside.

``python -m benchmarks.budget_training [--json] [--budget 2GB] [--context 512] [--steps 4]``

The paper's OpenLM-160M, frozen, in float32, and its bank of 4.6 billion parameters, of which each
step trains the blocks of one sequence, another path in each. Settings are those that
``mlx_hmem.train --memory-budget`` chooses. The steps run in a process of their own; the kernel
says what it has held at most, and what an interpreter holds that has imported MLX.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.budget import bare
from benchmarks.common.counting import machine, median
from mlx_hmem.budget.resident import parse_bytes, peak_resident_bytes
from mlx_hmem.errors import ArgumentParser, run_program
from train.cost.budget import fit, keep_to
from train.recipe.recipe import (
    AnchorSection,
    MemoriesSection,
    Recipe,
    TrainerConfig,
    WindowsSection,
)
from train.recipe.sections import TokenizerSection, TreeSection
from train.step.memories import MemoryTrainee
from train.step.start import anchor_shape
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress

RECIPE = Recipe(
    name="openlm-160m",
    tokenizer=TokenizerSection(vocab_size=50_432),
    tree=TreeSection(branching=(16, 16, 16, 16)),
    anchor=AnchorSection(512, 35, 12, 32, 2048),
    memories=MemoriesSection(r=(256, 64, 16, 0), training=TrainerConfig(batch_size=1)),
    dense=None,
)


def train_here(budget: int, context: int, steps: int) -> dict[str, Any]:
    """Real steps and a commit in this process, which should be a fresh one."""
    recipe = replace(RECIPE, windows=WindowsSection(context=context))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe, line = fit(recipe, budget, ["memories"], folder)
        check = keep_to(budget)
        memories, config = recipe.memories, recipe.memory_config
        rng, count = np.random.default_rng(0), memories.training.batch_size * (steps + 1)
        tokens = rng.integers(1, RECIPE.tokenizer.vocab_size, (count, context + 1))
        leaves = rng.integers(0, config.num_clusters[-1], count)
        paths = np.stack([leaves // 16**below for below in (3, 2, 1, 0)], axis=1)
        times = []
        with BlockStore(
            folder / "store", config, 0, memories.cache_bytes, cache_level_1=memories.cache_level_1
        ) as store:
            trainee = MemoryTrainee(
                anchor_shape(recipe), store, tokens, paths, 0, memories.training
            )
            for step in range(steps):
                start = time.perf_counter()
                trainee.step(np.array([step]), 1e-4, np.array([step + 1]))
                check()
                times.append(time.perf_counter() - start)
            trainee.save(folder, Progress({}, steps))
            blocks = store.num_touched
    return {
        "chosen": line,
        "step_s": median(times[1:]),
        "touched_blocks": blocks,
        "peak_bytes": peak_resident_bytes(),
    }


def measure(budget: int, context: int, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.budget_training", "--here", "--json"]
    command += ["--budget", str(budget), "--context", str(context), "--steps", str(steps)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, Any] = json.loads(output)
    above = found["peak_bytes"] - bare()["VmHWM"]
    return {
        "bank_parameters": RECIPE.memory_config.bank_parameters,
        "budget_bytes": budget,
        "tokens_per_step": context,
        "steps": steps,
        "peak_above_bare_bytes": above,
        "kept": above <= budget,
    } | found


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--budget", default="2GB", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--steps", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--here", action="store_true", help="in this process")
    args = parser.parse_args()
    work = train_here if args.here else measure
    result = work(parse_bytes(args.budget, "--budget"), args.context, args.steps)
    if args.json:
        print(json.dumps((machine() if not args.here else {}) | result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:<24}{value:,.1f}" if isinstance(value, float) else f"{name:<24}{value}")


if __name__ == "__main__":
    run_program(main)
