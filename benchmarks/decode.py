"""What memory costs when one stream is decoded: attached, and fused into the anchor's own FFN.

``python -m benchmarks.decode [--json] [--plot FILE] [--bits 4]``

OpenLM-160M with random weights in float32 and the paper's r = (256, 64, 16, 0). The contenders take
turns, a few tokens each, and every ratio is the median of the ratios within one round, so that
other load on the machine hits all alike; the CPU time, of all threads, hardly sees it at all. A
decoding step reads each weight once, so the aim is the ratio of parameters, anchor / (anchor +
fetched).

With ``--bits`` the anchor is quantised, as mlx-lm does it, in groups of 64. A fetched memory stays
in float32, a tenth of the parameters and two fifths of the bytes, so both shares are given; such an
anchor has no fused form.

A contender with 16 rows of memory shows what the shapes of the matrices do by themselves. On the
Linux CPU a matrix whose rows are 2,048 floats, as those of the anchor's down are, is multiplied at
about 0.6 of the speed per weight of one of 2,064 or 2,384 floats, for its rows fall on the same
lines of the cache; so a fused anchor can be faster there than the anchor alone. Also measured
there: a vector times a matrix goes through sgemm, at much the same speed in either layout; a
strided slice of a matrix is copied on each product, a joined matrix is not; assignment to a slice
writes in place.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from tqdm import trange

from benchmarks.common.counting import machine
from benchmarks.common.plots import Panel, draw
from benchmarks.common.show import add_outputs, report
from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import PRESETS, Model
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.model.stream import AnchorWithMemory

R, BRANCHING = (256, 64, 16, 0), (16, 16, 16, 16)
FEW = 16  # rows of the contender that differs from the anchor in little but its shapes
ROUNDS, TOKENS, REPEATS = 11, 6, 5
GROUP = 64  # values of a quantised anchor that share a scale
PROMPT = list(range(5, 13))

LABELS = {
    "alone": "anchor alone",
    "attached": "memory attached",
    "fused": "memory fused",
    "fused_few": f"{FEW} rows of memory fused",
}

Blocks = tuple[mx.array | None, ...]


def random_blocks(config: MemoryConfig, seed: int) -> Blocks:
    keys = mx.random.split(mx.random.key(seed), config.num_levels)
    blocks = tuple(
        mx.random.normal(config.block_shape(level), scale=0.02, key=key) if r else None
        for level, (r, key) in enumerate(zip(config.r, keys, strict=True), 1)
    )
    mx.eval([block for block in blocks if block is not None])
    return blocks


def copy_of(anchor: Model, bits: int | None = None) -> Model:
    """Another anchor with the same arrays for weights, which may be quantised."""
    other = Model(anchor.args)
    if bits is not None:
        nn.quantize(other, group_size=GROUP, bits=bits)
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


def run(rounds: int, bits: int | None) -> dict[str, Any]:
    mx.random.seed(0)
    anchor = Model(PRESETS["openlm-160m"])
    mx.eval(anchor.parameters())
    parameters, config = count(anchor), memory_config(anchor, R, BRANCHING)
    topics = [random_blocks(config, seed) for seed in (1, 2)]
    rows = FetchedMemory(topics[0], config).rows
    assert rows is not None
    mx.eval(*rows)
    if bits is not None:
        nn.quantize(anchor, group_size=GROUP, bits=bits)
        mx.eval(anchor.parameters())
    attached = copy_of(anchor, bits)
    bound = AnchorWithMemory(attached, attach_memory(attached, config), rows)
    contenders: dict[str, Any] = {"alone": anchor, "attached": bound}
    configs, fused = {"attached": config}, None
    if bits is None:
        wide, shaped = copy_of(anchor), copy_of(anchor)
        fused = FusedMemory(wide, config)
        fused.set(topics[0])
        small = memory_config(anchor, (FEW,), BRANCHING[:1])
        FusedMemory(shaped, small).set(random_blocks(small, 3))
        contenders |= {"fused": wide, "fused_few": shaped}
        configs |= {"fused": config, "fused_few": small}

    seconds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for _ in trange(rounds, desc="decoding", leave=False, delay=2):
        for name, model in contenders.items():
            seconds[name].append(decode(model))
    alone, nbytes = seconds["alone"], sum(a.nbytes for a in named_parameters(anchor).values())
    extra = {name: configs[name].fetched_parameters if name in configs else 0 for name in seconds}
    return {
        **machine(),
        "bits": bits,
        "anchor_parameters": parameters,
        "anchor_bytes": nbytes,
        "fetched_parameters": config.fetched_parameters,
        "contenders": {
            name: {
                "tokens_per_s": 1 / statistics.median(wall for wall, _ in found),
                "of_alone": ratio(alone, found, 0),
                "of_alone_cpu": ratio(alone, found, 1),
                "by_parameters": parameters / (parameters + extra[name]),
                "by_bytes": nbytes / (nbytes + 4 * extra[name]),
            }
            for name, found in seconds.items()
        },
        "ms": switch_times(fused, topics) if fused is not None else {},
    }


def count(anchor: nn.Module) -> int:
    return sum(array.size for array in named_parameters(anchor).values())


def ratio(alone: list[tuple[float, float]], mine: list[tuple[float, float]], clock: int) -> float:
    return statistics.median(a[clock] / b[clock] for a, b in zip(alone, mine, strict=True))


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    bits = "float32" if result["bits"] is None else f"{result['bits']} bits"
    print(
        f"OpenLM-160M, {bits}: {result['anchor_parameters']:,} parameters, "
        f"{result['fetched_parameters']:,} fetched"
    )
    print(f"{'':26}{'tokens/s':>10}{'of alone':>10}{'by CPU time':>13}", end="")
    print(f"{'by parameters':>15}{'by bytes':>10}")
    for name, c in result["contenders"].items():
        print(
            f"{LABELS[name]:26}{c['tokens_per_s']:10.2f}{c['of_alone']:10.3f}"
            f"{c['of_alone_cpu']:13.3f}{c['by_parameters']:15.3f}{c['by_bytes']:10.3f}"
        )
    ms = result["ms"]
    if not ms:
        return
    print(
        f"another topic, all levels {ms['all_levels']:.1f} ms, last level {ms['last_level']:.1f} ms"
    )
    print(
        f"making the matrices wide {ms['join_and_set']:.0f} ms, narrow again {ms['clear']:.0f} ms"
    )


def plot(result: dict[str, Any], target: Path) -> None:
    found = result["contenders"]
    bars = [
        (f"{LABELS[name]}, {clock}", c[key])
        for name, c in found.items()
        if name != "alone"
        for key, clock in (
            ("of_alone", "measured"),
            ("by_parameters", "by parameters"),
            ("by_bytes", "by bytes"),
        )
    ]
    draw(
        target,
        [Panel("decoding speed ÷ the anchor's alone", "ratio", bars, 1.0)],
        f"{result['machine']}; {result['versions']}",
    )


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_outputs(parser, ROUNDS)
    parser.add_argument("--bits", type=int, choices=(8, 4), help="quantise the anchor")
    args = parser.parse_args()
    report(run(args.repeats, args.bits), args, show, plot)


if __name__ == "__main__":
    run_program(main)
