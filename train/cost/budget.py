"""``mlx_hmem.train RECIPE --memory-budget 2GB``: settings with which a recipe's stages keep to it.

They are settings of the recipe, chosen by arithmetic alone, so the same budget always chooses the
same: a smaller ``micro_batch_size``, then ``gradient_checkpointing``; what is left of the budget
holds blocks. Neither changes what is computed but for the order of sums, and with it the last bits
of the trained numbers: a run goes on with the budget that it began with.

The budget is resident memory above that of the interpreter with MLX imported. For the memory stages
on a frozen anchor it is reckoned as the larger of

* the gradient: the anchor, the batch's blocks with two moments, the fetched memory of the sequences
  worked on at a time twice, and the larger of three times the logits and what one layer's gradient
  takes, with the states that each layer begins with (without checkpointing all of its own), and
* the update: the anchor and eight times the blocks,

and beside it the blocks in the store and the program. At the 160M shape with 4.6 billion parameters
of memory (one sequence of 512 tokens, float32) that was 2.00 GB where 1.88 were measured: ``python
-m benchmarks.training budget``. A stage that trains an anchor is reckoned as in :mod:`.costs`.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_hmem.anchors.load import weight_files
from mlx_hmem.budget.resident import (
    IMPORTS,
    Watch,
    bytes_text,
    give_back_freed,
    resident_bytes,
    trim,
)
from mlx_hmem.config import MemoryConfig, read_json
from mlx_hmem.errors import UserError
from mlx_hmem.files import read_safetensors_header
from mlx_hmem.model.find import find_model

from ..recipe.recipe import Recipe, TrainerConfig
from .costs import anchor_parameters, anchor_sizes_of, peak_memory

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
        parts = self.training.micro_batch_size or self.training.batch_size
        chosen = [f"{parts} of {self.training.batch_size} sequences at a time"]
        if self.training.gradient_checkpointing:
            chosen.append("gradient checkpointing")
        if self.cache_bytes:
            where = "all blocks" if self.cache_level_1 else "level 1 and"
            chosen.append(f"{where} {bytes_text(self.cache_bytes)} of blocks")
        return f"{self.stage} {bytes_text(self.peak)} ({', '.join(chosen)})"


def keep_to(budget: int) -> Watch:
    """Sets the limits of MLX and of the allocator. What comes back is to be called after each step:
    it raises OverBudgetError if the process has outgrown its budget."""
    give_back_freed()
    mx.set_cache_limit(BUFFERS)
    mx.set_memory_limit(budget)
    remedy = "give a larger one; the run goes on from its last checkpoint"
    return Watch(budget, resident_bytes() - IMPORTS, trim, remedy)


def fit(recipe: Recipe, budget: int, stages: Iterable[str], folder: Path) -> tuple[Recipe, str]:
    """The recipe with settings that fit, and what they are in one line.

    ``stages``: those that will run in ``folder``. One that is finished keeps the settings it was
    made with. UserError where one cannot fit, with what it needs at least.
    """
    chosen: list[Fit] = []
    for stage in ("anchor", "memories", "dense"):
        if (done := folder / stage / "done.json").exists():
            recipe = _as_made(recipe, stage, read_json(done))
            continue
        wanted = stage in stages or (stage == "memories" and "generic" in stages)
        if not wanted:
            continue
        if stage == "anchor" and recipe.anchor.training is not None:
            found = _fit_anchor(recipe, stage, recipe.anchor.training, budget)
            recipe = replace(recipe, anchor=replace(recipe.anchor, training=found.training))
        elif stage == "dense" and recipe.dense is not None and not recipe.anchor_only:
            found = _fit_anchor(recipe, stage, recipe.dense.training, budget)
            recipe = replace(recipe, dense=replace(recipe.dense, training=found.training))
        elif stage == "memories" and not recipe.anchor_only:
            # The generic memory has the same shape and needs fewer blocks: the settings serve both.
            found = _fit_memories(recipe, budget)
            memories = replace(
                recipe.memories,
                training=found.training,
                cache_bytes=max(1, found.cache_bytes),
                cache_level_1=found.cache_level_1,
            )
            recipe = replace(recipe, memories=memories)
        else:
            continue
        chosen.append(found)
    named = "; ".join(each.line() for each in chosen) or "no stage of this run trains"
    return recipe, f"memory budget {bytes_text(budget)}: {named}"


def _as_made(recipe: Recipe, stage: str, done: Any) -> Recipe:
    """The recipe with the settings that a finished stage was made with."""
    section = getattr(recipe, stage)
    made = (done.get("recipe", {}).get(stage) or {}).get("training") or {}
    if section is None or section.training is None or not made:
        return recipe
    own = {name: made.get(name) for name in ("micro_batch_size", "gradient_checkpointing")}
    own["gradient_checkpointing"] = bool(own["gradient_checkpointing"])
    return replace(recipe, **{stage: replace(section, training=replace(section.training, **own))})


def _smaller(training: TrainerConfig) -> Iterator[TrainerConfig]:
    """The recipe's own setting, then those that take less, the fastest first."""
    own = training.micro_batch_size or training.batch_size
    parts = [n for n in range(own, 0, -1) if training.batch_size % n == 0]
    yield training
    for again in dict.fromkeys((training.gradient_checkpointing, True)):
        for part in parts:
            yield replace(training, micro_batch_size=part, gradient_checkpointing=again)


def _fit_anchor(recipe: Recipe, stage: str, training: TrainerConfig, budget: int) -> Fit:
    if stage == "dense":
        recipe = replace(recipe, windows=replace(recipe.windows, anchor_context=None))
    least = 0
    for each in _smaller(training):
        peak = peak_memory(recipe, False, each) + IMPORTS + BUFFERS + MARGIN
        least = min(least or peak, peak)
        if peak <= budget:
            return Fit(stage, each, peak)
    raise _too_small(stage, least, budget)


def _fit_memories(recipe: Recipe, budget: int) -> Fit:
    config, least = recipe.memory_config, 0
    batch = recipe.memories.training.batch_size
    blocks = 12 * gathered_parameters(config, batch)
    for each in _smaller(recipe.memories.training):
        peak = step_bytes(recipe, each) + blocks + IMPORTS + BUFFERS + MARGIN
        least = min(least or peak, peak)
        if peak > budget:
            continue
        spare = budget - peak
        first = 12 * config.num_clusters[0] * math.prod(config.block_shape(1))
        stays = first + blocks <= spare
        most = 12 * config.bank_parameters
        cache = min(spare - first if stays else spare + blocks, MOST_CACHE, most)
        used = peak + cache + (first if stays else -blocks)
        return Fit("memories", each, used, cache, not stays)
    raise _too_small("memories", least, budget)


def _too_small(stage: str, least: int, budget: int) -> UserError:
    needed = -(-least // 10**6) * 10**6
    remedy = f"give at least {bytes_text(needed)}, or make batch_size or windows.context smaller"
    return UserError(
        f"the memory budget is too small for stage {stage}", bytes_text(budget), remedy
    )


def gathered_parameters(config: MemoryConfig, batch_size: int) -> int:
    """Those of the blocks that a batch touches at most."""
    levels = enumerate(config.num_clusters, 1)
    return sum(min(batch_size, n + 1) * math.prod(config.block_shape(i)) for i, n in levels)


def anchor_bytes(recipe: Recipe) -> int:
    """Of the frozen anchor, as it is stored."""
    if recipe.anchor.path is not None and recipe.anchor.training is None:
        files = weight_files(find_model(recipe.anchor.path, ["model*.safetensors"]))
        headers = (read_safetensors_header(file)[0] for file in files)
        return sum(t.end - t.start for header in headers for t in header.values())
    return 4 * anchor_parameters(recipe)


def step_bytes(recipe: Recipe, training: TrainerConfig) -> int:
    """MLX's peak in a step of the memory stages; see the top of this file."""
    config = recipe.memory_config
    gathered = gathered_parameters(config, training.batch_size)
    if recipe.memories.cotrain is not None:
        return peak_memory(recipe, True, training)
    anchor, context = anchor_sizes_of(recipe), recipe.windows.context
    part = training.micro_batch_size or training.batch_size
    tokens, fetched = part * context, part * config.fetched_parameters
    attention = part * anchor.num_heads * context**2
    of_layer = tokens * (5 * (anchor.hidden_size + anchor.query_size) + 4.5 * anchor.inner_size)
    of_layer += tokens * 2 * sum(config.r) * config.num_memory_layers / anchor.num_layers
    kept = anchor.num_layers * tokens * anchor.hidden_size
    if not training.gradient_checkpointing:
        kept = int(anchor.num_layers * (of_layer + attention))
    logits = 3 * tokens * anchor.vocab_size
    sums = gathered if part < training.batch_size else 0  # of the gradients so far
    backward = 2 * fetched + gathered + of_layer + 6 * attention
    gradient = 3 * gathered + sums + 2 * fetched + kept + max(logits, backward)
    return anchor_bytes(recipe) + int(4 * max(gradient, 8 * gathered))
