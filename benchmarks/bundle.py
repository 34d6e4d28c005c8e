"""Bundles: whether their runner says what ``generate.py`` says, how large they are, what they cost.

``python -m benchmarks.bundle [--json] [--plot FILE] [--model DIR ...] [--no-overhead]``

Each model is bundled as it is and once more in 4 bits, the bank too unless it is quantised already.
The bundle's own ``run.py`` and the model answer the same 50 prompts greedily: 1 to 50 random words,
as far as half of the context has room for them. An answer is the same if all of its tokens are.

What a 4-bit bank costs is measured through the runner on OpenLM-160M (float32, weights of zeros)
with the paper's r, one bank in bfloat16 and one in affine 4 bits, pages warm. Both runners take
turns, and a ratio is the median of those within a round. Attaching a memory, that is reading and
dequantising its blocks, is the only part that differs.
"""

import importlib.util
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
import mlx.core as mx
from tqdm import tqdm, trange

from benchmarks.common.banks import keys_of, make_bank, paper_config
from benchmarks.common.counting import machine, median, timed
from benchmarks.common.models import random_retriever, random_texts, write_anchor, write_memory
from benchmarks.common.plots import Panel, draw
from benchmarks.common.show import add_outputs, report
from convert.bundle import bundle
from convert.quantize import command as quantize
from mlx_hmem.bank import Manifest
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.model.load import DEMO, load

PROMPTS, TOKENS, REPEATS = 50, 32, 11
SMALL_ANCHOR = ["--anchor-bits", "4", "--anchor-group-size", "32"]
SMALL_BANK = ["--bank-bits", "4", "--bank-group-size", "32"]
ANCHOR, CONTEXT, PREFILL = "openlm-160m", 256, 32
TEXT = " ".join(f"w{7 * i + 5}" for i in range(PREFILL + 1))


def open_bundle(folder: Path) -> Any:
    """The bundle as its own runner opens it."""
    spec = importlib.util.spec_from_file_location("bundle_run", folder / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Bundle(folder)


def prompts(count: int, opened: Any) -> list[str]:
    """Texts of 1 to 50 words, as far as half of the context has room for them."""
    found = []
    for index, text in enumerate(random_texts(count, 50, seed=3)):
        words = text.split()[: 1 + 50 * index // count]
        while 2 * len(opened.tokenizer.encode(" ".join(words)).ids) > opened.context:
            words.pop()
        found.append(" ".join(words))
    return found


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of each part of a bundle."""
    found: dict[str, int] = defaultdict(int)
    for file in folder.rglob("*"):
        if file.is_file():
            found[file.relative_to(folder).parts[0]] += file.stat().st_size
    return dict(found)


def in_4_bits(folder: Path, place: Path) -> Path:
    """The model with its anchor in 4 bits, and its bank unless that is quantised already."""
    bank = Manifest.from_file(folder / BANK_FOLDER / MANIFEST)
    options = SMALL_ANCHOR + ([] if bank.quantization else SMALL_BANK)
    quantize.main([str(folder), str(place), *options])
    return place


def compare(folder: Path, place: Path, count: int) -> dict[str, Any]:
    """A model's answers against those of its bundle, made at ``place``."""
    bundle.main([str(folder), str(place)])
    opened, model = open_bundle(place), load(folder)
    same, tokens, routes, times = 0, 0, 0, defaultdict(list)
    for prompt in tqdm(prompts(count, opened), desc=folder.name, delay=2):
        path = model.retriever.route(prompt) if model.retriever else None
        routes += opened.route(prompt) == list(path or ())
        answer: list[int] = []
        pieces = model.stream(prompt, max_tokens=TOKENS)
        times["model"].append(timed(lambda p=pieces, a=answer: a.extend(x.token for x in p)).ms)  # type: ignore[misc]
        said: list[int] = []
        times["runner"].append(timed(lambda p=prompt, a=said: a.extend(ask(opened, p))).ms)  # type: ignore[misc]
        same, tokens = same + (said == answer), tokens + len(answer)
    ratio = median(a / b for a, b in zip(times["runner"], times["model"], strict=True))
    files = sizes(place)
    return {
        "model": str(folder),
        "prompts": count,
        "same": same,
        "same_routes": routes,
        "tokens": tokens,
        "time_of_model": ratio,
        "bytes": {"all": sum(files.values()), **files},
    }


def ask(opened: Any, prompt: str) -> list[int]:
    rows = opened.attach(opened.blocks_of(opened.route(prompt)))
    return list(opened.generate(opened.ids_of(prompt), rows, TOKENS))


def paper_bundles(place: Path) -> dict[int, Any]:
    """Bundles of one anchor with a bank in bfloat16 and one in 4 bits."""
    found: dict[int, Any] = {}
    (place / "model").mkdir()
    write_anchor(place / "model", ANCHOR, "float32")
    write_memory(place / "model", ANCHOR, [TEXT])
    hmem = HmemConfig.from_file(place / "model" / "hmem.json")
    config, bank = paper_config(ANCHOR), place / "model" / "bank"
    for bits in (16, 4):
        if bits == 4:
            shutil.rmtree(bank)
            make_bank(
                bank,
                config,
                keys_of(config, [random_retriever().route(TEXT)]),
                bits,
                anchor_hash=hmem.anchor_hash,
                tree_hash=hmem.retriever.tree_hash,
            )
        options = ["--context", str(CONTEXT), "--prefill", str(PREFILL)]
        bundle.main([str(place / "model"), str(place / f"bundle-{bits}"), *options])
        found[bits] = open_bundle(place / f"bundle-{bits}")
    return found


def overhead(place: Path, repeats: int) -> dict[str, Any]:
    """A 4-bit bank against one in bfloat16: medians in ms, and of the ratios."""
    opened = paper_bundles(place)
    found: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))

    def run(bits: int) -> None:
        each = opened[bits]
        ids, blocks = each.ids_of(TEXT), each.blocks_of(each.route(TEXT))
        rows: list[mx.array] = []
        attached = timed(lambda: rows.extend(each.attach(blocks))).ms
        steps = each.generate(ids, rows, 8)
        first = attached + timed(lambda: next(steps)).ms
        rest = timed(lambda: list(islice(steps, 6))).ms / 6
        for name, ms in (("attach", attached), ("first_token", first), ("decode", rest)):
            found[name][bits].append(ms)

    for bits in opened:
        run(bits)
    found.clear()
    for repeat in trange(repeats, desc=ANCHOR, delay=2):
        for bits in (16, 4) if repeat % 2 else (4, 16):
            run(bits)
    result: dict[str, Any] = {}
    for name, times in found.items():
        ratio = median(a / b for a, b in zip(times[4], times[16], strict=True))
        result[name] = {"bf16_ms": median(times[16]), "4bit_ms": median(times[4]), "ratio": ratio}
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{result['machine']}; {result['versions']}")
    for each in result["models"]:
        parts = ", ".join(f"{name} {size / 1e6:,.1f}" for name, size in each["bytes"].items())
        print(
            f"{each['model']}: {each['same']} of {each['prompts']} answers the same "
            f"({each['tokens']} tokens; {each['same_routes']} routes), {each['time_of_model']:.2f} "
            f"of the model's time\n  MB: {parts}"
        )
    for name, each in result["overhead"].items():
        print(
            f"{name:12} bfloat16 {each['bf16_ms']:9.1f} ms, 4 bits {each['4bit_ms']:9.1f} ms, "
            f"ratio {each['ratio']:.3f}"
        )


def plot(result: dict[str, Any], target: Path) -> None:
    bars = [(name, each["ratio"]) for name, each in result["overhead"].items()]
    draw(
        target,
        [Panel("4-bit bank ÷ bfloat16", "ratio", bars, 1.0)],
        f"{result['machine']}; {result['versions']}",
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.bundle", description=__doc__)
    add_outputs(parser, REPEATS)
    parser.add_argument("--model", type=Path, nargs="+", default=[DEMO], help="default: the demo")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="default: %(default)s")
    parser.add_argument("--no-overhead", action="store_true", help="leave out OpenLM-160M")
    args = parser.parse_args(arguments)
    models = []
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        place = Path(name)
        for index, folder in enumerate(args.model):
            small = in_4_bits(folder, place / f"4bit-{index}")
            for each in (folder, small):
                models.append(compare(each, place / "bundle", args.prompts))
                models[-1]["model"] = f"{folder}{' in 4 bits' if each is small else ''}"
                shutil.rmtree(place / "bundle")
        measured = {} if args.no_overhead else overhead(place, args.repeats)
    report(machine() | {"models": models, "overhead": measured}, args, show, plot)


if __name__ == "__main__":
    run_program(main)
