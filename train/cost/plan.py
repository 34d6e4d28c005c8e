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
from mlx_hmem.config import MemoryConfig, read_json
from mlx_hmem.errors import ArgumentParser, UserError

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
    bank_bytes,
    bytes_text,
    check_disk,
    check_memory,
    count_text,
    machine_memory,
    step_operations,
    training_state_bytes,
)

MEASURE_SECONDS = 2.0
LONGEST_STEP = 10.0  # seconds; a longer one is not run but scaled from a smaller one
# Characters a token by vocabulary size, measured on encyclopaedia text.
CHARACTERS = {500: 1.5, 2048: 2.7, 8192: 3.8, 16384: 4.2}


@dataclass(frozen=True)
class StagePlan:
    """One stage that trains. What needs the number of tokens is None where that is not known."""

    stage: str
    batch_size: int
    sequences: int | None
    tokens: int | None
    steps: int | None
    peak_memory_bytes: int
    seconds_per_step: float
    timed: str  # "measured" or "scaled"
    hours: float | None


@dataclass(frozen=True)
class Plan:
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
    stages: tuple[StagePlan, ...]


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
        size = math.log2(recipe.tokenizer.vocab_size)
        points = [math.log2(v) for v in CHARACTERS]
        ratio = np.interp(size, points, list(CHARACTERS.values()))
        tokens = round(read_json(path)["train_characters"] / ratio)
        source = f"the run's characters, about {ratio:.1f} a token"
    else:
        return 0, 0, "nothing: give --tokens, or --out with the corpus stage done"
    # The last sequence of a leaf is half empty.
    leaves = min(recipe.memory_config.num_clusters[-1], tokens // context)
    return max(1, tokens // of_anchor), max(1, tokens // context + leaves // 2), source


def trainee_of(
    recipe: Recipe, memory: MemoryConfig | None, training: TrainerConfig, folder: Path
) -> Trainee:
    """A real trainee of the recipe's sizes on random tokens, its store in ``folder``. Of the bank
    it has two clusters a branch: a step touches no more blocks than it has sequences."""
    model = anchor_shape(recipe)
    if isinstance(model, Model):
        initialise(model, 0)
    context = recipe.windows.of_anchor if memory is None else recipe.windows.context
    random, vocab_size = np.random.default_rng(0), anchor_sizes_of(recipe).vocab_size
    tokens = random.integers(1, vocab_size, (training.batch_size, context + 1), np.uint32)
    if memory is None:
        return AnchorTrainee(model, tokens, EOT_ID, training)
    depth = memory.num_levels
    leaves = np.arange(training.batch_size) % 2**depth
    paths = np.stack([leaves >> (depth - level) for level in range(1, depth + 1)], axis=1)
    small = replace(memory, branching=(2,) * depth)
    store = BlockStore(folder, small, 0)
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
    recipe: Recipe, memory: MemoryConfig | None, training: TrainerConfig, peak: int
) -> tuple[float, str]:
    """(seconds, "measured" or "scaled")."""
    context = min(recipe.windows.context, 256)
    small = replace(recipe, windows=WindowsSection(context))
    if recipe.anchor.path is None:  # else its config may not allow fewer layers
        anchor = replace(recipe.anchor, num_hidden_layers=1)
        memories = replace(recipe.memories, layers="all", keep_parameters=False)
        small = replace(small, anchor=anchor, memories=memories)
    one = replace(training, batch_size=1, micro_batch_size=None)
    reduced = small.memory_config if memory is not None else None
    with tempfile.TemporaryDirectory() as folder:
        short = measure(trainee_of(small, reduced, one, Path(folder)), 1, 0)
    has_memory = memory is not None
    ratio = step_operations(recipe, has_memory, training.batch_size)
    scaled = short * ratio / step_operations(small, has_memory, 1)
    if scaled > LONGEST_STEP or peak > machine_memory() / 2:
        return scaled, "scaled"
    with tempfile.TemporaryDirectory() as folder:
        trainee = trainee_of(recipe, memory, training, Path(folder))
        return measure(trainee, training.batch_size, MEASURE_SECONDS), "measured"


def _on_sequences(recipe: Recipe) -> Recipe:
    """With the context of the sequences that all arms see, which the anchor's may exceed."""
    return replace(recipe, windows=replace(recipe.windows, anchor_context=None))


Arm = tuple[str, MemoryConfig | None, TrainerConfig]


def arms_of(recipe: Recipe) -> list[Arm]:
    """The stages that train: name, memory, how."""
    arms: list[Arm] = []
    if recipe.anchor.training is not None:
        arms.append(("anchor", None, recipe.anchor.training))
    if recipe.anchor_only:
        return arms
    config = recipe.memory_config
    arms.append(("memories", config, recipe.memories.training))
    if recipe.memories.cotrain is None:
        arms.append(("generic", generic_config(config), recipe.memories.training))
    if recipe.dense is not None:
        arms.append(("dense", None, recipe.dense.training))
    return arms


def make_plan(recipe: Recipe, out: Path | None = None, tokens: int | None = None) -> Plan:
    """Checks that the recipe fits this machine (``UserError`` if not), then measures steps."""
    config, arms = recipe.memory_config, arms_of(recipe)
    needed, free = check_disk(recipe, out or Path.cwd())
    recipes = [_on_sequences(recipe) if n != "anchor" else recipe for n, _, _ in arms]
    peaks = [
        check_memory(r, n, m is not None, t) for r, (n, m, t) in zip(recipes, arms, strict=True)
    ]
    first, others, source = sequences_of(recipe, out, tokens)
    stages: list[StagePlan] = []
    timed: dict[tuple[str, int, int], tuple[float, str]] = {}
    for (name, memory, training), own, peak in zip(arms, recipes, peaks, strict=True):
        context = own.windows.of_anchor
        key = ("" if memory is None else name, training.batch_size, context)
        if key not in timed:
            timed[key] = seconds_per_step(own, memory, training, peak)
        seconds, how = timed[key]
        rows = first if name == "anchor" else others
        steps = training.num_steps(rows) if rows else training.steps
        stages.append(
            StagePlan(
                stage=name,
                batch_size=training.batch_size,
                sequences=rows or None,
                tokens=None if steps is None else steps * training.batch_size * context,
                steps=steps,
                peak_memory_bytes=peak,
                seconds_per_step=seconds,
                timed=how,
                hours=None if steps is None else steps * seconds / 3600,
            )
        )
    blocks = [n for n, r in zip(config.num_clusters, config.r, strict=True) if r]
    alone = recipe.anchor_only
    return Plan(
        name=recipe.name,
        anchor_parameters=anchor_parameters(recipe),
        fetched_parameters=0 if alone else config.fetched_parameters,
        bank_parameters=0 if alone else config.bank_parameters,
        bank_blocks=0 if alone else sum(blocks),
        bank_bytes=0 if alone else bank_bytes(recipe),
        training_state_bytes=0 if alone else training_state_bytes(recipe),
        disk_bytes=needed,
        disk_free_bytes=free,
        memory_bytes=machine_memory(),
        tokens_from=source,
        stages=tuple(stages),
    )


def table(plan: Plan) -> str:
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
    head = ("stage", "sequences", "tokens", "steps", "peak memory", "s/step", "timed", "time")
    cells: list[tuple[str, ...]] = [head]
    for s in plan.stages:
        known = ["?" if n is None else f"{n:,}" for n in (s.sequences, s.tokens, s.steps)]
        cells.append(
            (s.stage, *known, bytes_text(s.peak_memory_bytes), f"{s.seconds_per_step:.3g}",
             s.timed, time_text(s.hours))
        )  # fmt: skip
    if all(s.hours is not None for s in plan.stages):
        hours = sum(s.hours or 0 for s in plan.stages)
        cells.append(("together", "", "", "", "", "", "", time_text(hours)))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines.append("")
    for row in cells:
        parts = [row[0].ljust(widths[0])]
        parts += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def time_text(hours: float | None) -> str:
    if hours is None:
        return "?"
    if hours >= 48:
        return f"{hours / 24:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


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
