"""The plan of a recipe: sizes as the stages make them, memory as measured, refusals that help."""

import gc
import json
import shutil
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model
from mlx_hmem.bank.writer import planned_bytes
from mlx_hmem.errors import UserError
from tests.helpers.programs import assert_refused, run
from tests.helpers.write_bank import write_bank
from train.command import main
from train.corpus.facts import make_facts
from train.cost.costs import (
    anchor_parameters,
    check_disk,
    check_memory,
    peak_memory,
    step_operations,
)
from train.cost.plan import make_plan, most_characters, sequences_of, table, trainee_of
from train.recipe import recipe as recipes
from train.step.anchor import initialise
from train.step.memories import generic_config
from train.step.start import model_args

TINY = recipes.Recipe(
    name="tiny",
    tokenizer=recipes.TokenizerSection(vocab_size=400),
    windows=recipes.WindowsSection(context=64),
    tree=recipes.TreeSection(branching=(3, 2)),
    anchor=recipes.AnchorSection(
        hidden_size=64, num_hidden_layers=2, head_dim=32, intermediate_size=128,
        training=recipes.TrainerConfig(batch_size=4, epochs=2),
    ),
    memories=recipes.MemoriesSection(r=(8, 4), training=recipes.TrainerConfig(batch_size=4)),
)  # fmt: skip
WIDE = replace(
    TINY,
    windows=recipes.WindowsSection(context=96),
    anchor=replace(TINY.anchor, hidden_size=96, num_hidden_layers=3, intermediate_size=384),
    memories=replace(TINY.memories, r=(64, 32)),
)


COTRAINED = replace(WIDE, memories=replace(WIDE.memories, cotrain=recipes.CotrainSection()))
IN_PARTS = replace(TINY.anchor.training, batch_size=16, micro_batch_size=4)
AGAIN = replace(TINY.anchor.training, batch_size=16, gradient_checkpointing=True)


@pytest.fixture(autouse=True)
def no_longer_than_a_step(monkeypatch):
    monkeypatch.setattr("train.cost.plan.MEASURE_SECONDS", 0.0)


@pytest.mark.parametrize("training", [TINY.anchor.training, IN_PARTS, AGAIN])
@pytest.mark.parametrize("recipe", [TINY, WIDE, COTRAINED])
@pytest.mark.parametrize("stage", ["anchor", "memories"])
def test_peak_memory_is_within_half_as_much_again_of_what_mlx_measures(
    tmp_path, recipe, stage, training
):
    trainee = trainee_of(recipe, stage, training, tmp_path)
    gc.collect()  # what other tests have left would be freed in between
    before = mx.get_active_memory()
    frozen = stage == "memories" and recipe.memories.cotrain is None
    own = 4 * anchor_parameters(recipe) * (1 if frozen else 3)  # already there, and counted
    mx.reset_peak_memory()
    for _ in range(2):
        trainee.step(np.arange(training.batch_size), 1e-3)
    measured = mx.get_peak_memory() - before + own
    estimate = peak_memory(recipe, stage, training)
    assert 1 / 1.5 < estimate / measured < 1.5


@pytest.mark.parametrize(
    "quantization", [None, {"mode": "affine", "bits": 4, "group_size": 32}], ids=["f16", "affine"]
)
def test_sizes_are_those_of_the_anchor_and_of_the_written_bank(tmp_path, quantization):
    recipe = replace(TINY, export=recipes.ExportSection(quantization=quantization))
    model = Model(model_args(recipe))
    initialise(model, 0)
    assert anchor_parameters(recipe) == sum(a.size for a in named_parameters(model).values())
    config = recipe.memory_config
    levels = [
        np.zeros((count, *config.block_shape(level)), np.float32)
        for level, count in enumerate(config.num_clusters, 1)
    ]
    generic = np.zeros(config.block_shape(0), np.float32)
    how = None
    if quantization is not None:
        how = [recipe.export.quantization_of(level) for level in range(3)]
    write_bank(
        tmp_path / "bank", config, levels, generic, dtype="float16", quantization=how,
        anchor_hash="", tree_hash="",
    )  # fmt: skip
    written = sum(f.stat().st_size for f in (tmp_path / "bank").glob("*.safetensors"))
    assert planned_bytes(recipe.planned_bank()) == written


def test_memory_costs_operations_and_the_generic_memory_as_many_as_the_fetched():
    assert step_operations(TINY, "anchor", 8) == 2 * step_operations(TINY, "anchor", 4)
    assert step_operations(WIDE, "memories", 4) > step_operations(WIDE, "anchor", 4) * 2 / 3
    config = TINY.memory_config
    assert generic_config(config).fetched_parameters == config.fetched_parameters


def test_tokens_come_from_the_furthest_stage_of_the_run_else_from_the_command(tmp_path):
    assert sequences_of(TINY, tmp_path, None)[0] == 0
    first, others, _ = sequences_of(TINY, tmp_path, 6400)
    assert (first, others) == (100, 103)  # half a row is lost in each of 6 leaves
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "report.json").write_text('{"train_characters": 9600}')
    assert sequences_of(TINY, tmp_path, None)[0] == 100
    for name, rows in (("anchor-sequences", 17), ("sequences", 19)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "tokens.npy", np.zeros((rows, 65), np.uint16))
    assert sequences_of(TINY, tmp_path, 6400)[:2] == (17, 19)


def test_without_a_corpus_the_plan_says_what_the_recipe_alone_says(tmp_path):
    facts = {"kind": "invented", "topics": 2, "entities_per_topic": 4, "frequencies": [2, 3]}
    facts |= {"plain_documents": 5}
    characters = sum(len(d["text"]) for d in make_facts(facts, 0)[0])
    corpus = recipes.CorpusSection(documents=0, facts=(facts,))
    assert most_characters(replace(TINY, corpus=corpus)) == characters > 0
    some = replace(TINY, corpus=replace(corpus, documents=10))
    assert most_characters(some) == characters + 10 * 900
    rows, _, source = sequences_of(some, tmp_path, None)
    assert rows == round((characters + 9000) / 1.5) // 64
    assert "as long as it may be" in source
    # Of all documents of a folder nobody knows how many they are.
    text = table(make_plan(TINY))
    assert "nothing: give --tokens" in text
    assert text.count("per million tokens") == 4
    assert "together" not in text


def test_the_plan_of_a_recipe_that_fits_has_every_stage_and_real_times(tmp_path):
    plan = make_plan(TINY, tmp_path, 64_000)
    assert [s.stage for s in plan.stages] == ["anchor", "memories", "generic", "dense"]
    for stage in plan.stages:
        assert stage.seconds_per_step > 0
        assert stage.hours == pytest.approx(stage.steps * stage.seconds_per_step / 3600)
    assert plan.stages[0].steps == TINY.anchor.training.num_steps(1000) == 500
    assert plan.training_state_bytes == 12 * plan.bank_parameters
    text = table(plan)
    assert "9 blocks" in text
    assert all(stage.stage in text for stage in plan.stages)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_refused_with_what_would_fit():
    batch = replace(TINY, windows=recipes.WindowsSection(context=2048))
    with pytest.raises(UserError, match=r"fit in memory.*anchor.training.micro_batch_size to \d"):
        check_memory(batch, "anchor", recipes.TrainerConfig(batch_size=1 << 20))
    anchor = replace(TINY.anchor, hidden_size=65536, num_hidden_layers=64, intermediate_size=262144)
    with pytest.raises(UserError, match=r"make the anchor smaller: about [\d.]+ M parameters fit"):
        check_memory(replace(TINY, anchor=anchor), "anchor", recipes.TrainerConfig(batch_size=4))
    fetched = replace(TINY, memories=recipes.MemoriesSection(r=(1 << 30, 4)))
    with pytest.raises(UserError, match=r"make memories.r smaller"):
        check_memory(fetched, "memories", recipes.TrainerConfig(batch_size=4))


def test_too_little_disk_is_refused_with_the_r_that_would_fit(tmp_path):
    wide = replace(TINY, tree=recipes.TreeSection(branching=(4096, 256)))
    free = shutil.disk_usage(tmp_path).free
    r = max(1, free // (1 << 20) // 2**12) * 64
    recipe = replace(wide, memories=recipes.MemoriesSection(r=(r, r)))
    with pytest.raises(UserError, match=r"does not fit on the disk.*memories.r to \[") as refused:
        check_disk(recipe, tmp_path / "not" / "yet")
    smaller = int(str(refused.value).rsplit("[", 1)[1].split(",")[0])
    check_disk(replace(wide, memories=recipes.MemoriesSection(r=(smaller, smaller))), tmp_path)


def test_the_program_prints_json_and_refuses_in_one_line(tmp_path):
    recipe = tmp_path / "big.yaml"
    recipe.write_text("name: big\ntree: {branching: [4096, 4096]}\nmemories: {r: [4096, 4096]}\n")
    assert_refused(run(main, "plan", recipe, "--json"), "does not fit on the disk")
    recipe.write_text(
        "name: small\nwindows: {context: 32}\ndense: null\n"
        "anchor: {hidden_size: 32, num_hidden_layers: 1, intermediate_size: 32}\n"
    )
    plan = json.loads(run(main, "plan", recipe, "--json").out)
    assert plan["stages"][0]["steps"] is None
    assert plan["bank_blocks"] == 80
