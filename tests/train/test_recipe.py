import fcntl
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from mlx_hmem.errors import UserError
from tests.helpers.places import ROOT
from tests.helpers.programs import assert_refused, refused, run
from train.command import main
from train.corpus.facts import FACT_KINDS
from train.recipe.recipe import Recipe, TokenizerSection, load_recipe
from train.stages import STAGES, run_stages


def load_text(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path, overrides)


# Those of the paper, some of which start from a model, are tried in test_paper_recipes.py.
@pytest.mark.parametrize("path", sorted((ROOT / "train" / "recipes").glob("*.yaml")), ids=str)
def test_every_recipe_of_the_repository_loads(path):
    recipe = load_recipe(path)
    assert recipe.memory_config.num_levels == len(recipe.tree.branching)


def test_given_keys_win_and_all_others_have_defaults(tmp_path):
    text = "name: t\ncorpus: {documents: 0, facts: [{kind: invented}]}\ntree: {branching: [8, 2]}\n"
    recipe = load_text(
        tmp_path, text + "anchor: {training: {learning_rate: 1e-2, epochs: 3}}\ndense: null\n"
    )
    assert recipe.corpus.facts == ({"kind": "invented"},)
    assert recipe.tree.branching == (8, 2)
    assert recipe.anchor.training.learning_rate == 0.01
    assert recipe.anchor.training.epochs == 3
    assert recipe.anchor.training.beta2 == 0.95
    assert recipe.dense is None
    assert load_text(tmp_path, "name: t") == Recipe(name="t")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("name: t\nsede: 1", "sede"),
        ("name: t\nanchor: {training: {learning_rat: 1.0}}", "learning_rat"),
        ("seed: 1", "name"),
        ("name: [1", "not valid YAML"),
        ("- a\n- b", "not a mapping"),
        ("", "not a mapping"),
        ("name: t\ncorpus: 5", "corpus is not a mapping"),
        ("name: t\nmemories: null", "memories is not a mapping"),
        ("name: t\ncorpus: {documents: many}", "corpus.documents"),
        ("name: t\ncorpus: {documents: true}", "corpus.documents"),
        ("name: t\ncorpus: {documents: 0}", "a corpus of nothing"),
        ("name: t\ncorpus: {held_out: 2}", "corpus.held_out"),
        ("name: t\nanchor: {training: {learning_rate: .nan}}", "training.learning_rate"),
        ("name: t\nanchor: {training: {learning_rate: .inf}}", "training.learning_rate"),
        ("name: t\nanchor: {hidden_size: 1.5}", "anchor.hidden_size"),
        ("name: t\nanchor: {head_dim: 3}", "head_dim"),
        ("name: t\ntokenizer: {vocab_size: 70000}", "tokenizer.vocab_size"),
        ("name: t\ntree: {branching: 16}", "tree.branching"),
        ("name: t\ntree: {branching: [16, x]}", "tree.branching"),
        ("name: t\ntree: {prompts: -1}", "tree.prompts"),
        ("name: t\nmemories: {r: [8]}", "r and branching"),
        ("name: t\nexport: {dtype: int3}", "export.dtype"),
        ("name: t\nexport: {quantization: {mode: affine, bits: 7, group_size: 64}}", "bits"),
        ("name: t\nexport: {quantization: {mode: affine}}", "bits"),
        (
            "name: t\nanchor: {hidden_size: 96}\n"
            "export: {quantization: {mode: affine, bits: 8, group_size: 64}}",
            "width 96, group_size 64",
        ),
        ("name: t\nmemories: {kind: moe}", "memory kind"),
        ("name: t\nmemories: {layers: some}", "placement"),
        ("name: t\nseed: -1", "seed"),
        ("name: 5", "name"),
        ("1: 2\nname: t\nx: 3", "1"),
    ],
)
def test_a_wrong_recipe_is_one_line_that_names_the_key(tmp_path, text, named):
    refused(re.escape(named), load_text, tmp_path, text)


def test_the_help_of_a_recipe_has_every_key_with_its_default_and_what_it_is(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help-recipe"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "anchor.training, memories.training, dense.training:\n" in said
    assert "\n  warmup_steps: whole number, 100\n      steps of linear warm-up\n" in said
    assert "\nname: text, needed\n" in said
    assert "\n  r: list of whole numbers, [48, 24]\n" in said
    words = " ".join(said.split())
    waiting: list[Any] = [Recipe, *FACT_KINDS.values()]
    for section in waiting:
        for each in fields(section):
            assert f"{each.name}: " in said
            assert " ".join(each.metadata["help"].split()) in words
            waiting += [each.default_factory] if hasattr(each.default_factory, "from_dict") else []
    assert max(map(len, said.splitlines())) < 80


def load_set(tmp_path: Path, *overrides: str) -> Recipe:
    return load_text(tmp_path, "name: t\nmemories: {r: [8, 4]}", *overrides)


def test_any_key_can_be_set_anew_and_the_last_one_counts(tmp_path):
    recipe = load_set(
        tmp_path, "memories.r=[2, 1]", "anchor.training.learning_rate=1e-2", "name=a=b",
        "memories.cotrain.weight_decay=0.2", "dense=null", "memories.layers=first 2", "seed=1",
        " seed = 2", "corpus.facts=[{kind: invented}]", "tree.branching=[3,2]",
    )  # fmt: skip
    assert recipe.memories.r == (2, 1)
    assert recipe.anchor.training.learning_rate == 0.01
    assert recipe.name == "a=b"
    assert recipe.memories.cotrain.weight_decay == 0.2  # the section was not there before
    assert recipe.dense is None
    assert recipe.memory_config.layers == (0, 1)
    assert recipe.seed == 2
    assert recipe.corpus.facts == ({"kind": "invented"},)
    assert recipe.tree.branching == (3, 2)
    assert load_set(tmp_path) == load_text(tmp_path, "name: t\nmemories: {r: [8, 4]}")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("memories..r=3", "KEY=VALUE"),
        ("sede=1", "unknown key"),
        ("memories.s=1", "unknown key"),
        ("memories.training.epoch=1", "unknown key"),
        ("moments.r=1", "unknown key"),
        ("name.first=1", "name.first"),
        ("memories.r.0=1", "memories.r.0"),
        ("memories.r=[1,", "the value is not YAML"),
        ("memories.r=: :", "the value is not YAML"),
        ("memories.r=x", "memories.r"),
        ("memories=3", "not a mapping"),
        ("memories.r=", "memories.r"),
        ("anchor.config={model_type: llama}", "anchor.config without a path"),
        ("anchor.path=3", "anchor.path is not a text"),
        ("windows.anchor_context=8", "anchor_context"),
        ("corpus.anchor_times=1", "anchor_times"),
        ("anchor.training.steps=0", "steps"),
        ("anchor_only=1", "anchor_only"),
    ],
)
def test_a_key_that_cannot_be_set_is_one_line(tmp_path, override, named):
    refused(re.escape(named), load_set, tmp_path, override)


def test_a_key_set_on_the_command_line_is_part_of_the_recipe(tmp_path):
    made: list[str] = []
    recipe = load_set(tmp_path)
    run_stages(recipe, tmp_path, ["corpus"], recorder(made))
    with pytest.raises(UserError, match="changed: seed"):
        run_stages(load_set(tmp_path, "seed=5"), tmp_path, ["corpus"], recorder(made))
    run_stages(load_set(tmp_path, "anchor.head_dim=32"), tmp_path, ["corpus"], recorder(made))
    assert made == ["corpus"]


def test_a_run_of_the_version_before_is_still_done_one_of_a_later_is_refused(tmp_path):
    made: list[str] = []
    run_stages(RECIPE, tmp_path, list(STAGES), recorder(made))
    for path in tmp_path.glob("*/done.json"):
        values = json.loads(path.read_text())
        del values["version"], values["xxh3"]  # neither was there
        for section, key in (("tree", "prompts"), *((s, "group_by_subtree") for s in ARMS)):
            if section in values["recipe"]:
                assert not values["recipe"][section].pop(key)
        path.write_text(json.dumps(values))
    run_stages(RECIPE, tmp_path, list(STAGES), recorder(made))
    assert made == list(STAGES)
    longer = replace(RECIPE, windows=replace(RECIPE.windows, anchor_context=512))
    refused("changed: windows", lambda: run_stages(longer, tmp_path, ["windows"], recorder(made)))
    path = tmp_path / "windows" / "done.json"
    path.write_text(path.read_text().replace('"stage"', '"version": 3, "stage"'))
    version = "version this program does not read: 3; update"
    refused(version, run_stages, RECIPE, tmp_path, ["windows"], recorder(made))


def test_a_recipe_of_an_anchor_alone_has_no_stages_of_memory(tmp_path):
    made: list[str] = []
    alone = replace(RECIPE, anchor_only=True)
    run_stages(alone, tmp_path, list(STAGES), recorder(made))
    assert made == [
        "corpus", "tokenizer", "windows", "anchor-sequences", "anchor", "export", "report",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"stage export .* changed: memories, tree"):
        run_stages(RECIPE, tmp_path, ["export"], recorder(made))
    run_stages(RECIPE, tmp_path, ["corpus", "windows", "anchor", "tree"], recorder(made))
    assert made[7:] == ["tree"]


def recorder(made: list[str]) -> dict[str, Callable[..., None]]:
    """A function for each stage that notes its call and leaves a file."""

    def stage(name: str) -> Callable[..., None]:
        def run(recipe: Recipe, folder: Path, *company: Any) -> None:
            made.append(name)
            (folder / name / "made").write_text(recipe.name)

        return run

    return {name: stage(name) for name in STAGES}


RECIPE = Recipe(name="t")
ARMS = ("memories", "dense")


def test_finished_stages_are_skipped_and_a_stopped_run_goes_on(tmp_path):
    made: list[str] = []
    functions = recorder(made)

    def stopped(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(RECIPE, tmp_path, list(STAGES), functions | {"anchor": stopped})
    assert made == ["corpus", "tokenizer", "windows", "anchor-sequences"]
    run_stages(RECIPE, tmp_path, list(STAGES), functions)
    assert made == list(STAGES)
    run_stages(RECIPE, tmp_path, list(STAGES), functions)
    assert made == list(STAGES)


def test_a_changed_recipe_is_refused_where_it_matters_and_only_there(tmp_path):
    made: list[str] = []
    run_stages(RECIPE, tmp_path, ["corpus", "tokenizer", "windows"], recorder(made))
    changed = replace(RECIPE, tokenizer=TokenizerSection(vocab_size=512))
    run_stages(changed, tmp_path, ["corpus"], recorder(made))
    # The windows' own section is as it was, but they were made with the other tokenizer.
    for name in ("tokenizer", "windows"):
        with pytest.raises(UserError, match=r"changed: tokenizer; go on with the recipe"):
            run_stages(changed, tmp_path, [name], recorder(made))
    assert made == ["corpus", "tokenizer", "windows"]


def test_a_stage_waits_for_what_it_reads_and_runs_in_one_process_at_a_time(tmp_path):
    made: list[str] = []
    with pytest.raises(UserError, match=r"windows needs .*: tokenizer"):
        run_stages(RECIPE, tmp_path, ["windows"], recorder(made))
    assert made == []
    (tmp_path / "corpus").mkdir()
    with (tmp_path / "corpus" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="running in another process"):
            run_stages(RECIPE, tmp_path, ["corpus"], recorder(made))
    run_stages(RECIPE, tmp_path, ["corpus"], recorder(made))
    assert made == ["corpus"]


def test_every_stage_names_a_function_that_exists():
    for stage in STAGES.values():
        assert callable(stage.load())


TINY = """
name: tiny
corpus: {documents: 40, max_characters: 300, held_out: 0.1}
tokenizer: {vocab_size: 320}
windows: {context: 32}
"""


def test_the_program_goes_from_text_to_sequences_and_bad_input_is_one_line(tmp_path):
    recipe, corpus, out = tmp_path / "tiny.yaml", tmp_path / "corpus", tmp_path / "out"
    recipe.write_text(TINY)
    corpus.mkdir()
    documents = [
        {"id": i, "title": "", "text": f"Town {i} has {i * i} people. A river is near."}
        for i in range(60)
    ]
    (corpus / "a.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    arguments = [recipe, "--corpus", corpus, "--out", out, "--until", "anchor-sequences"]
    first = run(main, *arguments)
    assert first.status == 0, first.err
    assert first.out.splitlines()[-1].startswith("anchor-sequences: ")
    assert str(out / "anchor-sequences") in first.out
    assert run(main, *arguments).out.count("done before") == 4
    assert_refused(run(main, tmp_path / "none.yaml", "--out", out), "error: no such recipe")
    # Every name ends in .yaml, which makes none of them alike.
    assert_refused(run(main, "nosuch.yaml", "--out", out), "a YAML file, or one of demo.yaml, ")
    assert_refused(run(main, "facst.yaml", "--out", out), "; did you mean facts.yaml?")
    # The file has no such key: it is what was set.
    unknown = run(main, "facts.yaml", "--out", out, "--set", "foo.bar=1")
    assert_refused(unknown, "unknown key in facts.yaml --set foo.bar=1: foo")
