"""How long a model takes to follow its folder, against remembering all of it.

``python -m benchmarks.own.following MODEL --work FOLDER [--documents N] [--json]``

Invented documents are remembered; then nothing has changed, and then one, two, … of them, one after
the other. Each is the command as a person starts it, the start of Python included. The time of an
update over that of all is to be at most twice the share of the clusters of level 1 that it touches.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.show import Result, benchmark
from mlx_hmem.errors import UserError

from .documents import make_documents

# What mlx_hmem.remember starts.
PROGRAM = "import sys; from train.remember.command import main; main(sys.argv[1:])"
TOUCHED = re.compile(r"trained again +(\d+) of (\d+) clusters of level 1, (\d+)% of the text")


def follow(folder: Path, model: Path, out: Path, *options: str) -> tuple[float, str]:
    """Seconds, and what was printed."""
    words = [str(folder), "--model", str(model), "--out", str(out), *options]
    began = time.perf_counter()
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)
    if ended.returncode:
        raise UserError("remembering failed", ended.stderr.splitlines()[-1:], "run it by hand")
    return time.perf_counter() - began, ended.stdout


def measure(
    model: Path,
    *,
    work: Path,
    documents: int = 200,
    changed: Sequence[int] = (1, 1, 1, 5),
    passes: int = 4,
) -> Result:
    notes, out = work / "notes", work / "model"
    for place in (notes, out, Path(f"{out}.run")):
        shutil.rmtree(place, ignore_errors=True)
    notes.mkdir(parents=True)
    texts, _ = make_documents(documents + sum(changed), seed=1)
    for number, document in enumerate(texts[:documents]):
        (notes / f"{number:03}.md").write_text(f"# {document.title}\n\n{document.text}\n")
    command = (notes, model, out, "--passes", str(passes))  # another one reads all again
    all_seconds, _ = follow(*command)
    nothing, _ = follow(*command)
    rows, fresh, next_file = {}, iter(texts[documents:]), 0
    for turn, count in enumerate(changed, 1):
        for _ in range(count):
            document = next(fresh)
            (notes / f"{next_file:03}.md").write_text(f"# {document.title}\n\n{document.text}\n")
            next_file += 1
        seconds, printed = follow(*command)
        found = TOUCHED.search(printed)
        assert found is not None, printed
        touched, clusters, text = map(int, found.groups())
        rows[f"turn {turn}"] = {
            "documents changed": count,
            "clusters touched": f"{touched} of {clusters}",
            "share of clusters": touched / clusters,
            "share of text": text / 100,
            "seconds": seconds,
            "of all": seconds / all_seconds,
            "of all over share of clusters": seconds / all_seconds / (touched / clusters),
        }
    return {
        "documents": documents,
        "passes": passes,
        "seconds for all": all_seconds,
        "seconds for nothing changed": nothing,
        "following": rows,
    }


if __name__ == "__main__":
    benchmark(__doc__, measure)
