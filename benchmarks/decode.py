"""What memory costs when one stream is decoded: attached, and fused into the anchor's own FFN.

``python -m benchmarks.decode [--json] [--plot FILE] [--bits 4]``

OpenLM-160M with random weights in float32 and the paper's r = (256, 64, 16, 0). The contenders take
turns, a few tokens each; the figures are for a token. A decoding step reads each weight once, so
the aim is the ratio of parameters, anchor / (anchor + fetched).

A memory of 4 bits takes part too, as the device multiplies it: packed on a GPU, floats on a CPU.

With ``--bits`` the anchor is quantised, as mlx-lm does it, in groups of 64. A fetched memory stays
in float32, a tenth of the parameters and two fifths of the bytes, so both shares are given; such an
anchor has no fused form.

A contender with 16 rows of memory shows what the shapes of the matrices do by themselves: those of
the anchor alone can be slow ones (docs/log.md), and a fused anchor faster than that.
"""

from functools import partial
from itertools import islice
from statistics import median
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step

from benchmarks.common.counting import Timed, compared, in_turns, timed
from benchmarks.common.models import BRANCHING, GROUP, R, copy_of, random_anchor
from benchmarks.common.show import Result, benchmark
from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.bank import Quantization
from mlx_hmem.bank.quantization import packed_block, quantize_block
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import Block, FetchedMemory
from mlx_hmem.memory.packed import arrays_of
from mlx_hmem.model.stream import AnchorWithMemory

ANCHOR = "openlm-160m"
FEW = 16  # rows of the contender that differs from the anchor in little but its shapes
TOKENS, SWITCHES = 6, 5
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


def packed(blocks: Blocks, config: MemoryConfig) -> tuple[Block | None, ...]:
    """The blocks in 4 bits, as a bank gives them out."""

    def each(level: int, block: mx.array) -> Block:
        how = Quantization(level, "affine", 4, GROUP)
        return packed_block(quantize_block(block, config, how), config, mx.float32, how)

    return tuple(None if b is None else each(level, b) for level, b in enumerate(blocks, 1))


def decode(model: Any, _: int) -> Timed:
    """Of one token."""
    steps = generate_step(mx.array(PROMPT), model, max_tokens=TOKENS + 2)
    next(steps)  # the prompt; mlx-lm computes one token ahead
    return timed(lambda: list(islice(steps, TOKENS)), times=TOKENS)


def switch_times(fused: FusedMemory, topics: list[Blocks]) -> dict[str, float]:
    """Median ms of taking another topic's blocks, of its last level only, and of join and clear."""
    every, last = [], []
    for repeat in range(SWITCHES):
        first, second = topics[repeat % 2], topics[1 - repeat % 2]
        fused.set(first)
        every.append(timed(partial(fused.set, second)).ms)
        last.append(timed(partial(fused.set, (*second[:2], first[2], None))).ms)
    narrow = timed(fused.clear).ms
    return {
        "another_topic": median(every),
        "its_last_level": median(last),
        "making_matrices_narrow": narrow,
        "and_wide_again": timed(partial(fused.set, topics[0])).ms,
    }


def measure(repeats: int = 11, bits: int | None = None) -> Result:
    plain, anchor = random_anchor(ANCHOR), random_anchor(ANCHOR, bits=bits)
    parameters = sum(array.size for array in named_parameters(plain).values())
    nbytes = sum(array.nbytes for array in named_parameters(anchor).values())
    config = memory_config(plain, R[ANCHOR], BRANCHING)
    topics = [random_blocks(config, seed) for seed in (1, 2)]
    contenders: dict[str, Any] = {"alone": anchor}
    configs, read = dict[str, MemoryConfig](), dict[str, int]()
    for name, blocks in {"": topics[0], " in 4 bits": packed(topics[0], config)}.items():
        rows, name = FetchedMemory(blocks, config).ready(mx.float32), f"memory{name} attached"
        assert rows is not None
        mx.eval(rows)
        attached, configs[name] = copy_of(anchor, bits), config
        contenders[name] = AnchorWithMemory(attached, attach_memory(attached, config), rows)
        read[name] = sum(array.nbytes for array in arrays_of(rows))
    result: Result = {"anchor_parameters": parameters, "fetched": config.fetched_parameters}
    if bits is None:
        wide, shaped, few = copy_of(anchor), copy_of(anchor), f"{FEW} rows of memory fused"
        fused, small = FusedMemory(wide, config), memory_config(anchor, (FEW,), BRANCHING[:1])
        fused.set(topics[0])
        FusedMemory(shaped, small).set(random_blocks(small, 3))
        contenders |= {"memory fused": wide, few: shaped}
        configs |= {"memory fused": config, few: small}
    found = in_turns({n: partial(decode, m) for n, m in contenders.items()}, repeats, "decoding")
    table = {}
    for name, times in compared(found, "alone").items():
        extra = configs[name].fetched_parameters if name in configs else 0
        table[name] = {
            "tokens/s": 1e3 / times["ms"],
            "of_alone": 1 / times["of_alone"],
            "by_cpu_time": 1 / times["of_alone_by_cpu"],
            "by_parameters": parameters / (parameters + extra),
            "by_bytes": nbytes / (nbytes + read.get(name, 4 * extra)),
        }
    result["one stream"] = table
    if bits is None:
        result["ms"] = switch_times(fused, topics)
    return result


if __name__ == "__main__":
    benchmark(__doc__, measure, bars=("of_alone", "by_parameters", "by_bytes"))
