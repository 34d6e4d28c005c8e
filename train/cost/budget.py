"""``mlx_hmem.train RECIPE --memory-budget 2GB``: settings with which a recipe's stages keep to it.

They are settings of the recipe, chosen by arithmetic alone, so the same budget always chooses the
same: a smaller ``micro_batch_size``, then ``gradient_checkpointing``; what is left of the budget
holds blocks. Neither changes what is computed but for the order of sums, and with it the last bits
of the trained numbers: a run goes on with the budget that it began with.

The budget is resident memory above that of the interpreter with MLX imported: the peak of a step
(:mod:`.costs`), the blocks in the store, and the program.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hmem.budget.resident import IMPORTS, Watch, base_bytes, bytes_text, give_back_freed, trim
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.reading import read_json

from ..recipe.recipe import Recipe, TrainerConfig
from .costs import gathered_parameters, has_memory, peak_memory, trainings_of

BUFFERS = 32 << 20  # bytes that MLX may keep of freed buffers
MARGIN = 64_000_000
MOST_CACHE = 1 << 30


@dataclass(frozen=True)
class Fit:
    """What was chosen for a stage: its settings, and the bytes that it will take."""

    stage: str
    training: TrainerConfig
    peak: int
    cache_bytes: int = 0
    cache_level_1: bool = False

    def line(self) -> str:
        chosen = [f"{self.training.part} of {self.training.batch_size} sequences at a time"]
        if self.training.gradient_checkpointing:
            chosen.append("gradient checkpointing")
        if self.cache_bytes:
            where = "all blocks" if self.cache_level_1 else "level 1 and"
            chosen.append(f"{where} {bytes_text(self.cache_bytes)} of blocks")
        return f"{self.stage} {bytes_text(self.peak)} ({', '.join(chosen)})"


def keep_to(budget: int) -> Watch:
    """Sets the limits of MLX and of the allocator. What comes back is to be called after each step:
    it raises OverBudgetError if the process has outgrown its budget."""
    base = base_bytes()
    give_back_freed()
    mx.set_cache_limit(BUFFERS)
    mx.set_memory_limit(budget)
    remedy = "give a larger one; the run goes on from its last checkpoint"
    return Watch(budget, base, trim, remedy)


def fit(recipe: Recipe, budget: int, stages: Iterable[str], folder: Path) -> tuple[Recipe, str]:
    """The recipe with settings that fit, and what they are in one line.

    ``stages``: those that will run in ``folder``. One that is finished keeps the settings it was
    made with. UserError where one cannot fit, with what it needs at least.
    """
    chosen: list[Fit] = []
    trainings = trainings_of(recipe)
    for stage in ("anchor", "memories", "dense"):
        if (done := folder / stage / "done.json").exists():
            recipe = _as_made(recipe, stage, read_json(done))
            continue
        wanted = stage in stages or (stage == "memories" and "generic" in stages)
        if not wanted or stage not in trainings:
            continue
        # The generic memory has the same shape and needs fewer blocks: the settings serve both.
        found = _fit(recipe, stage, trainings[stage], budget)
        section = replace(getattr(recipe, stage), training=found.training)
        if stage == "memories":
            section = replace(
                section, cache_bytes=max(1, found.cache_bytes), cache_level_1=found.cache_level_1
            )
        recipe = replace(recipe, **{stage: section})
        chosen.append(found)
    named = "; ".join(each.line() for each in chosen) or "no stage of this run trains"
    return recipe, f"memory budget {bytes_text(budget)}: {named}"


def _as_made(recipe: Recipe, stage: str, done: Any) -> Recipe:
    """The recipe with the settings that a finished stage was made with."""
    section, made = getattr(recipe, stage), done
    for name in ("recipe", stage, "training"):  # a damaged file is told of by the stage
        made = made.get(name) if isinstance(made, dict) else None
    if section is None or section.training is None or not isinstance(made, dict):
        return recipe
    own = {name: made.get(name) for name in ("micro_batch_size", "gradient_checkpointing")}
    own["gradient_checkpointing"] = bool(own["gradient_checkpointing"])
    return replace(recipe, **{stage: replace(section, training=replace(section.training, **own))})


def _smaller(training: TrainerConfig) -> Iterator[TrainerConfig]:
    """The recipe's own setting, then those that take less, the fastest first."""
    parts = [n for n in range(training.part, 0, -1) if training.batch_size % n == 0]
    yield training
    for again in dict.fromkeys((training.gradient_checkpointing, True)):
        for part in parts:
            yield replace(training, micro_batch_size=part, gradient_checkpointing=again)


def _fit(recipe: Recipe, stage: str, training: TrainerConfig, budget: int) -> Fit:
    """The first setting that fits; UserError if none does."""
    config = recipe.memory_config
    grouped, blocks = recipe.memories.group_by_subtree, 0
    if has_memory(stage):
        blocks = 12 * gathered_parameters(config, training.batch_size, grouped=grouped)
    peaks = []
    for each in _smaller(training):
        peak = peak_memory(recipe, stage, each) + blocks + IMPORTS + BUFFERS + MARGIN
        if peak <= budget:
            alone = Fit(stage, each, peak)
            return _with_blocks(alone, config, blocks, budget) if has_memory(stage) else alone
        peaks.append(peak)
    needed = -(-min(peaks) // 10**6) * 10**6
    remedy = f"give at least {bytes_text(needed)}, or make batch_size or windows.context smaller"
    raise UserError(f"the memory budget is too small for stage {stage}", bytes_text(budget), remedy)


def _with_blocks(fit: Fit, config: MemoryConfig, blocks: int, budget: int) -> Fit:
    """What is left holds blocks: level 1 stays if it fits."""
    first, spare = 12 * config.num_clusters[0] * math.prod(config.block_shape(1)), budget - fit.peak
    stays = first + blocks <= spare
    most = 12 * config.bank_parameters
    cache = min(spare - first if stays else spare + blocks, MOST_CACHE, most)
    used = fit.peak + cache + (first if stays else -blocks)
    return replace(fit, peak=used, cache_bytes=cache, cache_level_1=not stays)
