"""A memory budget for training: the settings it chooses; the numbers stay, but for rounding."""

import re
from dataclasses import replace

import numpy as np

from mlx_hmem.budget.resident import parse_bytes
from tests.helpers.programs import refused
from tests.train.test_plan import COTRAINED, TINY, WIDE
from train.cost.budget import fit
from train.cost.costs import peak_memory
from train.cost.plan import trainee_of
from train.recipe.recipe import AnchorSection, MemoriesSection, Recipe, TrainerConfig
from train.recipe.sections import TokenizerSection, TreeSection, WindowsSection
from train.stages import is_done, mark_done, stages_of

STAGES = ("anchor", "memories", "generic", "dense")
# The 160M shape with a bank of 4.6 billion parameters.
LARGE = Recipe(
    name="large", tokenizer=TokenizerSection(vocab_size=50_432),
    windows=WindowsSection(context=512), tree=TreeSection(branching=(16, 16, 16, 16)),
    anchor=AnchorSection(512, 35, 12, 32, 2048, training=TrainerConfig(batch_size=1)),
    memories=MemoriesSection(r=(256, 64, 16, 0), training=TrainerConfig(batch_size=4)), dense=None,
)  # fmt: skip


def memories_of(recipe: Recipe, budget: int, folder) -> TrainerConfig:
    return fit(recipe, budget, ["memories"], folder)[0].memories


def test_a_smaller_budget_takes_smaller_parts_then_computes_again_then_evicts(tmp_path):
    found = [memories_of(LARGE, size * 10**8, tmp_path) for size in range(40, 160, 17)]
    parts = [m.training.micro_batch_size or m.training.batch_size for m in found]
    assert not found[-1].training.gradient_checkpointing
    assert found[0].training.gradient_checkpointing
    assert (found[0].cache_level_1, found[-1].cache_level_1) == (True, False)
    assert parts[-1] == 4 > parts[0]
    assert {m.training.batch_size for m in found} == {4}
    again = memories_of(LARGE, 40 * 10**8, tmp_path)
    assert again == found[0]  # by arithmetic alone


def test_what_is_named_as_enough_is_enough_for_stages_of_memory_and_of_the_anchor(tmp_path):
    line = refused("small for stage memories: 1000MB", fit, LARGE, 10**9, STAGES[1:], tmp_path)
    least = re.search(r"at least (\d+MB)", line)[1]
    recipe, line = fit(LARGE, parse_bytes(least), ["memories"], tmp_path)
    assert "2 of 4 sequences at a time, gradient checkpointing" in line
    assert peak_memory(recipe, "memories", recipe.memories.training) < parse_bytes(least)
    one = replace(LARGE.memories, training=TrainerConfig(batch_size=1))
    assert fit(replace(LARGE, memories=one), 2 * 10**9, ["memories"], tmp_path)
    for stage in ("anchor", "dense"):
        refused(f"too small for stage {stage}", fit, TINY, 10**6, [stage], tmp_path)
        assert fit(TINY, 10**9, [stage], tmp_path)[0].anchor == TINY.anchor
    assert fit(COTRAINED, 10**9, STAGES, tmp_path)


def test_a_finished_stage_keeps_what_it_was_made_with(tmp_path):
    (tmp_path / "memories").mkdir()
    made = replace(TINY.memories.training, micro_batch_size=2, gradient_checkpointing=True)
    recipe = replace(TINY, memories=replace(TINY.memories, training=made))
    stage = stages_of(recipe)["memories"]
    mark_done(stage, recipe, tmp_path)
    fitted, _ = fit(TINY, 10**9, STAGES, tmp_path)
    assert fitted.memories.training == made
    assert is_done(stage, fitted, tmp_path)
    refused("another recipe", is_done, stage, TINY, tmp_path)


def test_what_a_budget_chooses_trains_the_same_numbers_but_for_rounding(tmp_path):
    line = refused("", fit, WIDE, 1, ["memories"], tmp_path)
    least = int(re.search(r"least (\d+)MB", line)[1]) * 10**6
    fitted, _ = fit(WIDE, least, ["memories"], tmp_path)
    small = fitted.memories.training
    assert (small.micro_batch_size, small.gradient_checkpointing) != (None, False)
    results = []
    for name, training in (("a", WIDE.memories.training), ("b", small)):
        trainee = trainee_of(WIDE, "memories", training, tmp_path / name)
        losses = [trainee.step(np.arange(4), 1e-3) for _ in range(3)]
        results.append([*np.ravel(losses), *trainee.store.current(1, 0).ravel()[:500]])
    np.testing.assert_allclose(results[0], results[1], rtol=2e-4, atol=2e-5)
