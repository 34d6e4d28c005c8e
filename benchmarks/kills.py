"""SIGKILL at random moments: ``python -m benchmarks.kills PART [--kills N] [--json]``.

``training``: ``mlx_hmem.train`` co-trains a tiny anchor and its memories (or trains memories on the
frozen one, in every second run), is killed, and started again with the same command until it ends.
Losses, the anchor and every block must then be, byte for byte, those of a run that nobody
disturbed.

``conversions`` of a 32 MB anchor in 64 shards (OpenLM's pickle, sharded safetensors, GGUF, the way
back to PyTorch, and one over an older model) and of the whole demo model with its memory (from
PyTorch's layout, back to it, and quantised over an older model) are killed and started again with
the same command: N times the five of the anchor together, N times each of the whole model's. After
each kill the destination must be absent, what it was before, or, byte for byte, what a conversion
makes that nobody disturbed; and what lies beside it must not load unless it is all there. Half of
the moments are drawn from the whole time of a run, half from the time in which it writes.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from tqdm import tqdm

from benchmarks.common.counting import run
from benchmarks.common.show import Result, benchmark
from convert.command import main as convert
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, save_safetensors
from mlx_hmem.folders import RECORD, REPLACED
from mlx_hmem.model.load import DEMO, load
from tests.helpers.gguf_models import to_q8, write_gguf
from tests.helpers.places import bytes_of

RECIPE = """
name: kills
corpus:
  documents: 0
  facts:
    - {kind: invented, topics: 4, entities_per_topic: 8, frequencies: [1, 8], plain_documents: 80}
tokenizer: {vocab_size: 400}
windows: {context: 64}
tree: {branching: [4, 4]}
anchor: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 16,
  intermediate_size: 64, training: {epochs: 1}}
memories:
  r: [8, 4]
  cache_bytes: 60000
  training: {epochs: 10, learning_rate: 8e-3, save_every: 7}
  cotrain: COTRAIN
dense: null
"""
TRAINED = shutil.ignore_patterns("memories", "generic", "export", "model")
SHARD_BYTES = 512 << 10
# The command itself, with shards so small that there are many moments between two.
PROGRAM = """
import sys
import mlx_hmem
import convert.anchors.weights
from convert.command import main
from convert.memory.bank import write_tensors_as_bank
from mlx_hmem.bank.writer import rewrite_bank
from mlx_hmem.errors import run_program
size = int(sys.argv.pop(1))
convert.anchors.weights.SHARD_BYTES = size
rewrite_bank.__kwdefaults__["shard_bytes"] = size
write_tensors_as_bank.__kwdefaults__["shard_bytes"] = size
run_program(lambda: main(sys.argv[1:]))
"""
NOTES = "bank/notes/"  # of a quantisation that is not at its end
Files = dict[str, bytes]


def started(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed(process: subprocess.Popen[bytes], delay: float) -> bool:
    """Whether the process was still running after so many seconds, and so was killed."""
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True


def train(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "train", str(recipe), "--out", str(out), *more]


def finish(recipe: Path, out: Path) -> dict[str, str]:
    """Runs to the end of the export; fingerprints of what came out."""
    run(train(recipe, out, "--until", "export"))
    files = [out / "memories" / "loss.jsonl", *sorted((out / "model").rglob("*.*"))]
    return {str(f.relative_to(out)): fingerprint(f) for f in files if f.is_file()}


def training(kills: int = 50) -> Result:
    rng, done, runs = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as name, tqdm(total=kills, unit="kill") as bar:
        folder = Path(name)
        while done < kills:
            cotrain = "{learning_rate_scale: 0.3}" if runs % 2 == 0 else "null"
            recipe = folder / f"{cotrain == 'null'}.yaml"
            recipe.write_text(RECIPE.replace("COTRAIN", cotrain))
            whole, out = folder / f"{recipe.stem}-whole", folder / f"killed-{runs}"
            if not whole.exists():
                run(train(recipe, whole, "--until", "sequences"))
            shutil.copytree(whole, out, ignore=TRAINED)
            wanted = finish(recipe, whole)
            command = train(recipe, out, "--only", "memories")
            while done < kills and killed(started(command), rng.uniform(2, 8)):
                done += 1
                bar.update()
            if finish(recipe, out) != wanted:
                raise UserError("a killed run came out otherwise", recipe.stem, "find out why")
            runs += 1
    return {"kills": done, "runs": runs, "came_out_otherwise": 0}


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
    load: Callable[[Path], object] = load_anchor

    def command(self, out: Path, shard_bytes: int) -> list[str]:
        program = ["quantize"] if "--bank-bits" in self.options else []
        start = [sys.executable, "-c", PROGRAM, str(shard_bytes), *program]
        return [*start, str(self.source), str(out), *self.options]

    def load_result(self, out: Path) -> None:
        """Loads what has been made, if it is a model of ours."""
        if "pytorch" not in self.options:
            self.load(out)


def save_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    """A random anchor as a model directory, in four shards."""
    folder.mkdir(parents=True)
    weights = list(named_parameters(model).items())
    for i in range(4):
        save_safetensors(folder / f"model-{i + 1:05}-of-00004.safetensors", dict(weights[i::4]))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def cases(folder: Path, layers: int = 16) -> Iterator[Case]:
    """Conversions of an anchor; of 32 MB with 16 layers."""
    args, checkpoint = ModelArgs("openlm", 192, layers, 576, 6, 32, 1024), folder / "checkpoint"
    mx.random.seed(0)
    model, older = (save_model(folder / n, Model(args), vars(args)) for n in ("model", "older"))
    convert([str(model), str(checkpoint), "--to", "pytorch"])
    # As transformers names it.
    config = dict(
        model_type="llama", hidden_size=192, num_hidden_layers=layers, intermediate_size=576,
        num_attention_heads=6, num_key_value_heads=6, rms_norm_eps=1e-5, vocab_size=1024,
        rope_theta=1e4, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    other = llama.Model(llama.ModelArgs.from_dict(config))
    yield Case("openlm", checkpoint, [])
    yield Case("huggingface", save_model(folder / "llama", other, config), [])
    yield Case("gguf", write_gguf(folder / "llama.gguf", folder / "llama", "llama", to_q8), [])
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
    yield Case("whole quantised", model, options, older, load_whole)


def written(part: Path) -> int:
    """When the record was written, which each run writes anew; 0 if there is none."""
    with suppress(OSError):
        return (part / RECORD).stat().st_mtime_ns
    return 0


def wait_for_writing(process: subprocess.Popen[bytes], part: Path, before: int) -> None:
    while process.poll() is None and written(part) in (0, before):
        time.sleep(0.001)


def is_whole(found: Files, wanted: Files, *beside: str) -> bool:
    more = [name for name in found if name not in wanted and not name.startswith(beside)]
    return not more and {name: found.get(name) for name in wanted} == wanted


def loads(case: Case, part: Path) -> bool:
    with suppress(UserError):
        case.load(part)
        return True
    return False


def check(case: Case, out: Path, part: Path, before: Files | None, wanted: Files) -> str:
    """What lies at the destination after a kill: "nothing", "before" or "whole"."""
    if part.exists() and loads(case, part):
        found = {name: data for name, data in bytes_of(part).items() if ".part" not in name}
        if not is_whole(found, wanted, RECORD, f"{REPLACED}/", NOTES):
            raise UserError("a half-made directory loads", part, "find out why")
    if not out.exists():
        return "nothing"
    found = bytes_of(out)
    if before is not None and found == before:
        case.load(out)
        return "before"
    # The record, and the folder of before, may still lie in it.
    if not is_whole(found, wanted, RECORD, f"{REPLACED}/"):
        raise UserError("a directory is neither old nor new", out, "find out why")
    case.load_result(out)
    return "whole"


def run_case(
    folder: Path, case: Case, rng: random.Random, kills: int, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Kills conversions of one case ``kills`` times in all; counts of what was found."""
    model = folder / f"{case.name}-undisturbed"
    start = time.perf_counter()
    process = started(case.command(model, shard_bytes))
    wait_for_writing(process, model.with_name(f"{model.name}.part"), 0)
    began = time.perf_counter()
    if process.wait():
        raise UserError("a conversion fails undisturbed", case.name, "run it by hand")
    duration, write_time = (time.perf_counter() - at for at in (start, began))
    wanted, before = bytes_of(model), bytes_of(case.older) if case.older else None
    found = {"kills": 0, "while writing": 0, "runs": 0, "nothing": 0, "before": 0, "whole": 0}
    while found["kills"] < kills:
        out = folder / f"{case.name}-{found['runs']}"
        part = out.with_name(f"{out.name}.part")
        if case.older:
            shutil.copytree(case.older, out)
        arguments = case.command(out, shard_bytes)
        while found["kills"] < kills:
            writing = rng.random() < 0.5
            last, process = written(part), started(arguments)
            if writing:
                wait_for_writing(process, part, last)
            if not killed(process, rng.uniform(0, write_time if writing else duration)):
                break
            found["kills"] += 1
            found["while writing"] += writing
            found[check(case, out, part, before, wanted)] += 1
        if part.exists() or bytes_of(out) != wanted:
            run(arguments)
        if part.exists() or bytes_of(out) != wanted:
            raise UserError("a killed conversion came out otherwise", out, "find out why")
        case.load_result(out)
        found["runs"] += 1
        shutil.rmtree(out)
    return found


def conversions(kills: int = 52) -> Result:
    rng, found = random.Random(0), dict[str, dict[str, int]]()
    with tempfile.TemporaryDirectory() as name, tqdm(total=8, unit="case") as bar:
        for make, count in ((cases, -(-kills // 5)), (whole_cases, kills)):
            for case in list(make(Path(name))):
                found[case.name] = run_case(Path(name), case, rng, count)
                bar.update()
    return {"conversions": found}


if __name__ == "__main__":
    benchmark(__doc__, {"training": training, "conversions": conversions})
