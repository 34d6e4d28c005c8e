"""Time to the first token with a memory, against the anchor alone.

``python -m benchmarks.first_token [--json] [--plot FILE] [--tokens 512 16]``

OpenLM-160M with random weights in float32, a bank of 4.6 billion parameters (sparse, in the
temporary folder) and its retriever, through ``MemoryModel.recall`` and ``stream_ids`` as
``generate.py`` uses them: the clock runs from before the route until the first token is there. The
memory is waited for, or read while the prompt is processed (``wait=False``); its pages are in the
page cache, or were dropped before it (*cold*, proven by the kernel's count), or its blocks are kept
by the reader. The contenders take turns, another first in each round; ratios are medians of the
ratios within a round. CPU time, of all threads, hardly sees other work on the machine.

What is cold costs more than what is warm by at most the time of the cold read less that of a warm
one; how much less says what the processing has hidden.
"""

import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream
from tqdm import tqdm

from benchmarks.common.banks import file_parts, keys_of, make_bank, paper_config
from benchmarks.common.counting import CAN_DROP, Timed, evict, machine, median, timed
from benchmarks.common.models import random_anchor, random_retriever, write_tokenizer
from benchmarks.common.plots import Panel, draw
from benchmarks.common.show import add_outputs, report
from mlx_hmem.anchors.openlm import Model
from mlx_hmem.bank import Bank
from mlx_hmem.bank.read.arriving import ArrivingMemory
from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.model.load import read_tokenizer
from mlx_hmem.model.model import MemoryModel

ANCHOR = "openlm-160m"
REPEATS, TOKENS = 7, (512, 16)
SHORT = 64  # tokens; of such prompts four times as many rounds
TEXT = "the chemistry of iron and other metals"
# name: (label, wait, cold, kept)
CASES = {
    "waited_warm": ("waited for, warm", True, False, False),
    "arriving_warm": ("read meanwhile, warm", False, False, False),
    "waited_kept": ("waited for, kept by the reader", True, False, True),
    "waited_cold": ("waited for, cold", True, True, False),
    "arriving_cold": ("read meanwhile, cold", False, True, False),
}


class Models:
    """The anchor alone, and two models around it: one keeps blocks, one does not."""

    def __init__(self, place: Path):
        anchor, config = random_anchor(ANCHOR), paper_config(ANCHOR)
        context = {"max_position_embeddings": anchor.args.max_position_embeddings}
        write_tokenizer(place)
        tokenizer, retriever = read_tokenizer(place, {"eos_token_id": 1}), random_retriever()
        keys = keys_of(config, [retriever.route(TEXT)])
        manifest = make_bank(place / "bank", config, keys)
        self.files = {part.file for part in file_parts(place / "bank", manifest, keys)}
        self.block_bytes = 2 * config.fetched_parameters
        self.banks = {kept: Bank.open(place / "bank", cache_bytes=kept << 28) for kept in (0, 1)}
        self.alone = MemoryModel(anchor, context, tokenizer)
        self.with_bank = {
            kept: MemoryModel(_copy_of(anchor), context, tokenizer, retriever, bank)
            for kept, bank in self.banks.items()
        }

    def prepare(self, cold: bool) -> None:
        if cold:
            evict(self.files)

    def close(self) -> None:
        for bank in self.banks.values():
            bank.close()


def _copy_of(anchor: Model) -> Model:
    """Another anchor with the same arrays for weights."""
    other = Model(anchor.args)
    other.update(anchor.parameters())
    return other


def first_token(model: MemoryModel, ids: list[int], memory: str, wait: bool) -> None:
    recall = model.recall(TEXT, memory, wait=wait)
    # One token, so that none is computed ahead while the next contender runs.
    next(model.stream_ids(ids, recall, max_tokens=1))


def read_alone(model: MemoryModel, wait: bool) -> None:
    """What recalling costs when nothing is processed meanwhile."""
    recall = model.recall(TEXT, wait=wait)
    if isinstance(recall.rows, ArrivingMemory):
        recall.rows.wait()


def measure(models: Models, num_tokens: int, repeats: int) -> dict[str, Any]:
    ids = [5 + 7 * i % 50_000 for i in range(num_tokens)]
    found: dict[str, list[Timed]] = defaultdict(list)

    def run(name: str) -> None:
        mx.synchronize()
        mx.synchronize(generation_stream)
        if name == "alone":
            work = partial(first_token, models.alone, ids, "none", True)
        else:
            _, wait, cold, kept = CASES[name.removeprefix("read_")]
            models.prepare(cold)
            model = models.with_bank[kept]
            if name.startswith("read_"):
                work = partial(read_alone, model, wait)
            else:
                work = partial(first_token, model, ids, "fetched", wait)
        found[name].append(timed(work))

    names = ["alone", *(n for n, case in CASES.items() if CAN_DROP or not case[2])]
    names += [f"read_{name}" for name in names if name in ("waited_cold", "waited_warm")]
    for name in names:  # kernels, buffers and threads
        run(name)
    found.clear()
    rounds = repeats if num_tokens > SHORT else 4 * repeats
    for repeat in tqdm(range(rounds), desc=f"{num_tokens} tokens", leave=False, delay=2):
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            run(name)
    alone, size = found["alone"], models.block_bytes
    cases = {name: _summary(alone, times, size) for name, times in found.items()}
    excess = {
        name: median(
            c.ms - w.ms for c, w in zip(found[f"{name}_cold"], found[f"{name}_warm"], strict=True)
        )
        for name in ("waited", "arriving", "read_waited")
        if CAN_DROP
    }
    return {"cases": cases, "cold_less_warm_ms": excess}


def _summary(alone: list[Timed], times: list[Timed], size: int) -> dict[str, Any]:
    pairs = list(zip(times, alone, strict=True))
    return {
        "ms": median(t.ms for t in times),
        "cpu_ms": median(t.cpu_ms for t in times),
        "of_alone": median(t.ms / a.ms for t, a in pairs),
        "of_alone_cpu": median(t.cpu_ms / a.cpu_ms for t, a in pairs),
        "from_disk": [f(t.disk_bytes / size for t in times) for f in (min, max)],
    }


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    print(f"{ANCHOR}, float32; {result['block_bytes']:,} bytes fetched")
    labels = {"alone": "anchor alone"} | {n: f"  {case[0]}" for n, case in CASES.items()}
    labels |= {f"read_{n}": f"  no prompt: {case[0]}" for n, case in CASES.items()}
    heads = ("ms", "of alone", "CPU ms", "of alone", "from disk")
    for count, prompt in result["prompts"].items():
        print(f"{count + ' tokens':34}" + "".join(f"{head:>12}" for head in heads))
        for name, c in prompt["cases"].items():
            disk = "{:.2f} to {:.2f}".format(*c["from_disk"])
            print(
                f"{labels[name]:34}{c['ms']:12.1f}{c['of_alone']:12.3f}{c['cpu_ms']:12.1f}"
                f"{c['of_alone_cpu']:12.3f}{disk:>16}"
            )
        if ms := prompt["cold_less_warm_ms"]:
            print(
                f"  cold less warm: {ms['waited']:.1f} ms waited for, {ms['arriving']:.1f} ms read "
                f"meanwhile; of the reads with no prompt {ms['read_waited']:.1f} ms"
            )


def plot(result: dict[str, Any], target: Path) -> None:
    panels = []
    for count, prompt in result["prompts"].items():
        cases = prompt["cases"]
        bars = [(case[0], cases[n]["of_alone"]) for n, case in CASES.items() if n in cases]
        title = f"first token ÷ anchor alone, prompt of {count} tokens"
        panels.append(Panel(title, "ratio", bars, 1.15 if int(count) > SHORT else 1.0))
    draw(target, panels, f"{result['machine']}; {result['versions']}")


def main() -> None:
    parser = ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_outputs(parser, REPEATS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of the prompts")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        models = Models(Path(place))
        prompts = {str(n): measure(models, n, args.repeats) for n in args.tokens}
        models.close()
    result = machine() | {"block_bytes": models.block_bytes, "prompts": prompts}
    report(result, args, show, plot)


if __name__ == "__main__":
    run_program(main)
