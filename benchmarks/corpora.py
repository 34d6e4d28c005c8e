"""Preparing text: time by the number of cores, memory by the length of the corpus.

    python -m benchmarks.corpora CORPUS [--copies 10] [--json]

Runs the stages corpus, tokenizer, windows, anchor-sequences, tree (static encoder) and sequences of
a recipe that takes all documents of CORPUS: on one core, on all of them, and on all of them with so
many copies of the corpus, whose documents have ids and an order of sentences of their own. Time is
the wall clock's; memory is the resident peak of the largest process, the mapped files in it
included. Nothing else may run beside it.
"""

import argparse
import gzip
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from mlx_hmem.errors import ArgumentParser, UserError, run_program
from train.corpus.readers import Faults, corpus_files, read_documents
from train.corpus.shards import num_cores

STAGES = ["corpus", "tokenizer", "windows", "anchor-sequences", "tree", "sequences"]
RECIPE = """
name: corpora
corpus: {max_characters: 2000}
tokenizer: {vocab_size: 4096}
windows: {context: 256}
tree: {branching: [16, 16], encoder: static}
"""
FILE_BYTES = 64 << 20  # of text in a file of a copied corpus


def copy_corpus(source: Path, copies: int, folder: Path) -> None:
    """Writes ``copies`` variants of a corpus as .jsonl.gz files."""
    rng, lines, size, number = random.Random(0), list[str](), 0, 0
    for copy in range(copies):
        for name, title, text in read_documents(corpus_files(source), Faults()):
            sentences = text[:3000].split(". ")
            rng.shuffle(sentences)
            record = {"id": f"{copy}-{name}", "title": title, "text": ". ".join(sentences)}
            lines.append(json.dumps(record) + "\n")
            size += len(lines[-1])
            if size > FILE_BYTES:
                _write(folder, number, lines)
                lines, size, number = [], 0, number + 1
    _write(folder, number, lines)


def _write(folder: Path, number: int, lines: list[str]) -> None:
    data = gzip.compress("".join(lines).encode(), compresslevel=1)
    (folder / f"{number:04d}.jsonl.gz").write_bytes(data)


def prepare(corpus: Path, run: Path, cores: int) -> dict[str, float]:
    """Seconds of each stage in a process of its own, and the peak over all of them."""
    recipe, result, peak = run.with_suffix(".yaml"), {}, 0
    recipe.write_text(RECIPE)
    for stage in STAGES:
        start = time.monotonic()
        command = [sys.executable, "-m", "train", str(recipe), "--corpus", str(corpus)]
        child = os.fork()
        if child == 0:
            if cores < num_cores():
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.execv(sys.executable, [*command, "--out", str(run), "--only", stage])
        _, status, usage = os.wait4(child, 0)
        if status:
            raise UserError(f"stage {stage} failed", status, "see above")
        result[stage] = time.monotonic() - start
        peak = max(peak, usage.ru_maxrss * 1024)
    return {**{f"{name}_s": seconds for name, seconds in result.items()}, "peak_bytes": peak}


def main() -> None:
    parser = ArgumentParser(
        prog="python -m benchmarks.corpora",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("corpus", type=Path, help="folder as for mlx_hmem.train --corpus")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases = [(1, num_cores()), (args.copies, num_cores())]
        if hasattr(os, "sched_setaffinity"):  # macOS cannot be told to use one core
            cases.insert(0, (1, 1))
        for copies, cores in cases:
            corpus = folder / f"corpus-{copies}"
            if not corpus.exists():
                corpus.mkdir()
                copy_corpus(args.corpus, copies, corpus)
            run = folder / f"run-{copies}-{cores}"
            result = prepare(corpus, run, cores)
            report = json.loads((run / "corpus" / "report.json").read_text())
            row = {"copies": copies, "cores": cores, "documents": report["train_documents"]}
            rows.append({**row, "characters": report["train_characters"], **result})
    if args.json:
        print(json.dumps(rows))
        return
    for name in rows[0]:
        print(f"{name:20}" + "".join(f"{row[name]:16,.1f}" for row in rows))


if __name__ == "__main__":
    run_program(main)
