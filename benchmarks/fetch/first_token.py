"""Time to the first token with a memory, against the anchor alone.

OpenLM-160M with random weights in float32, a bank of 4.6 billion parameters and its retriever,
through ``MemoryModel.fetch`` and ``stream_ids`` as
``generate.py`` uses them: the clock runs from before the route until the first token is there. The
memory is waited for, or read while the prompt is processed (``wait=False``); its pages are in the
page cache, or were dropped before it (*cold*, proven by the kernel's count), or its blocks are kept
by the reader. The contenders take turns, another first in each round; ratios are medians of the
ratios within a round. CPU time, of all threads, hardly sees other work on the machine.

What is cold costs more than what is warm by at most the time of the cold read less that of a warm
one; how much less says what the processing has hidden.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import mlx.core as mx
from mlx_lm.generate import generation_stream

from benchmarks.common.counting import CAN_DROP, Timed, compared, evict, in_turns, timed
from benchmarks.common.models import (
    Bits,
    copy_of,
    file_parts,
    keys_of,
    make_bank,
    model_of,
    paper_config,
    random_anchor,
    random_retriever,
)
from benchmarks.common.show import Result
from benchmarks.fetch.topics import fetch_all
from mlx_hmem.bank import Bank
from mlx_hmem.model.model import MemoryModel

ANCHOR = "openlm-160m"
SHORT = 64  # tokens; of such prompts four times as many rounds
TEXT = "the chemistry of iron and other metals"
# name: (wait, cold, kept by the reader)
CASES = {
    "waited_for, warm": (True, False, False),
    "read_meanwhile, warm": (False, False, False),
    "waited_for, kept": (True, False, True),
    "waited_for, cold": (True, True, False),
    "read_meanwhile, cold": (False, True, False),
}


def first_token(model: MemoryModel, ids: list[int], memory: str, wait: bool) -> None:
    fetch = model.fetch(TEXT, memory, wait=wait)
    # One token, so that none is computed ahead while the next contender runs.
    next(model.stream_ids(ids, fetch, max_tokens=1))


def measure(tokens: Sequence[int] = (512, 16), repeats: int = 7, bits: Bits = 16) -> Result:
    anchor, config, retriever = random_anchor(ANCHOR), paper_config(ANCHOR), random_retriever()
    result: Result = {}
    with tempfile.TemporaryDirectory() as name:
        place, keys = Path(name), keys_of(config, [retriever.route(TEXT)])
        manifest = make_bank(place / "bank", config, keys, bits)
        parts = file_parts(place / "bank", manifest, keys)
        files = {part.file for part in parts}
        result["fetched_bytes"] = sum(part.nbytes for part in parts)
        alone = model_of(place, anchor)
        banks = [Bank.open(place / "bank", cache_bytes=kept << 28) for kept in (0, 1)]
        models = [model_of(place, copy_of(anchor), retriever, bank) for bank in banks]

        def run(case: tuple[bool, bool, bool] | None, ids: list[int], _: int) -> Timed:
            mx.synchronize()
            mx.synchronize(generation_stream)
            if case is None:
                return timed(lambda: first_token(alone, ids, "none", True))
            wait, cold, kept = case
            if cold:
                evict(files)
            if not ids:
                return timed(lambda: fetch_all(models[kept], TEXT, wait))
            return timed(lambda: first_token(models[kept], ids, "fetched", wait))

        cases = {name: case for name, case in CASES.items() if CAN_DROP or not case[1]}
        for count in tokens:
            ids = [5 + 7 * i % 50_000 for i in range(count)]
            contenders: dict[str, Callable[[int], Timed]] = {"alone": partial(run, None, ids)}
            contenders |= {name: partial(run, case, ids) for name, case in cases.items()}
            for heat in ("warm", "cold"):
                if case := cases.get(f"waited_for, {heat}"):
                    contenders[f"no prompt, {heat}"] = partial(run, case, [])
            rounds = repeats if count > SHORT else 4 * repeats
            found = in_turns(contenders, rounds, f"{count} tokens")
            result[f"{count} tokens"] = compared(found, "alone")
            result[f"{count} tokens, cold less warm, ms"] = {
                name: median(
                    c.ms - w.ms
                    for c, w in zip(found[f"{name}, cold"], found[f"{name}, warm"], strict=True)
                )
                for name in ("waited_for", "read_meanwhile", "no prompt")
                if CAN_DROP
            }
        for bank in banks:
            bank.close()
    return result
