"""``mlx_hmem.train plan RECIPE``: what a recipe will make and cost, before anything starts.

What cannot fit is refused in one line that says what would. Sizes follow from the recipe
(:mod:`train.cost.costs`, which also says how peak memory is reckoned).

Time is that of real steps of the real sizes where a step is short and fits; where not, that of a
step with one layer and one sequence, scaled by floating-point operations ("scaled": expect a factor
of two). Evaluation, tokenizer, tree and export are not counted; they take minutes.
"""

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from mlx_hmem.anchors.openlm import Model
from mlx_hmem.bank.writer import planned_bytes
from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.evaluate.tables import table as text_table
from mlx_hmem.reading import read_json

from ..corpus.facts import make_facts
from ..data.arrays import load_mapped
from ..data.tokenizer import EOT_ID
from ..recipe.recipe import Recipe, TrainerConfig, WindowsSection, add_recipe_arguments, load_recipe
from ..step.anchor import AnchorTrainee, initialise
from ..step.memories import MemoryTrainee, generic_config
from ..step.start import anchor_shape
from ..step.trainee import Trainee
from ..store.blocks import BlockStore
from .costs import (
    anchor_parameters,
    anchor_sizes_of,
    check_disk,
    check_memory,
    context_of,
    count_text,
    has_memory,
    step_operations,
    training_state_bytes,
    trainings_of,
)

MEASURE_SECONDS = 2.0
LONGEST_STEP = 10.0  # seconds; a longer one is not run but scaled from a smaller one
# Characters a token by vocabulary size, measured on encyclopaedia text.
CHARACTERS = {500: 1.5, 2048: 2.7, 8192: 3.8, 16384: 4.2}


@dataclass(frozen=True)
class StageCost:
    """One stage that trains. What needs the number of tokens is None where that is not known."""

    stage: str
    batch_size: int
    sequences: int | None
    tokens: int | None
    steps: int | None
    peak_memory_bytes: int
    seconds_per_step: float
    timed: str  # "measured" or "scaled"
    hours_per_million_tokens: float
    hours: float | None


@dataclass(frozen=True)
class RunCost:
    name: str
    anchor_parameters: int
    fetched_parameters: int
    bank_parameters: int
    bank_blocks: int
    bank_bytes: int
    training_state_bytes: int
    disk_bytes: int
    disk_free_bytes: int
    memory_bytes: int
    tokens_from: str
    stages: tuple[StageCost, ...]


def characters_per_token(recipe: Recipe) -> float:
    points, sizes = [math.log2(v) for v in CHARACTERS], list(CHARACTERS.values())
    return float(np.interp(math.log2(recipe.tokenizer.vocab_size), points, sizes))


def most_characters(recipe: Recipe) -> int | None:
    """Characters of the text as the recipe alone says them: facts that need no file, and documents
    of the greatest length; None where it does not say how many, or all facts are in files."""
    corpus = recipe.corpus
    if corpus.documents is None:
        return None
    invented = [facts for facts in corpus.facts if facts.get("kind") == "invented"]
    documents = (document for facts in invented for document in make_facts(facts, recipe.seed)[0])
    return corpus.documents * corpus.max_characters + sum(len(d["text"]) for d in documents)


def sequences_of(recipe: Recipe, out: Path | None, tokens: int | None) -> tuple[int, int, str]:
    """(sequences of the anchor, sequences of the other stages, where they are known from); 0 where
    nothing is known."""
    context, of_anchor = recipe.windows.context, recipe.windows.of_anchor
    if out is not None:
        rows = [out / name / "tokens.npy" for name in ("anchor-sequences", "sequences")]
        if all(path.exists() for path in rows):
            first, second = (len(load_mapped(path)) for path in rows)
            return first, second, "the run's sequences"
    if tokens is not None:
        source = "--tokens"
    elif out is not None and (path := out / "windows" / "tokens.npy").exists():
        tokens, source = len(load_mapped(path)), "the run's windows"
    elif out is not None and (path := out / "corpus" / "report.json").exists():
        ratio = characters_per_token(recipe)
        tokens = round(read_json(path)["train_characters"] / ratio)
        source = f"the run's characters, about {ratio:.1f} a token"
    elif characters := most_characters(recipe):
        tokens = max(1, round(characters / characters_per_token(recipe)))
        source = "the facts of the recipe, roughly; --tokens says better"
        if recipe.corpus.documents:
            source = "the recipe, if every document is as long as it may be; --tokens says better"
    else:
        return 0, 0, "nothing: give --tokens, or --out with the corpus stage done"
    # The last sequence of a leaf is half empty.
    leaves = min(recipe.memory_config.num_clusters[-1], tokens // context)
    return max(1, tokens // of_anchor), max(1, tokens // context + leaves // 2), source


def trainee_of(recipe: Recipe, stage: str, training: TrainerConfig, folder: Path) -> Trainee:
    """A real trainee of the recipe's sizes on random tokens, its store in ``folder``. Of the bank
    it has two clusters a branch: a step touches no more blocks than it has sequences."""
    model = anchor_shape(recipe)
    if isinstance(model, Model):
        initialise(model, 0)
    context = context_of(recipe, stage)
    random, vocab_size = np.random.default_rng(0), anchor_sizes_of(recipe).vocab_size
    tokens = random.integers(1, vocab_size, (training.batch_size, context + 1), np.uint32)
    if not has_memory(stage):
        return AnchorTrainee(model, tokens, EOT_ID, training)
    memory = recipe.memory_config if stage == "memories" else generic_config(recipe.memory_config)
    depth = memory.num_levels
    grouped = stage == "memories" and recipe.memories.group_by_subtree
    leaves = np.arange(training.batch_size) % 2 ** (depth - grouped)
    paths = np.stack([leaves >> (depth - level) for level in range(1, depth + 1)], axis=1)
    store = BlockStore(folder, replace(memory, branching=(2,) * depth), 0)
    paths, cotrain = paths.astype(np.int32), recipe.memories.cotrain
    return MemoryTrainee(model, store, tokens, paths, EOT_ID, training, cotrain)


def measure(trainee: Trainee, batch_size: int, seconds: float) -> float:
    """Median seconds of a step; the first, which compiles, does not count."""
    rows, times = np.arange(batch_size), list[float]()
    trainee.step(rows, 1e-4)
    while not times or sum(times) < seconds:
        start = time.perf_counter()
        trainee.step(rows, 1e-4)
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def seconds_per_step(
    recipe: Recipe, stage: str, training: TrainerConfig, peak: int
) -> tuple[float, str]:
    """(seconds, "measured" or "scaled")."""
    context = min(context_of(recipe, stage), 256)
    small = replace(recipe, windows=WindowsSection(context))
    if recipe.anchor.path is None:  # else its config may not allow fewer layers
        anchor = replace(recipe.anchor, num_hidden_layers=1)
        memories = replace(recipe.memories, layers="all", keep_parameters=False)
        small = replace(small, anchor=anchor, memories=memories)
    one = replace(training, batch_size=1, micro_batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        short = measure(trainee_of(small, stage, one, Path(folder)), 1, 0)
    ratio = step_operations(recipe, stage, training.batch_size)
    scaled = short * ratio / step_operations(small, stage, 1)
    if scaled > LONGEST_STEP or peak > machine_bytes() / 2:
        return scaled, "scaled"
    with tempfile.TemporaryDirectory() as folder:
        trainee = trainee_of(recipe, stage, training, Path(folder))
        return measure(trainee, training.batch_size, MEASURE_SECONDS), "measured"


def make_plan(recipe: Recipe, out: Path | None = None, tokens: int | None = None) -> RunCost:
    """Checks that the recipe fits this machine (``UserError`` if not), then measures steps."""
    config, trainings = recipe.memory_config, trainings_of(recipe)
    needed, free = check_disk(recipe, out or Path.cwd())
    peaks = {stage: check_memory(recipe, stage, own) for stage, own in trainings.items()}
    first, others, source = sequences_of(recipe, out, tokens)
    stages = list[StageCost]()
    timed: dict[tuple[str, int, int], tuple[float, str]] = {}
    for stage, training in trainings.items():
        context = context_of(recipe, stage)
        key = (stage if has_memory(stage) else "", training.batch_size, context)
        if key not in timed:
            timed[key] = seconds_per_step(recipe, stage, training, peaks[stage])
        seconds, how = timed[key]
        rows = first if stage == "anchor" else others
        steps = training.num_steps(rows) if rows else training.steps
        stages.append(
            StageCost(
                stage=stage,
                batch_size=training.batch_size,
                sequences=rows or None,
                tokens=None if steps is None else steps * training.batch_size * context,
                steps=steps,
                peak_memory_bytes=peaks[stage],
                seconds_per_step=seconds,
                timed=how,
                hours_per_million_tokens=seconds / training.batch_size / context * 1e6 / 3600,
                hours=None if steps is None else steps * seconds / 3600,
            )
        )
    blocks = sum(n for n, r in zip(config.num_clusters, config.r, strict=True) if r)
    alone = recipe.anchor_only
    return RunCost(
        name=recipe.name,
        anchor_parameters=anchor_parameters(recipe),
        fetched_parameters=0 if alone else config.fetched_parameters,
        bank_parameters=0 if alone else config.bank_parameters,
        bank_blocks=0 if alone else blocks,
        bank_bytes=0 if alone else planned_bytes(recipe.planned_bank()),
        training_state_bytes=0 if alone else training_state_bytes(recipe),
        disk_bytes=needed,
        disk_free_bytes=free,
        memory_bytes=machine_bytes(),
        tokens_from=source,
        stages=tuple(stages),
    )


def table(plan: RunCost) -> str:
    """The plan for people."""
    rows = [
        ("anchor", f"{count_text(plan.anchor_parameters)} parameters"),
        ("fetched memory", f"{count_text(plan.fetched_parameters)} parameters"),
        (
            "memory bank",
            f"{count_text(plan.bank_parameters)} parameters in {plan.bank_blocks:,} blocks, "
            f"{bytes_text(plan.bank_bytes)} on disk",
        ),
        ("training state", f"{bytes_text(plan.training_state_bytes)} if every block is touched"),
        ("disk", f"{bytes_text(plan.disk_bytes)} of {bytes_text(plan.disk_free_bytes)} free"),
        ("memory", f"{bytes_text(plan.memory_bytes)} in this machine"),
        ("tokens from", plan.tokens_from),
    ]
    lines = [f"{name:<16}{text}" for name, text in rows]
    head = ["stage", "sequences", "tokens", "steps", "peak memory", "s/step", "timed", "time"]
    cells = [head]
    for s in plan.stages:
        known = ["?" if n is None else f"{n:,}" for n in (s.sequences, s.tokens, s.steps)]
        a_million = f"{time_text(s.hours_per_million_tokens)} per million tokens"
        lasts = a_million if s.hours is None else time_text(s.hours)
        memory = bytes_text(s.peak_memory_bytes)
        cells.append([s.stage, *known, memory, f"{s.seconds_per_step:.3g}", s.timed, lasts])
    if all(s.hours is not None for s in plan.stages):
        hours = sum(s.hours or 0 for s in plan.stages)
        cells.append(["together", *[""] * 6, time_text(hours)])
    return "\n".join([*lines, "", text_table(cells)])


def time_text(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{60 * hours:.1f} minutes" if hours >= 1 / 30 else f"{3600 * hours:.0f} seconds"


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.train plan",
        description="Says what a recipe will make, how much memory and disk it takes and how long "
        "it runs here, beside whatever else runs now. A recipe that cannot fit is refused (exit "
        "status 2). Starts no stage; takes some ten seconds to measure steps.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, help="folder of the run; its corpus gives the tokens")
    parser.add_argument("--tokens", type=int, help="tokens of one pass, where no run knows them")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(words)
    if args.tokens is not None and args.tokens < 1:
        raise UserError("--tokens is not 1 or more", args.tokens, "give the tokens of one pass")
    plan = make_plan(load_recipe(args.recipe, args.set), args.out, args.tokens)
    print(json.dumps(asdict(plan), indent=2) if args.json else table(plan))
