"""Training that is killed, and started again."""

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.counting import run
from benchmarks.common.show import Result
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint

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
