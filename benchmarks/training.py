"""What training memory costs: ``python -m benchmarks.training PART [--json]``.

``step``: the step of the anchor alone, of memory on the frozen anchor and of both together, on the
same tokens, in turns. ``bank``: memory and step time with a bank of ten times as many clusters and
the same sequences. ``full``: steps with the paper's OpenLM-160M and its bank of 4.6 billion
parameters, each kind of training in a process of its own, with peak memory and what the disk grew.

``budget``: whether training memories keeps to a memory budget: steps of that shape on the frozen
anchor, a sequence and a path of its own in each, with the settings that ``mlx_hmem.train
--memory-budget`` chooses. The kernel says what the process has held at most, and what an
interpreter holds that has imported MLX.

``text CORPUS``: preparing text, time by the number of cores, memory by the length of the corpus.
Runs the stages corpus, tokenizer, windows, anchor-sequences, tree (static encoder) and sequences of
a recipe that takes all documents of CORPUS: on one core, on all of them, and on all of them with so
many copies of the corpus, whose documents have ids and an order of sentences of their own. Time is
the wall clock's; memory is the resident peak of the largest process, the mapped files in it
included. Nothing else may run beside it.
"""

import contextlib
import gzip
import json
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from benchmarks.common.counting import (
    Timed,
    anonymous_bytes,
    bare,
    compared,
    in_own_process,
    in_turns,
    returned,
    run,
    timed,
)
from benchmarks.common.models import paper_config
from benchmarks.common.show import Result, benchmark
from mlx_hmem.anchors.openlm import PRESETS, Model, ModelArgs
from mlx_hmem.budget.resident import Watch, parse_bytes, peak_resident_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.documents.files import Faults
from train.corpus.readers import corpus_files, read_documents
from train.corpus.shards import num_cores
from train.cost.budget import fit, keep_to
from train.recipe.recipe import CotrainSection, TrainerConfig, load_recipe
from train.step.anchor import AnchorTrainee, initialise
from train.step.memories import MemoryTrainee
from train.step.start import anchor_shape
from train.step.trainee import Trainee
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress

ARGS, MEMORY = PRESETS["openlm-160m"], paper_config("openlm-160m")
SMALL_ARGS = ModelArgs("openlm", 256, 8, 704, 4, 64, 4096, tie_word_embeddings=True)
SMALL = MemoryConfig(256, 8, (32, 16, 8), (16, 16, 4))
EOT = 0
RECIPE = Path(__file__).parents[1] / "train" / "recipes" / "paper" / "a4.yaml"  # of that shape
CHANGES = ["anchor.training={steps: 1}", "memories.cotrain=null"]
CHANGES += ["memories.training.batch_size=1", "memories.training.micro_batch_size=null"]
STAGES = ["corpus", "tokenizer", "windows", "anchor-sequences", "tree", "sequences"]
TEXT_RECIPE = """
name: corpora
corpus: {max_characters: 2000}
tokenizer: {vocab_size: 4096}
windows: {context: 256}
tree: {branching: [16, 16], encoder: static}
"""


def data(config: MemoryConfig, sequences: int, context: int, vocabulary: int) -> tuple[Any, Any]:
    """Random tokens, and for each sequence a path to a random leaf."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary, (sequences, context + 1)).astype(np.uint16)
    leaves = rng.integers(0, config.num_clusters[-1], sequences)
    return tokens, np.array([config.path_to(config.num_levels, int(leaf)) for leaf in leaves])


def anchor_of(args: ModelArgs) -> Model:
    model = Model(args)
    initialise(model, 0)
    return model


@contextlib.contextmanager
def trainee_of(
    kind: str,
    args: ModelArgs,
    config: MemoryConfig,
    training: TrainerConfig,
    data: tuple[Any, Any],
    **store: Any,
) -> Iterator[Trainee]:
    tokens, paths = data
    if kind == "anchor alone":
        yield AnchorTrainee(anchor_of(args), tokens, EOT, training)
        return
    cotrain = CotrainSection() if kind == "co-trained" else None
    with (
        tempfile.TemporaryDirectory() as folder,
        BlockStore(Path(folder), config, 0, **store) as opened,
    ):
        yield MemoryTrainee(anchor_of(args), opened, tokens, paths, EOT, training, cotrain)


def step_time(trainee: Trainee, size: int, sequences: int, step: int) -> Timed:
    rows, following = ((np.arange(size) + n * size) % sequences for n in (step, step + 1))
    return timed(lambda: trainee.step(rows, 1e-4, following))


def step(steps: int = 10, context: int = 512, batch_size: int = 2) -> Result:
    """Median seconds of a step by kind, the kinds in turn."""
    training, count = TrainerConfig(batch_size=batch_size), 4 * batch_size
    given = data(MEMORY, count, context, ARGS.vocab_size)
    contenders = dict[str, Callable[[int], Timed]]()
    with contextlib.ExitStack() as stack:
        for kind in ("anchor alone", "frozen", "co-trained"):
            trainee = stack.enter_context(trainee_of(kind, ARGS, MEMORY, training, given))
            contenders[kind] = partial(step_time, trainee, batch_size, count)
        found = in_turns(contenders, steps, "step")
    rows = compared(found, "anchor alone")
    return {"tokens_per_step": context * batch_size, "steps": steps, "a step": rows}


def bank(steps: int = 10) -> Result:
    sizes = {"a bank": 1, "about ten times as large": 10}
    return {"bank": {name: in_own_process(of_bank, f, steps) for name, f in sizes.items()}}


def of_bank(factor: int, steps: int) -> dict[str, float]:
    """Memory and step time with ``factor`` times the clusters on levels 2 and 3. The sequences, 64
    spread over all of the bank, come again and again: the cache is warm."""
    config = replace(SMALL, branching=(16, 16 * factor, 4))
    training = TrainerConfig(batch_size=8)
    given = data(config, 64, 64, SMALL_ARGS.vocab_size)
    times, most = list[Timed](), 0
    with trainee_of("frozen", SMALL_ARGS, config, training, given, cache_bytes=1 << 30) as trainee:
        for step in range(2 * steps):
            one = step_time(trainee, 8, 64, step)
            if step >= steps:
                times.append(one)
                most = max(most, anonymous_bytes())
    return {
        "bank_parameters": config.bank_parameters,
        "resident_bytes": most,
        "step_s": median(t.ms for t in times) / 1e3,
        "step_cpu_s": median(t.cpu_ms for t in times) / 1e3,
    }


def full(steps: int = 10, context: int = 512) -> Result:
    kinds = ("frozen", "co-trained")
    return {"full": {kind: in_own_process(full_run, kind, steps, context) for kind in kinds}}


def budget(budget: str = "2GB", steps: int = 4, context: int = 512) -> Result:
    most = parse_bytes(budget, "--budget")
    found: Result = in_own_process(full_run, "frozen", steps, context, most)
    above = found["peak_resident_bytes"] - bare()["VmHWM"]
    kept = {"peak_above_bare_bytes": above, "kept": above <= most}
    return {"budget_bytes": most, **kept, **found}


def full_run(kind: str, steps: int, context: int, budget: int = 0) -> dict[str, Any]:
    """Steps of the paper's shape and a commit in this process, which should be a fresh one."""
    training = TrainerConfig(batch_size=2, micro_batch_size=1, gradient_checkpointing=True)
    cache: dict[str, Any] = {"cache_bytes": 1 << 28}
    check: Watch | None = None
    cotrain, chosen = CotrainSection() if kind == "co-trained" else None, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if budget:
            recipe = load_recipe(RECIPE, [*CHANGES, f"windows.context={context}"])
            recipe, chosen["chosen"] = fit(recipe, budget, ["memories"], folder)
            check = keep_to(budget)
            memories = recipe.memories
            training, anchor = memories.training, anchor_shape(recipe)
            cache = {"cache_bytes": memories.cache_bytes, "cache_level_1": memories.cache_level_1}
        else:
            mx.set_cache_limit(1 << 28)  # else freed buffers of every size stay
            anchor = anchor_of(ARGS)
        size, times = training.batch_size, []
        tokens, paths = data(MEMORY, size * steps, context, ARGS.vocab_size)
        with BlockStore(folder, MEMORY, 0, **cache) as store:
            trainee = MemoryTrainee(anchor, store, tokens, paths, EOT, training, cotrain)
            for step in range(steps):
                times.append(step_time(trainee, size, len(tokens), step).ms)
                if check is not None:
                    check()
            commit = timed(lambda: trainee.save(folder, Progress({}, steps))).ms
            touched = store.touched()
            touched_bytes = sum(store.record_bytes(level) for level, _ in touched)
        grown = os.stat(folder / "data.mdb").st_blocks * 512
    return {
        "steps": steps,
        "tokens_per_step": size * context,
        "bank_parameters": MEMORY.bank_parameters,
        "step_s": median(times[1:]) / 1e3,
        "commit_s": commit / 1e3,
        "peak_resident_bytes": peak_resident_bytes(),
        "disk_bytes": grown,
        "touched_blocks": len(touched),
        "touched_block_bytes": touched_bytes,
        **chosen,
    }


def copy_corpus(source: Path, copies: int, folder: Path) -> None:
    """Writes ``copies`` variants of a corpus as .jsonl.gz files."""
    rng = random.Random(0)
    for copy in range(copies):
        with gzip.open(folder / f"{copy:04d}.jsonl.gz", "wt", compresslevel=1) as file:
            for name, title, text in read_documents(corpus_files(source), Faults()):
                sentences = text[:3000].split(". ")
                rng.shuffle(sentences)
                record = {"id": f"{copy}-{name}", "title": title, "text": ". ".join(sentences)}
                file.write(json.dumps(record) + "\n")


def prepare(corpus: Path, out: Path, cores: int) -> dict[str, float]:
    """Seconds of each stage in a process of its own, and the peak over all of them."""
    recipe, result, peaks = out.with_suffix(".yaml"), dict[str, float](), []
    recipe.write_text(TEXT_RECIPE)
    command = [sys.executable, "-m", "train", str(recipe), "--corpus", str(corpus)]

    def keep_to_cores() -> None:
        if cores < num_cores():
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])

    for stage in STAGES:
        arguments = [*command, "--out", str(out), "--only", stage]
        (_, peak), took = returned(partial(run, arguments, preexec_fn=keep_to_cores))
        result[f"{stage}_s"] = took.ms / 1e3
        peaks.append(peak)
    return {**result, "peak_bytes": max(peaks)}


def text(corpus: Path, copies: int = 10) -> Result:
    """``corpus``: a folder as for ``mlx_hmem.train --corpus``."""
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        cases = [(1, num_cores()), (copies, num_cores())]
        if hasattr(os, "sched_setaffinity"):  # macOS cannot be told to use one core
            cases.insert(0, (1, 1))
        for number, cores in cases:
            copied, out = Path(place) / f"corpus-{number}", Path(place) / f"run-{number}-{cores}"
            if not copied.exists():
                copied.mkdir()
                copy_corpus(corpus, number, copied)
            seconds = prepare(copied, out, cores)
            report = json.loads((out / "corpus" / "report.json").read_text())
            rows[f"copies {number}, cores {cores}"] = {
                "documents": report["train_documents"],
                "characters": report["train_characters"],
                **seconds,
            }
    return {"text": rows}


if __name__ == "__main__":
    benchmark(__doc__, {"step": step, "bank": bank, "full": full, "budget": budget, "text": text})
