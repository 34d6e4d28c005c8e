"""``python -m benchmarks.convert_kills [--kills N] [--json]``: SIGKILL at random moments.

Conversions of a 32 MB anchor in 64 shards (OpenLM's pickle, sharded safetensors, the way back to
PyTorch, and one over an older model) and of the whole demo model with its memory (from PyTorch's
layout, back to it, and quantised over an older model) are killed and started again with the same
command: N times the four of the anchor together, N times each of the whole model's. After each kill
the destination must be absent, what it was before, or, byte for byte, what a conversion makes that
nobody disturbed; and what lies beside it must not load unless it is all there. Half of the moments
are drawn from the whole time of a run, half from the time in which it writes.
"""

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
import mlx.core as mx
from tqdm import tqdm

from convert.command import main as convert
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.files import save_safetensors
from mlx_hmem.folders import RECORD, REPLACED
from mlx_hmem.model.load import DEMO, load

SHARD_BYTES = 512 << 10
# The command itself, with shards so small that there are many moments between two.
PROGRAM = """
import sys
import mlx_hmem
import convert.anchors.weights
from convert.command import main
from convert.memory.bank import write_tensors_as_bank
from mlx_hmem.bank.writer import shard_cuts
from mlx_hmem.errors import run_program
size = int(sys.argv.pop(1))
convert.anchors.weights.SHARD_BYTES = size
shard_cuts.__defaults__ = (size,)
write_tensors_as_bank.__kwdefaults__["shard_bytes"] = size
run_program(lambda: main(sys.argv[1:]))
"""
NOTES = "bank/notes/"  # of a quantisation that is not at its end
Files = dict[str, bytes]


def load_whole(folder: Path) -> None:
    """Loads a model with its memory; a UserError says why it is none."""
    bank = load(folder).bank
    if bank is None:
        raise UserError("a model has lost its memory", folder, "find out why")
    bank.close()


class Case(NamedTuple):
    """A conversion to kill. ``older``: the model that lies at the destination before."""

    name: str
    source: Path
    options: list[str]
    older: Path | None = None
    program: tuple[str, ...] = ()
    load: Callable[[Path], object] = load_anchor

    def command(self, out: Path, shard_bytes: int) -> list[str]:
        start = [sys.executable, "-c", PROGRAM, str(shard_bytes), *self.program]
        return [*start, str(self.source), str(out), *self.options]

    @property
    def loads(self) -> bool:
        """Whether its result is a model of ours."""
        return "pytorch" not in self.options


def contents(folder: Path) -> Files:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def save_model(folder: Path, seed: int, layers: int = 16) -> Path:
    """A random OpenLM anchor as a model directory; 32 MB with 16 layers."""
    args = ModelArgs("openlm", 192, layers, 576, 6, 32, 1024)
    mx.random.seed(seed)
    folder.mkdir(parents=True)
    save_safetensors(folder / "model.safetensors", named_parameters(Model(args)))
    (folder / "config.json").write_text(json.dumps(vars(args)))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def save_llama(folder: Path, layers: int = 16) -> Path:
    """A random Llama, as transformers names it."""
    from mlx_lm.models import llama

    config = dict(
        model_type="llama", hidden_size=192, num_hidden_layers=layers, intermediate_size=576,
        num_attention_heads=6, rms_norm_eps=1e-5, vocab_size=1024, rope_theta=1e4,
        tie_word_embeddings=False,
    )  # fmt: skip
    folder.mkdir(parents=True)
    weights = list(named_parameters(llama.Model(llama.ModelArgs.from_dict(config))).items())
    for i in range(4):
        name = f"model-{i + 1:05}-of-00004.safetensors"
        save_safetensors(folder / name, dict(weights[i::4]))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def undisturbed(arguments: list[str], part: Path) -> tuple[float, float]:
    """Runs to the end; seconds in all, and from the moment at which ``part`` appears."""
    start = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not part.exists():
        time.sleep(0.001)
    began = time.perf_counter()
    if process.wait():
        raise UserError("a conversion fails undisturbed", arguments[3:], "run it by hand")
    return time.perf_counter() - start, time.perf_counter() - began


def kill_once(arguments: list[str], part: Path, delay: float, writing: bool) -> bool:
    """Starts and kills; whether it was still running.

    ``writing``: the delay counts from the moment at which ``part`` is there, not from the start.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    locked = part / RECORD
    before = locked.stat().st_mtime_ns if locked.exists() else 0
    while writing and process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            if locked.stat().st_mtime_ns != before:  # each run writes it anew
                break
        time.sleep(0.001)
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def check(case: Case, out: Path, part: Path, before: Files | None, wanted: Files) -> str:
    """What lies at the destination after a kill: "nothing", "before" or "whole"."""
    if part.exists():
        check_part(case, part, wanted)
    if not out.exists():
        return "nothing"
    found = contents(out)
    if before is not None and found == before:
        case.load(out)
        return "before"
    # The record, and the folder of before, may still lie in it.
    more = [n for n in found if n not in wanted]
    strange = [n for n in more if n != RECORD and not n.startswith(f"{REPLACED}/")]
    if strange or {n: found.get(n) for n in wanted} != wanted:
        raise UserError("a directory is neither old nor new", out, "find out why")
    if case.loads:
        case.load(out)
    return "whole"


def check_part(case: Case, part: Path, wanted: Files) -> None:
    """What is half made must not load; what loads must be whole, bit for bit."""
    try:
        case.load(part)
    except UserError:
        return
    found = contents(part)
    more = [n for n in found if n not in wanted and n != RECORD]
    more = [n for n in more if not n.startswith((f"{REPLACED}/", NOTES)) and ".part" not in n]
    if more or {n: found.get(n) for n in wanted} != wanted:
        raise UserError("a half-made directory loads", part, "find out why")


def cases(folder: Path, layers: int = 16) -> Iterator[Case]:
    """Conversions of an anchor."""
    model = save_model(folder / "model", 0, layers)
    older = save_model(folder / "older", 1, layers)
    checkpoint = folder / "checkpoint"
    convert([str(model), str(checkpoint), "--to", "pytorch"])
    llama = save_llama(folder / "llama", layers)
    yield Case("openlm", checkpoint, [])
    yield Case("huggingface", llama, [])
    yield Case("to pytorch", model, ["--to", "pytorch"])
    yield Case("overwrite", checkpoint, ["--overwrite"], older)


def whole_cases(folder: Path) -> Iterator[Case]:
    """Conversions of the demo model: an anchor, a memory bank, a cluster tree and an encoder."""
    checkpoint, model, older = (folder / f"whole-{n}" for n in ("checkpoint", "model", "older"))
    convert([str(DEMO), str(checkpoint), "--to", "pytorch", "--dtype", "float16"])
    convert([str(checkpoint), str(model)])  # the demo's own bank is quantised
    convert(["quantize", str(model), str(older), "--bank-bits", "4"])
    yield Case("whole from pytorch", checkpoint, [], load=load_whole)
    yield Case("whole to pytorch", model, ["--to", "pytorch"], load=load_whole)
    options = ["--anchor-bits", "4", "--bank-bits", "8", "--overwrite"]
    yield Case("whole quantised", model, options, older, ("quantize",), load_whole)


def run_case(
    folder: Path, case: Case, rng: random.Random, kills: int, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Kills conversions of one case ``kills`` times in all; counts of what was found."""
    model = folder / f"{case.name}-undisturbed"
    arguments = case.command(model, shard_bytes)
    duration, write_time = undisturbed(arguments, model.with_name(f"{model.name}.part"))
    wanted, before = contents(model), contents(case.older) if case.older else None
    found = {"kills": 0, "while writing": 0, "runs": 0, "nothing": 0, "before": 0, "whole": 0}
    while found["kills"] < kills:
        out = folder / f"{case.name}-{found['runs']}"
        part = out.with_name(f"{out.name}.part")
        if case.older:
            shutil.copytree(case.older, out)
        arguments = case.command(out, shard_bytes)
        while found["kills"] < kills:
            writing = rng.random() < 0.5
            delay = rng.uniform(0, write_time if writing else duration)
            if not kill_once(arguments, part, delay, writing):
                break
            found["kills"] += 1
            found["while writing"] += writing
            found[check(case, out, part, before, wanted)] += 1
        if part.exists() or not out.exists() or contents(out) != wanted:
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode:
                raise UserError("a killed conversion does not go on", done.stderr, "find out why")
        if contents(out) != wanted or part.exists():
            raise UserError("a killed conversion came out otherwise", out, "find out why")
        if case.loads:
            case.load(out)
        found["runs"] += 1
        shutil.rmtree(out)
    return found


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.convert_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=52, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng, results = random.Random(0), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name, tqdm(total=7, unit="case") as bar:
        for make, kills in ((cases, -(-args.kills // 4)), (whole_cases, args.kills)):
            with contextlib.redirect_stdout(sys.stderr):  # what the conversions say
                chosen = list(make(Path(name)))
            for case in chosen:
                results[case.name] = run_case(Path(name), case, rng, kills)
                bar.update()
    print(json.dumps(results) if args.json else results)


if __name__ == "__main__":
    run_program(main)
