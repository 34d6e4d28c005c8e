"""``python -m benchmarks.convert_kills [--kills N] [--json]``: SIGKILL at random moments.

Conversions of a 32 MB anchor in 64 shards (OpenLM's pickle, sharded safetensors, the way back to
PyTorch, and one over an older model) are killed and started again with the same command. After each
kill the destination must be absent, what it was before, or, byte for byte, what a conversion makes
that nobody disturbed; and what lies beside it must not load. Half of the moments are drawn from the
whole time of a run, half from the moment on at which it begins to write.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
import mlx.core as mx
from tqdm import tqdm

from convert.__main__ import main as convert
from convert.destination import RECORD, REPLACED
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.files import save_safetensors

SHARD_BYTES = 512 << 10
# The command itself, with shards so small that there are many moments between two.
PROGRAM = """
import sys
import mlx_hmem
import convert.weights
from convert.__main__ import main
from mlx_hmem.errors import run_program
convert.weights.SHARD_BYTES = int(sys.argv.pop(1))
run_program(main)
"""
Files = dict[str, bytes]


def command(source: Path, out: Path, *more: str, shard_bytes: int = SHARD_BYTES) -> list[str]:
    return [sys.executable, "-c", PROGRAM, str(shard_bytes), str(source), str(out), *more]


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


def kill_once(arguments: list[str], part: Path, delay: float, writing: bool) -> bool:
    """Starts and kills; whether it was still running.

    ``writing``: the delay counts from the moment at which ``part`` appears, not from the start.
    """
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while writing and process.poll() is None and not part.exists():
        time.sleep(0.001)
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def check(out: Path, part: Path, before: Files | None, wanted: Files) -> str:
    """What lies at the destination after a kill: "nothing", "before" or "whole"."""
    if part.exists() and not set(wanted) <= set(contents(part)):
        try:
            load_anchor(part)
        except UserError:
            pass
        else:
            raise UserError("a half-made directory loads", part, "find out why")
    if not out.exists():
        return "nothing"
    found = contents(out)
    if before is not None and found == before:
        return "before"
    # The record, and the folder of before, may still lie in it.
    more = [n for n in found if n not in wanted]
    strange = [n for n in more if n != RECORD and not n.startswith(f"{REPLACED}/")]
    if strange or {n: found.get(n) for n in wanted} != wanted:
        raise UserError("a directory is neither old nor new", out, "find out why")
    return "whole"


def cases(folder: Path, layers: int = 16) -> Iterator[tuple[str, Path, list[str], Path | None]]:
    """Name, source, options, and the model that lies at the destination before."""
    model = save_model(folder / "model", 0, layers)
    older = save_model(folder / "older", 1, layers)
    checkpoint = folder / "checkpoint"
    convert([str(model), str(checkpoint), "--to", "pytorch"])
    llama = save_llama(folder / "llama", layers)
    yield "openlm", checkpoint, [], None
    yield "huggingface", llama, [], None
    yield "to pytorch", model, ["--to", "pytorch"], None
    yield "overwrite", checkpoint, ["--overwrite"], older


def run_case(
    folder: Path, case: tuple[str, Path, list[str], Path | None], rng: random.Random, kills: int,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, int]:  # fmt: skip
    """Kills conversions of one case ``kills`` times in all; counts of what was found."""
    name, source, options, older = case
    undisturbed = folder / f"{name}-undisturbed"
    start = time.perf_counter()
    arguments = command(source, undisturbed, *options, shard_bytes=shard_bytes)
    subprocess.run(arguments, check=True, capture_output=True)
    duration, wanted = time.perf_counter() - start, contents(undisturbed)
    before = contents(older) if older else None
    found = {"kills": 0, "runs": 0, "nothing": 0, "before": 0, "whole": 0}
    while found["kills"] < kills:
        out = folder / f"{name}-{found['runs']}"
        part = out.with_name(f"{out.name}.part")
        if older:
            shutil.copytree(older, out)
        arguments = command(source, out, *options, shard_bytes=shard_bytes)
        while found["kills"] < kills:
            writing = rng.random() < 0.5
            if not kill_once(
                arguments, part, rng.uniform(0, duration / (2 if writing else 1)), writing
            ):
                break
            found["kills"] += 1
            found[check(out, part, before, wanted)] += 1
        if part.exists() or not out.exists() or contents(out) != wanted:
            done = subprocess.run(arguments, capture_output=True, text=True)
            if done.returncode:
                raise UserError("a killed conversion does not go on", done.stderr, "find out why")
        if contents(out) != wanted or part.exists():
            raise UserError("a killed conversion came out otherwise", out, "find out why")
        if name != "to pytorch":
            load_anchor(out)
        found["runs"] += 1
        shutil.rmtree(out)
    return found


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.convert_kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=52)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng, results = random.Random(0), dict[str, Any]()
    with tempfile.TemporaryDirectory() as name, tqdm(total=4, unit="case") as bar:
        for case in cases(Path(name)):
            results[case[0]] = run_case(Path(name), case, rng, -(-args.kills // 4))
            bar.update()
    print(json.dumps(results) if args.json else results)


if __name__ == "__main__":
    run_program(main)
