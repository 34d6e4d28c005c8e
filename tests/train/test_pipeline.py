"""The whole way: a recipe of invented facts through every stage to a model that generates."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem import load
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint
from tests.helpers.programs import process
from tests.helpers.programs import run as program
from tests.helpers.recipes import write_recipe
from train.command import main
from train.export import run_export
from train.loop.arms import trained_blocks, trained_generic
from train.recipe import recipe as recipes
from train.stages import STAGES, run_stages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(recipe, run folder, standard output) of a whole run."""
    folder = tmp_path_factory.mktemp("pipeline")
    recipe = write_recipe(folder / "tiny.yaml")
    said = process("-m", "train", recipe, "--out", folder / "run")
    assert said.status == 0, said.err[-2000:]
    return recipe, folder / "run", said.out


def recipe_of(made: tuple[Path, Path, str]) -> recipes.Recipe:
    return recipes.load_recipe(made[0])


def test_every_stage_says_what_it_made_and_the_last_prints_the_table(made):
    _, run, output = made
    for name in STAGES:
        assert f"\n{name}: " in f"\n{output}"
        assert (run / name / "done.json").exists()
    assert (run / "report" / "report.txt").read_text().strip() in output
    assert not list(run.glob("**/*.part*"))


def test_the_report_holds_every_arm_over_the_same_facts_and_texts(made):
    _, run, _ = made
    results = json.loads((run / "report" / "results.json").read_text())
    arms = ["anchor alone", "dense, trained on", "generic", "fetched"]
    assert [r["memory"] for r in results["recall"]] == arms
    assert [p["memory"] for p in results["perplexity"]] == arms
    held_out = (run / "corpus" / "held_out.jsonl").read_text().splitlines()
    assert {p["documents"] for p in results["perplexity"]} == {len(held_out)}
    for arm in results["recall"]:
        totals = {b["times"]: b["total"] for b in arm["buckets"] if b["kind"] == "all"}
        assert totals == {1: 16, 8: 16, None: 32}
    # Training taught each arm something: a uniform guess has perplexity 400.
    by_name = {p["memory"]: p["per_token"] for p in results["perplexity"]}
    assert by_name["anchor alone"] < 200
    for name in arms[1:]:
        assert by_name[name] < by_name["anchor alone"]


def test_losses_fall_and_memory_begins_where_the_anchor_ended(made):
    _, run, _ = made
    losses = {
        name: [json.loads(line)["loss"] for line in (run / name / "loss.jsonl").open()]
        for name in ("anchor", "memories", "generic", "dense")
    }
    for name, curve in losses.items():
        assert np.mean(curve[-5:]) < np.mean(curve[:5]), name
    # The same first batch, and blocks without effect at the start.
    starts = [losses[name][0] for name in ("memories", "generic", "dense")]
    assert np.ptp(starts) < 1e-3
    rows = len(np.load(run / "sequences" / "tokens.npy"))
    assert len(losses["memories"]) == recipe_of(made).memories.training.num_steps(rows)


def test_the_model_loads_and_generates_with_every_memory(made):
    model = load(made[1] / "model")
    prompt = json.loads((made[1] / "corpus" / "facts.jsonl").open().readline())["prompt"]
    for memory in ("fetched", "generic", "none"):
        pieces = list(model.stream(prompt, max_tokens=8, memory=memory, temp=0.0))
        assert 1 <= len(pieces) <= 9
        assert isinstance("".join(piece.text for piece in pieces), str)
    path = model.retriever.route(prompt)
    assert len(path) == 2


def test_the_bank_holds_the_trained_blocks_and_the_model_the_trained_anchor(made):
    _, run, _ = made
    model, recipe = load(run / "model"), recipe_of(made)
    with trained_blocks(recipe, run) as store:
        counts = enumerate(store.config.num_clusters, 1)
        trained = {level: [store.block(level, c) for c in range(n)] for level, n in counts}
    assert {level: len(blocks) for level, blocks in trained.items()} == {1: 2, 2: 4}
    for leaf in range(4):
        path = (leaf // 2, leaf)
        for block, level, cluster in zip(model.bank.fetch(path).blocks, (1, 2), path, strict=True):
            wanted = trained[level][cluster]
            assert np.abs(wanted).max() > 0.1
            assert np.array_equal(np.array(block), wanted.astype(np.float16)), (level, cluster)
    generic = trained_generic(recipe, run).astype(np.float16)
    assert np.array_equal(np.array(model.bank.generic().rows[0]), generic)
    anchor = named_parameters(load_anchor(run / "anchor")[0])
    for name, array in named_parameters(model.anchor).items():
        assert np.array_equal(np.array(array), np.array(anchor[name])), name


def test_a_second_run_skips_everything(made):
    recipe, run, _ = made
    files = [p for p in run.glob("**/*") if p.is_file() and p.name not in ("lock", "lock.mdb")]
    before = fingerprint(*files)
    again = program(main, recipe, "--out", run)
    assert again.status == 0
    lines = again.out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(STAGES)
    assert all("done before" in line for line in lines)
    assert fingerprint(*files) == before


def test_a_changed_recipe_is_refused_by_the_name_of_what_changed(made):
    recipe, run, _ = made
    for changed, named in (
        (replace(recipe_of(made), tree=recipes.TreeSection(branching=(2, 3))), "tree"),
        (replace(recipe_of(made), memories=recipes.MemoriesSection(r=(4, 4))), "memories"),
        (replace(recipe_of(made), seed=2), "seed"),
    ):
        with pytest.raises(UserError, match=rf"made with another recipe: changed: {named};"):
            run_stages(changed, run, list(STAGES))
    refused = program(main, recipe, "--out", run, "--set", "windows.context=32")
    assert refused.status == 2
    assert re.match("error: stage windows .*changed: windows;", refused.err.splitlines()[-1])


def test_a_quantised_export_answers_as_quantised_blocks_do(made, tmp_path):
    _, run, _ = made
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    how = {"mode": "nvfp4", "bits": 4, "group_size": 16}
    recipe = replace(recipe_of(made), export=recipes.ExportSection(quantization=how))
    run_export(recipe, copy)
    model = load(copy / "model")
    with trained_blocks(recipe, run) as store:
        trained = mx.array(store.block(2, 3)).astype(mx.float16)
    expected = mx.dequantize(*mx.quantize(trained, **how), None, **how, dtype=mx.float16)
    assert mx.array_equal(model.bank.fetch((1, 3)).blocks[1], expected)
    assert "nvfp4, 4 bits" in (copy / "model" / "README.md").read_text()
    assert len(list(model.stream("The", max_tokens=3))) >= 1


def test_a_model_that_names_the_packages_encoder_holds_none_and_answers_the_same(made, tmp_path):
    _, run, _ = made
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    recipe = recipe_of(made)
    run_export(replace(recipe, export=replace(recipe.export, encoder_by_name=True)), copy)
    assert [file.name for file in (copy / "model" / "retriever").iterdir()] == ["tree.safetensors"]
    own, named = load(run / "model"), load(copy / "model")
    for text in ("The copper engine", "A river in the north"):
        assert named.retriever.route(text) == own.retriever.route(text)
        pieces = [[p.text for p in model.stream(text, max_tokens=4)] for model in (own, named)]
        assert pieces[0] == pieces[1]


def test_anchor_and_memories_trained_together_from_nothing(made, tmp_path):
    """The anchor stage leaves its start values, the memories stage the anchor of the model."""
    cotrain = recipes.CotrainSection(learning_rate_scale=0.5, generic_probability=0.5)
    recipe = recipe_of(made)
    recipe = replace(
        recipe, anchor=replace(recipe.anchor, training=None),
        memories=replace(recipe.memories, cotrain=cotrain), dense=None,
    )  # fmt: skip
    run_stages(recipe, tmp_path, [name for name in STAGES if name != "report"])
    with trained_blocks(recipe, tmp_path) as store:
        assert len(store.touched()) == 2 + 4 + 2  # with the generic memory on both levels
    model = load(tmp_path / "model")
    start = named_parameters(load_anchor(tmp_path / "anchor")[0])
    trained = named_parameters(load_anchor(tmp_path / "memories")[0])
    for name, array in named_parameters(model.anchor).items():
        assert np.array_equal(np.array(array), np.array(trained[name])), name
        assert not np.array_equal(np.array(array), np.array(start[name])), name
    generic = trained_generic(recipe, tmp_path).astype(np.float16)
    assert np.abs(generic[:, 2]).max() > 0.01  # down, zero at the start
    assert np.array_equal(np.array(model.bank.generic().rows[0]), generic)
    with pytest.raises(UserError, match="nothing trains the anchor"):
        replace(recipe, memories=replace(recipe.memories, cotrain=None))
