"""Bundles: whether their runner says what ``generate.py`` says, how large they are, what they cost.

``python -m benchmarks.bundle [--json] [--plot FILE] [--model DIR ...]``

Each model is bundled as it is and once more in 4 bits, the bank too unless it is quantised already.
The bundle's own ``run.py`` and the model answer the same 50 prompts greedily: 1 to 50 random words,
as far as half of the context has room for them. An answer is the same if all of its tokens are.

What a 4-bit bank costs is measured through the runner on OpenLM-160M (float32, weights of zeros)
with the paper's r, one bank in bfloat16 and one in affine 4 bits, pages warm. Both runners take
turns, and a ratio is the median of those within a round. Attaching a memory, that is reading and
dequantising its blocks, is the only part that differs.
"""

import runpy
import shutil
import tempfile
from collections import defaultdict
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


def open_bundle(folder: Path) -> Any:
    """The bundle as its own runner opens it."""
    return runpy.run_path(str(folder / "run.py"))["Bundle"](folder)


def prompts(count: int, opened: Any) -> list[str]:
    """Texts of 1 to 50 words, as far as half of the context has room for them."""
    found = []
    for index, text in enumerate(random_texts(count, 50, seed=3)):
        words = text.split()[: 1 + 50 * index // count]
        while 2 * len(opened.tokenizer.encode(" ".join(words)).ids) > opened.context:
            words.pop()
        found.append(" ".join(words))
    return found


def sizes(folder: Path) -> dict[str, float]:
    """MB of a bundle and of each part of it."""
    found: dict[str, float] = defaultdict(float)
    for file in folder.rglob("*"):
        if file.is_file():
            for name in ("all", file.relative_to(folder).parts[0]):
                found[f"{name}_mb"] += file.stat().st_size / 1e6
    return found


def compare(folder: Path, place: Path, count: int) -> dict[str, Any]:
    """A model's answers against those of its bundle, made at ``place``."""
    bundle.main([str(folder), str(place)])
    opened, model = open_bundle(place), load(folder)
    same, tokens, routes, ratios = 0, 0, 0, list[float]()
    for prompt in tqdm(prompts(count, opened), desc=folder.name, delay=2):
        path = model.retriever.route(prompt) if model.retriever else None
        routes += opened.route(prompt) == list(path or ())
        answer, own = returned(partial(answer_of, model, prompt))
        said, its = returned(partial(ask, opened, prompt))
        ratios.append(its.ms / own.ms)
        same, tokens = same + (said == answer), tokens + len(answer)
    return {
        "prompts": count,
        "same": same,
        "same_routes": routes,
        "tokens": tokens,
        "time_of_model": median(ratios),
        **sizes(place),
    }


def answer_of(model: MemoryModel, prompt: str) -> list[int]:
    return [piece.token for piece in model.stream(prompt, max_tokens=TOKENS)]


def ask(opened: Any, prompt: str) -> list[int]:
    rows = opened.attach(opened.blocks_of(opened.route(prompt)))
    return list(opened.generate(opened.ids_of(prompt), rows, TOKENS))


def paper_bundles(place: Path) -> dict[int, Any]:
    """Bundles of one anchor with a bank in bfloat16 and one in 4 bits."""
    found: dict[int, Any] = {}
    for bits in (16, 4):
        model, out = place / f"model-{bits}", place / f"bundle-{bits}"
        model.mkdir()
        write_anchor(model, ANCHOR, "float32")
        write_memory(model, ANCHOR, [TEXT], bits)
        options = ["--context", str(CONTEXT), "--prefill", str(PREFILL)]
        bundle.main([str(model), str(out), *options])
        found[bits] = open_bundle(out)
    return found


def overhead(place: Path, repeats: int) -> Result:
    """A 4-bit bank against one in bfloat16."""
    bundles = paper_bundles(place)

    def run(bits: int, _: int) -> tuple[Timed, Timed, Timed]:
        each = bundles[bits]
        ids, blocks = each.ids_of(TEXT), each.blocks_of(each.route(TEXT))
        rows, attach = returned(lambda: each.attach(blocks))
        steps = each.generate(ids, rows, 8)
        first = timed(lambda: next(steps))
        decode = timed(lambda: list(islice(steps, 6)), times=6)
        return attach, Timed(attach.ms + first.ms, attach.cpu_ms + first.cpu_ms), decode

    found = in_turns({f"{bits}_bits": partial(run, bits) for bits in (16, 4)}, repeats, ANCHOR)
    return {
        name: compared({bits: [run[i] for run in runs] for bits, runs in found.items()}, "16_bits")
        for i, name in enumerate(("attach", "first_token", "decode"))
    }


def measure(model: Sequence[Path] = (DEMO,), prompts: int = 50, repeats: int = 11) -> Result:
    """Of some model directories; without OpenLM-160M if ``repeats`` is 0."""
    models = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for index, folder in enumerate(model):
            bank, small = Manifest.from_file(folder / BANK_FOLDER / MANIFEST), place / str(index)
            options = SMALL_ANCHOR + ([] if bank.quantization else SMALL_BANK)
            quantize.main([str(folder), str(small), *options])
            for each, title in ((folder, str(folder)), (small, f"{folder} in 4 bits")):
                models[title] = compare(each, place / "bundle", prompts)
                shutil.rmtree(place / "bundle")
        return {"model": models} | (overhead(place, repeats) if repeats else {})


if __name__ == "__main__":
    benchmark(__doc__, measure, bars=("of_16_bits",))
