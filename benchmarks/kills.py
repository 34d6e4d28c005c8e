"""``python -m benchmarks.kills [--kills N] [--json]``: SIGKILL at random moments of a real run.

``mlx_hmem.train`` co-trains a tiny anchor and its memories (or trains memories on the frozen one,
in every second run), is killed, and started again with the same command until it ends. Losses, the
anchor and every block must then be, byte for byte, those of a run that nobody disturbed.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
from tqdm import tqdm

from mlx_hmem.errors import ArgumentParser, UserError, run_program
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
anchor:
  hidden_size: 32
  num_hidden_layers: 2
  num_attention_heads: 2
  head_dim: 16
  intermediate_size: 64
  training: {epochs: 1}
memories:
  r: [8, 4]
  cache_bytes: 60000
  training: {epochs: 10, learning_rate: 8e-3, save_every: 7}
  cotrain: COTRAIN
dense: null
"""


def command(recipe: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "train", str(recipe), "--out", str(out), *more]


def finish(recipe: Path, out: Path) -> dict[str, str]:
    """Runs to the end of the export; fingerprints of what came out."""
    subprocess.run(command(recipe, out, "--until", "export"), check=True, stdout=subprocess.DEVNULL)
    files = [out / "memories" / "loss.jsonl", *sorted((out / "model").rglob("*.*"))]
    return {str(f.relative_to(out)): fingerprint(f) for f in files if f.is_file()}


def kill_until_done(recipe: Path, out: Path, rng: random.Random, left: int) -> int:
    """Starts the run again and again, killing it, at most ``left`` times; returns how often."""
    kills = 0
    while kills < left:
        process = subprocess.Popen(
            command(recipe, out, "--only", "memories"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(rng.uniform(2, 8))
            break  # it came to its end
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    return kills


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rng, kills, runs = random.Random(0), 0, 0
    with tempfile.TemporaryDirectory() as name, tqdm(total=args.kills, unit="kill") as bar:
        folder = Path(name)
        while kills < args.kills:
            cotrain = "{learning_rate_scale: 0.3}" if runs % 2 == 0 else "null"
            recipe = folder / f"{cotrain == 'null'}.yaml"
            recipe.write_text(RECIPE.replace("COTRAIN", cotrain))
            whole, killed = folder / f"{recipe.stem}-whole", folder / f"killed-{runs}"
            if not whole.exists():
                until = command(recipe, whole, "--until", "sequences")
                subprocess.run(until, check=True, capture_output=True)
            shutil.copytree(
                whole,
                killed,
                ignore=shutil.ignore_patterns("memories", "generic", "export", "model"),
            )
            wanted = finish(recipe, whole)
            done = kill_until_done(recipe, killed, rng, args.kills - kills)
            if finish(recipe, killed) != wanted:
                raise UserError("a killed run came out otherwise", recipe.stem, "find out why")
            kills, runs = kills + done, runs + 1
            bar.update(done)
    result = {"kills": kills, "runs": runs, "came out otherwise": 0}
    print(json.dumps(result) if args.json else result)


if __name__ == "__main__":
    run_program(main)
