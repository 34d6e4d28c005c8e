"""What memory costs when one stream is decoded: attached, and fused into the anchor's own FFN.

``python -m benchmarks.decode [--json]``

OpenLM-160M with random weights in float32 and the paper's r = (256, 64, 16, 0). The contenders take
turns, a few tokens each, and every ratio is the median of the ratios within one round, so that
other load on the machine hits all alike; the CPU time, of all threads, hardly sees it at all. A
decoding step reads each weight once, so the aim is the ratio of parameters, anchor / (anchor +
fetched).

A contender with 16 rows of memory shows what the shapes of the matrices do by themselves. On the
Linux CPU a matrix whose rows are 2,048 floats, as those of the anchor's down are, is multiplied at
about 0.6 of the speed per weight of one of 2,064 or 2,384 floats, for its rows fall on the same
lines of the cache; so a fused anchor can be faster there than the anchor alone. Also measured
there: a vector times a matrix goes through sgemm, at much the same speed in either layout; a
strided slice of a matrix is copied on each product, a joined matrix is not; assignment to a slice
writes in place.
"""

import json
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from itertools import islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from tqdm import trange

from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.generation import AnchorWithMemory
from mlx_hmem.memory import FetchedMemory

R, BRANCHING = (256, 64, 16, 0), (16, 16, 16, 16)
FEW = 16  # rows of the contender that differs from the anchor in little but its shapes
ROUNDS, TOKENS, REPEATS = 11, 6, 5
PROMPT = list(range(5, 13))

Blocks = tuple[mx.array | None, ...]


def random_blocks(config: MemoryConfig, seed: int) -> Blocks:
    keys = mx.random.split(mx.random.key(seed), config.num_levels)
    blocks = tuple(
        mx.random.normal(config.block_shape(level), scale=0.02, key=key) if r else None
        for level, (r, key) in enumerate(zip(config.r, keys, strict=True), 1)
    )
    mx.eval([block for block in blocks if block is not None])
    return blocks


def copy_of(anchor: Model) -> Model:
    """Another anchor with the same arrays for weights."""
    other = Model(anchor.args)
    other.update(anchor.parameters())
    return other


def decode(model: Any) -> tuple[float, float]:
    """Seconds and CPU seconds per token."""
    steps = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS + 2)
    next(steps)  # the prompt; mlx-lm computes one token ahead
    start, cpu_start = time.perf_counter(), time.process_time()
    count = sum(1 for _ in islice(steps, TOKENS))
    return (time.perf_counter() - start) / count, (time.process_time() - cpu_start) / count


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def switch_times(fused: FusedMemory, topics: list[Blocks]) -> dict[str, float]:
    """Median ms of taking another topic's blocks, of its last level only, and of join and clear."""
    found = defaultdict(list)
    for repeat in range(REPEATS):
        first, second = topics[repeat % 2], topics[1 - repeat % 2]
        fused.set(first)
        found["all_levels"].append(milliseconds(lambda new=second: fused.set(new)))  # type: ignore[misc]
        last = (*second[:2], first[2], None)
        found["last_level"].append(milliseconds(lambda new=last: fused.set(new)))  # type: ignore[misc]
    found["clear"].append(milliseconds(fused.clear))
    found["join_and_set"].append(milliseconds(lambda: fused.set(topics[0])))
    return {name: statistics.median(times) for name, times in found.items()}


def run() -> dict[str, Any]:
    mx.random.seed(0)
    anchor = Model(PRESETS["openlm-160m"])
    mx.eval(anchor.parameters())
    config = memory_config(anchor, R, BRANCHING)
    topics = [random_blocks(config, seed) for seed in (1, 2)]
    rows = FetchedMemory(topics[0], config).rows
    assert rows is not None
    mx.eval(*rows)
    attached, wide, shaped = copy_of(anchor), copy_of(anchor), copy_of(anchor)
    bound = AnchorWithMemory(attached, attach_memory(attached, config), rows)
    fused = FusedMemory(wide, config)
    fused.set(topics[0])
    small = memory_config(anchor, (FEW,), BRANCHING[:1])
    FusedMemory(shaped, small).set(random_blocks(small, 3))

    configs = {"attached": config, "fused": config, "fused_few": small}
    contenders = {"alone": anchor, "attached": bound, "fused": wide, "fused_few": shaped}
    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in trange(ROUNDS, desc="decoding", leave=False, delay=2):
        for name, model in contenders.items():
            seconds[name].append(decode(model))
    alone = seconds["alone"]
    return {
        "machine": f"{platform.system()} {platform.machine()}, {mx.default_device()}",
        "versions": f"Python {platform.python_version()}, mlx {version('mlx')}",
        "anchor_parameters": count(anchor),
        "fetched_parameters": config.fetched_parameters,
        "contenders": {
            name: {
                "tokens_per_s": 1 / statistics.median(wall for wall, _ in found),
                "of_alone": ratio(alone, found, 0),
                "of_alone_cpu": ratio(alone, found, 1),
                "by_parameters": share(anchor, configs.get(name)),
            }
            for name, found in seconds.items()
        },
        "ms": switch_times(fused, topics),
    }


def count(anchor: nn.Module) -> int:
    return sum(array.size for array in named_parameters(anchor).values())


def share(anchor: nn.Module, config: MemoryConfig | None) -> float:
    return count(anchor) / (count(anchor) + (config.fetched_parameters if config else 0))


def ratio(alone: list[tuple[float, float]], mine: list[tuple[float, float]], clock: int) -> float:
    return statistics.median(a[clock] / b[clock] for a, b in zip(alone, mine, strict=True))


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    print(
        f"OpenLM-160M, float32: {result['anchor_parameters']:,} parameters, "
        f"{result['fetched_parameters']:,} fetched"
    )
    labels = {
        "alone": "anchor alone",
        "attached": "memory attached",
        "fused": "memory fused",
        "fused_few": f"{FEW} rows of memory fused",
    }
    print(f"{'':26}{'tokens/s':>10}{'of alone':>10}{'by CPU time':>13}{'by parameters':>15}")
    for name, c in result["contenders"].items():
        print(
            f"{labels[name]:26}{c['tokens_per_s']:10.2f}{c['of_alone']:10.3f}"
            f"{c['of_alone_cpu']:13.3f}{c['by_parameters']:15.3f}"
        )
    ms = result["ms"]
    print(
        f"another topic, all levels {ms['all_levels']:.1f} ms, last level {ms['last_level']:.1f} ms"
    )
    print(
        f"making the matrices wide {ms['join_and_set']:.0f} ms, narrow again {ms['clear']:.0f} ms"
    )


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    result = run()
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    run_program(main)
