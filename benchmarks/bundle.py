"""Bundles: whether their runner says what ``generate.py`` says, how large they are, what they cost.

``python -m benchmarks.bundle [--json] [--plot FILE] [--model DIR ...] [--other PYTHON]``

Each model is bundled as it is and once more in 4 bits, the bank too unless it is quantised already.
The bundle's own ``run.py`` and the model answer the same 50 prompts greedily: 1 to 50 random words,
as far as half of the context has room for them. An answer is the same if all of its tokens are.
PYTHON, with another MLX, numpy, tokenizers and xxhash, answers them too.

What a 4-bit bank costs is measured through the runner on OpenLM-160M (float32, weights of zeros)
with the paper's r, one bank in bfloat16 and one in affine 4 bits, pages warm. Both runners take
turns, and a ratio is the median of those within a round. Attaching a memory, that is reading and
dequantising its blocks, is the only part that differs. With a context of 2,048 that model shows
what a bundle's shorter functions save.
"""

import json
import runpy
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from benchmarks.common.counting import Timed, compared, in_turns, returned, timed
from benchmarks.common.models import random_texts, write_anchor, write_memory
from benchmarks.common.show import Result, benchmark
from convert.bundle import bundle
from convert.quantize import command as quantize
from mlx_hmem.bank import Manifest
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.model.load import DEMO, load
from mlx_hmem.model.model import MemoryModel

TOKENS = 32
SMALL_ANCHOR = ["--anchor-bits", "4", "--anchor-group-size", "32"]
SMALL_BANK = ["--bank-bits", "4", "--bank-group-size", "32"]
ANCHOR, CONTEXT, PREFILL = "openlm-160m", 256, 32
TEXT = " ".join(f"w{7 * i + 5}" for i in range(PREFILL + 1))
LONG = 2048
OTHER = """
import json, runpy, sys
import mlx.core as mx
from pathlib import Path
opened = runpy.run_path(sys.argv[1] + "/run.py")["Bundle"](Path(sys.argv[1]))
def said(prompt):
    rows = opened.attach(opened.blocks_of(opened.route(prompt)))
    return list(opened.generate(opened.ids_of(prompt), rows, int(sys.argv[2])))
print(json.dumps([mx.__version__, [said(prompt) for prompt in json.load(sys.stdin)]]))
"""


def bundled(model: Path, out: Path, *options: str) -> Any:
    """The bundle of a model, made at ``out``, as its own runner opens it."""
    bundle.main([str(model), str(out), *options])
    return runpy.run_path(str(out / "run.py"))["Bundle"](out)


def prompts(count: int, opened: Any) -> list[str]:
    """Texts of 1 to 50 words, as far as half of the context has room for them."""
    found = []
    for index, text in enumerate(random_texts(count, 50, seed=3)):
        words = text.split()[: 1 + 50 * index // count]
        while 2 * len(opened.tokenizer.encode(" ".join(words)).ids) > opened.context:
            words.pop()
        found.append(" ".join(words))
    return found


def elsewhere(python: Path | None, place: Path, asked: list[str]) -> tuple[str, list[list[int]]]:
    """The version of another interpreter's MLX, and what a bundle says there."""
    if python is None:
        return "none", []
    command = [str(python), "-I", "-c", OTHER, str(place), str(TOKENS)]
    done = subprocess.run(command, input=json.dumps(asked).encode(), stdout=-1, check=True)
    version, answers = json.loads(done.stdout)
    return version, answers


def compare(folder: Path, place: Path, count: int, other: Path | None) -> dict[str, Any]:
    """A model's answers against those of its bundle, made at ``place``."""
    opened, model = bundled(folder, place), load(folder)
    same, tokens, routes, ratios = 0, 0, 0, list[float]()
    asked, answers = prompts(count, opened), list[list[int]]()
    for prompt in tqdm(asked, desc=folder.name, delay=2):
        path = model.retriever.route(prompt) if model.retriever else None
        routes += opened.route(prompt) == list(path or ())
        answer, own = returned(partial(answer_of, model, prompt))
        said, its = returned(partial(ask, opened, prompt))
        ratios.append(its.ms / own.ms)
        same, tokens = same + (said == answer), tokens + len(answer)
        answers.append(answer)
    version, found = elsewhere(other, place, asked)
    sizes = bundle.sizes_of(place)
    return {
        "prompts": count,
        "same": same,
        "same_routes": routes,
        "other_mlx": version,
        "same_there": sum(map(list.__eq__, found, answers)),
        "tokens": tokens,
        "time_of_model": median(ratios),
        "all_mb": sizes.total() / 1e6,
        **{f"{name}_mb": size / 1e6 for name, size in sizes.items()},
    }


def answer_of(model: MemoryModel, prompt: str) -> list[int]:
    return [piece.token for piece in model.stream(prompt, max_tokens=TOKENS)]


def ask(opened: Any, prompt: str) -> list[int]:
    rows = opened.attach(opened.blocks_of(opened.route(prompt)))
    return list(opened.generate(opened.ids_of(prompt), rows, TOKENS))


def overhead(place: Path, repeats: int) -> Result:
    """A 4-bit bank against one in bfloat16."""
    bundles: dict[str, Any] = {}
    for bits in (16, 4):
        model = place / f"model-{bits}"
        write_anchor(model, ANCHOR, "float32")
        write_memory(model, ANCHOR, [TEXT], bits)
        options = ["--context", str(CONTEXT), "--prefill", str(PREFILL)]
        bundles[f"{bits}_bits"] = bundled(model, place / f"bundle-{bits}", *options)

    return in_parts(bundles, "16_bits", repeats)


def short_functions(place: Path, repeats: int) -> Result:
    """What is saved while few of the cache's slots are in use, on the model of :func:`overhead`."""
    options = ["--context", str(LONG), "--prefill", str(PREFILL)]
    short = bundled(place / "model-16", place / "bundle-long", *options)
    whole = runpy.run_path(str(place / "bundle-long" / "run.py"))["Bundle"](place / "bundle-long")
    del whole.about["short_functions"]
    found = in_parts({"all_slots": whole, "few_slots": short}, "all_slots", repeats)
    return {f"short_{name}": figures for name, figures in found.items() if name != "attach"}


def in_parts(bundles: dict[str, Any], base: str, repeats: int) -> Result:
    """Attaching a memory, the first token and further ones, of some bundles in turn."""

    def run(each: Any, _: int) -> tuple[Timed, Timed, Timed]:
        ids, blocks = each.ids_of(TEXT), each.blocks_of(each.route(TEXT))
        rows, attach = returned(lambda: each.attach(blocks))
        steps = each.generate(ids, rows, 8)
        first = timed(lambda: next(steps))
        decode = timed(lambda: list(islice(steps, 6)), times=6)
        return attach, Timed(attach.ms + first.ms, attach.cpu_ms + first.cpu_ms), decode

    contenders = {name: partial(run, each) for name, each in bundles.items()}
    found = in_turns(contenders, repeats, ANCHOR)
    return {
        name: compared({key: [run[i] for run in runs] for key, runs in found.items()}, base)
        for i, name in enumerate(("attach", "first_token", "decode"))
    }


def measure(
    model: Sequence[Path] = (DEMO,), prompts: int = 50, repeats: int = 11, other: Path | None = None
) -> Result:
    """Of some model directories; without OpenLM-160M if ``repeats`` is 0."""
    models = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for index, folder in enumerate(model):
            bank, small = Manifest.from_file(folder / BANK_FOLDER / MANIFEST), place / str(index)
            options = SMALL_ANCHOR + ([] if bank.quantization else SMALL_BANK)
            quantize.main([str(folder), str(small), *options])
            for each, title in ((folder, str(folder)), (small, f"{folder} in 4 bits")):
                models[title] = compare(each, place / "bundle", prompts, other)
                shutil.rmtree(place / "bundle")
        if repeats == 0:
            return {"model": models}
        return {"model": models} | overhead(place, repeats) | short_functions(place, repeats)


if __name__ == "__main__":
    benchmark(__doc__, measure, bars=("of_16_bits", "of_all_slots"))
