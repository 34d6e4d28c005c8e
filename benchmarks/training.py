"""``python -m benchmarks.training PART [--json]``: what training memory costs.

``step``: the step of the anchor alone, of memory on the frozen anchor and of both together, on the
same tokens, one after the other in every round. ``bank``: memory and step time with a bank of ten
times as many clusters and the same sequences. ``full``: steps with the paper's OpenLM-160M and its
bank of 4.6 billion parameters, each kind of training in a process of its own, with peak memory and
what the disk grew.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, run_program
from train.recipe.recipe import CotrainSection, TrainerConfig
from train.step.anchor import AnchorTrainee, initialise
from train.step.memories import MemoryTrainee
from train.step.trainee import Trainee
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress

# OpenLM-160M (paper, section 4), and its memory (256, 64, 16, 0) in a tree of 16^4.
ARGS = ModelArgs("openlm", 512, 35, 2048, 12, 32, 50432, tie_word_embeddings=True)
MEMORY = MemoryConfig(512, 35, (256, 64, 16, 0), (16, 16, 16, 16))
SMALL_ARGS = ModelArgs("openlm", 256, 8, 704, 4, 64, 4096, tie_word_embeddings=True)
SMALL = MemoryConfig(256, 8, (32, 16, 8), (16, 16, 4))
EOT = 0


def data(config: MemoryConfig, sequences: int, context: int, vocabulary: int) -> tuple[Any, Any]:
    """Random tokens, and for each sequence a path to a random leaf."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary, (sequences, context + 1)).astype(np.uint16)
    leaves = rng.integers(0, config.num_clusters[-1], sequences)
    under = [np.prod(config.branching[level:], dtype=int) for level in range(1, config.num_levels)]
    return tokens, np.stack([leaves // size for size in [*under, 1]], axis=1)


def anchor_of(args: ModelArgs) -> Model:
    model = Model(args)
    initialise(model, 0)
    return model


@contextlib.contextmanager
def trainee_of(
    kind: str, args: ModelArgs, config: MemoryConfig, training: TrainerConfig, data: tuple[Any, Any]
) -> Iterator[Trainee]:
    tokens, paths = data
    if kind == "anchor alone":
        yield AnchorTrainee(anchor_of(args), tokens, EOT, training)
        return
    cotrain = CotrainSection() if kind == "co-trained" else None
    with (
        tempfile.TemporaryDirectory() as folder,
        BlockStore(Path(folder), config, 0) as store,
    ):
        yield MemoryTrainee(anchor_of(args), store, tokens, paths, EOT, training, cotrain)


def timed(trainee: Trainee, step: int, size: int, sequences: int) -> float:
    rows, following = ((np.arange(size) + n * size) % sequences for n in (step, step + 1))
    start = time.perf_counter()
    trainee.step(rows, 1e-4, following)
    return time.perf_counter() - start


def step_times(steps: int, context: int, batch_size: int) -> dict[str, Any]:
    """Median seconds of a step by kind, the kinds in turn."""
    training = TrainerConfig(batch_size=batch_size)
    given = data(MEMORY, 4 * batch_size, context, ARGS.vocab_size)
    kinds = ["anchor alone", "frozen", "co-trained"]
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with contextlib.ExitStack() as stack:
        trainees = {
            kind: stack.enter_context(trainee_of(kind, ARGS, MEMORY, training, given))
            for kind in kinds
        }
        for step in tqdm(range(steps + 1), desc="step"):
            for kind, trainee in trainees.items():
                seconds = timed(trainee, step, batch_size, len(given[0]))
                if step:  # the first compiles
                    times[kind].append(seconds)
    medians = {kind: float(np.median(values)) for kind, values in times.items()}
    return {
        "tokens_per_step": context * batch_size,
        "steps": steps,
        **{f"{kind}, s": value for kind, value in medians.items()},
        **{f"{kind} ÷ anchor": medians[kind] / medians["anchor alone"] for kind in kinds[1:]},
    }


def resident_memory() -> int:
    """Bytes of this process that are not pages of a file; where only the peak is known, that."""
    if sys.platform == "darwin":
        return peak_resident_bytes()
    pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
    return (pages[1] - pages[2]) * os.sysconf("SC_PAGE_SIZE")


def of_bank(factor: int, steps: int) -> dict[str, float]:
    """Memory and step time with ``factor`` times the clusters on levels 2 and 3. The sequences, 64
    spread over all of the bank, come again and again: the cache is warm."""
    config = replace(SMALL, branching=(16, 16 * factor, 4))
    training = TrainerConfig(batch_size=8)
    given = data(config, 64, 64, SMALL_ARGS.vocab_size)
    times, cpu_times, most = list[float](), list[float](), 0
    with (
        tempfile.TemporaryDirectory() as folder,
        BlockStore(Path(folder), config, 0, cache_bytes=1 << 30) as store,
    ):
        model = anchor_of(SMALL_ARGS)
        trainee = MemoryTrainee(model, store, *given, EOT, training)
        for step in range(2 * steps):
            start = time.process_time()
            seconds = timed(trainee, step, 8, 64)
            if step >= steps:
                times.append(seconds)
                cpu_times.append(time.process_time() - start)
                most = max(most, resident_memory())
    return {
        "bank_parameters": config.bank_parameters,
        "resident_bytes": most,
        "step_s": float(np.median(times)),
        "step_cpu_s": float(np.median(cpu_times)),
    }


def full_run(kind: str, steps: int, context: int) -> dict[str, Any]:
    """Steps of the paper's shape in this process, which should be a fresh one."""
    training = TrainerConfig(batch_size=2, micro_batch_size=1, gradient_checkpointing=True)
    tokens, paths = data(MEMORY, 2 * steps, context, ARGS.vocab_size)
    cotrain = CotrainSection() if kind == "co-trained" else None
    mx.set_cache_limit(1 << 28)  # else freed buffers of every size stay
    with tempfile.TemporaryDirectory() as folder:
        with BlockStore(Path(folder), MEMORY, 0, cache_bytes=1 << 28) as store:
            trainee = MemoryTrainee(anchor_of(ARGS), store, tokens, paths, EOT, training, cotrain)
            times = [timed(trainee, step, 2, len(tokens)) for step in range(steps)]
            start = time.perf_counter()
            trainee.save(Path(folder), Progress({}, steps))
            commit = time.perf_counter() - start
            touched = store.num_touched
            size = sum(
                len(np.unique(paths[:, level - 1])) * store.record_bytes(level)
                for level in (1, 2, 3)
            )
        grown = os.stat(Path(folder) / "data.mdb").st_blocks * 512
    return {
        "kind": kind,
        "steps": steps,
        "tokens_per_step": 2 * context,
        "bank_parameters": MEMORY.bank_parameters,
        "step_s": float(np.median(times[1:])),
        "commit_s": commit,
        "peak_resident_bytes": peak_resident_bytes(),
        "disk_bytes": grown,
        "touched_blocks": touched,
        "touched_block_bytes": size,
    }


def in_own_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.training", *arguments, "--json"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("part", choices=["step", "bank", "full", "one-bank", "one-full"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--context", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch-size", type=int, default=2, help="for `step`")
    parser.add_argument("--kind", default="frozen", help="for `one-full`: frozen or co-trained")
    parser.add_argument("--factor", type=int, default=1, help="for `one-bank`")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    steps, context = str(args.steps), str(args.context)
    if args.part == "step":
        result: Any = step_times(args.steps, args.context, args.batch_size)
    elif args.part == "one-bank":
        result = of_bank(args.factor, args.steps)
    elif args.part == "one-full":
        result = full_run(args.kind, args.steps, args.context)
    elif args.part == "bank":
        result = [in_own_process("one-bank", "--factor", n, "--steps", steps) for n in ("1", "10")]
    else:
        result = [
            in_own_process("one-full", "--kind", k, "--steps", steps, "--context", context)
            for k in ("frozen", "co-trained")
        ]
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for each in result if isinstance(result, list) else [result]:
        for name, value in each.items():
            print(f"{name:<22}{value:,.3f}" if isinstance(value, float) else f"{name:<22}{value}")
        print()


if __name__ == "__main__":
    run_program(main)
