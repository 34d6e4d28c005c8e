"""A study: arms share what they have in common; rates are chosen on one half, the other shown."""

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem import load
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Fact, perplexity, read_facts, read_texts, recall
from mlx_hmem.files import fingerprint
from tests.helpers.places import ROOT
from tests.helpers.recipes import write_recipe
from train.recipe.recipe import Recipe
from train.study.file import Study, Sweep, load_study
from train.study.results import halves_of, memories_of, read_results, sizes_of
from train.study.rows import Figure, Row, sweep_rows
from train.study.runs import make_all, runs_of
from train.study.table import compare

TOY = [
    "corpus.facts=[{kind: invented, topics: 2, entities_per_topic: 4, frequencies: [1, 4], "
    "plain_documents: 60}]",
    "tokenizer.vocab_size=360",
    "anchor.training={steps: 12, warmup_steps: 2, learning_rate: 1e-2}",
    "memories.training={steps: 6, learning_rate: 1e-2, warmup_steps: 1}",
    "dense.training={steps: 4, learning_rate: 1e-2, warmup_steps: 1}",
]
STUDY = """
recipe: toy.yaml
choose_by: perplexity
seeds: [0, 1]
against: [base]
arms:
  base: {label: anchor alone, measure: [none]}
  fetched:
    measure: [fetched, oracle, first_sentence]
    rates: {memories.training.learning_rate: [1e-6, 1e-2]}
  cotrained:
    measure: [fetched, generic, none]
    set: [memories.cotrain.learning_rate_scale=0.5]
    seeds: [0]
  mixed: {measure: [dense, generic], seeds: [0]}
sweeps:
  - {name: two ways, x: bank_parameters, arms: [fetched, cotrained]}
"""


def write_study(folder: Path, study: str = STUDY) -> Path:
    write_recipe(folder / "toy.yaml", *TOY)
    (folder / "study.yaml").write_text(study)
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Path, list[str]]:
    """(study, its folder, what each of the two processes said that made it together)."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `plot`, is missing")
    folder = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "train", "study", str(write_study(folder))]
    command += ["--out", str(folder / "out")]
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = []
    for process in both:
        output, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]
        said.append(output.decode())
    return load_study(folder / "study.yaml"), folder / "out", said


def test_two_processes_make_each_run_and_each_stage_once(made):
    _, out, said = made
    begun = re.findall(r"^seed (\d), (.*): begins", "\n".join(said), re.M)
    assert sorted(begun) == [
        *(("0", name) for name in ("base", "cotrained", "fetched@0.01")),
        *(("0", f"fetched@{rate}, a trial") for rate in ("0.01", "1e-06")),
        ("0", "mixed"),
        *(("1", name) for name in ("base", "fetched@0.01")),
    ]
    assert not (out / "0" / "fetched@1e-06" / "results" / "oracle.json").exists()
    for seed in (0, 1):
        anchors = [p.stat().st_ino for p in out.glob(f"{seed}/*/anchor/model.safetensors")]
        assert len(anchors) > 1
        assert len(set(anchors)) == 1
    stores = [path.stat().st_ino for path in out.glob("0/*/memories/store/data.mdb")]
    assert len(set(stores)) == len(stores) == 3
    assert (out / "table.txt").read_text() in said[0] or (out / "table.txt").read_text() in said[1]
    for picture in ("recall.png", "perplexity.png", "sweep-two-ways.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"


def test_the_figures_are_those_of_the_model_and_the_halves_add_up(made):
    _, out, _ = made
    run = out / "0" / "fetched@0.01"
    model = load(run / "model")
    facts = read_facts(run / "corpus" / "facts.jsonl")
    texts = read_texts(run / "corpus" / "held_out.jsonl")
    results = read_results(run, "fetched")
    found = recall(model, facts, "fetched", progress=False)
    for times in (1, 4):
        of_halves = [
            next(b for b in results["recall"][half] if b["times"] == times)
            for half in ("validation", "test")
        ]
        assert of_halves[0]["total"] == of_halves[1]["total"] == 4
        assert sum(b["right"] for b in of_halves) == found.bucket(times=times).right
    for half, some in (("validation", texts[::2]), ("test", texts[1::2])):
        by_document = perplexity(model, some, "fetched", route_by="document", progress=False)
        assert results["perplexity"][half] == by_document.to_dict()


def test_the_rate_is_chosen_on_the_validation_half_and_shown_on_the_other(made):
    _, out, _ = made
    found = {
        rate: read_results(out / "0" / f"fetched@{rate}", "fetched")["perplexity"]
        for rate in ("1e-06", "0.01")
    }
    assert found["0.01"]["validation"]["per_token"] < found["1e-06"]["validation"]["per_token"]
    results = json.loads((out / "results.json").read_text())
    assert {c["against"] for c in results["comparisons"]} == {"anchor alone"}
    assert [s["seeds"] for s in results["sweeps"]["two ways"]] == [[0], [0]]  # as both have
    [search] = results["searches"]
    assert search["chosen"] == "memories.training.learning_rate=0.01"
    row = next(r for r in results["rows"] if (r["arm"], r["measure"]) == ("fetched", "fetched"))
    assert row["seeds"] == [0, 1]
    by_seed = row["perplexity"]["by_seed"]
    assert by_seed[0] == found["0.01"]["test"]["per_token"]
    assert row["perplexity"]["mean"] == pytest.approx(np.mean(by_seed))
    assert row["perplexity"]["standard_error"] == pytest.approx(abs(np.diff(by_seed)[0]) / 2)


def test_a_sweep_is_shown_from_its_second_arm_on(made):
    study, out, _ = made
    arms = study.arms | {"to-come": replace(study.arms["cotrained"], label="")}
    study = replace(study, arms=arms)
    assert sweep_rows(study, out, Sweep("one yet", ("fetched", "to-come"))) == []
    two = sweep_rows(study, out, Sweep("two", ("fetched", "to-come", "cotrained")))
    assert [row.arm for row in two] == ["fetched", "cotrained"]


def test_every_measure_of_every_arm_has_its_row(made):
    _, out, _ = made
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(r["arm"], r["measure"]) for r in rows] == [
        ("base", "none"), *(("fetched", m) for m in ("fetched", "oracle", "first_sentence")),
        *(("cotrained", m) for m in ("fetched", "generic", "none")), ("mixed", "dense"),
        ("mixed", "generic"),
    ]  # fmt: skip
    by_name = {(r["arm"], r["measure"]): r for r in rows}
    # Trained arms are better than the anchor they began from; their parameters are what they use.
    anchor = by_name["base", "none"]["perplexity"]["by_seed"][0]
    for name in [("cotrained", "fetched"), ("mixed", "dense"), ("mixed", "generic")]:
        assert by_name[name]["perplexity"]["by_seed"][0] < anchor, name
    assert by_name["base", "none"]["bank_parameters"] == 0
    assert by_name["mixed", "generic"]["fetched_parameters"] == 3 * 6 * 2 * 16
    assert by_name["cotrained", "fetched"]["bank_parameters"] == 3 * (2 * 4 + 4 * 2) * 2 * 16


def test_the_same_command_again_changes_nothing(made, capsys):
    study, out, _ = made
    files = [p for p in out.glob("[01]/**/*") if p.is_file() and "lock" not in p.name]
    before = fingerprint(*files)
    make_all(study, out, [0, 1], list(study.arms))
    said = capsys.readouterr().out
    assert said.count("done before") == 6
    assert "begins" not in said
    assert fingerprint(*files) == before


def test_before_the_search_is_finished_the_other_seeds_wait_for_it(tmp_path):
    study = load_study(write_study(tmp_path))
    runs = runs_of(study, tmp_path / "out", [1], ["fetched"])
    assert [run.folder.name for run in runs] == ["fetched@1e-06", "fetched@0.01"]
    assert {run.seed for run in runs} == {0}
    assert all(run.tries for run in runs)


def row_of(arm: str, nats: dict[int, list[float]], tokens: list[float]) -> Row:
    documents = tuple({"nats": values, "tokens": tokens} for values in nats.values())
    return Row(arm, "none", arm, None, tuple(nats), {}, {}, None, documents)


def test_two_rows_are_compared_by_document_over_the_seeds_that_both_have():
    """Documents differ far more than the models do: the pairs' error is that of the difference."""
    hard, tokens = np.array([900.0, 100.0, 500.0, 300.0]), [100.0, 100.0, 100.0, 100.0]
    difference = np.array([1.0, 3.0, 2.0, 2.0])
    one = row_of("one", {0: list(hard + difference), 1: list(hard + 2)}, tokens)
    other = row_of("other", {0: list(hard), 7: list(hard)}, tokens)
    found = compare(one, other)
    assert found["per_cent"] == pytest.approx(100 * math.expm1(0.02))
    of_mean = np.std(difference, ddof=1) / math.sqrt(4) / 100
    assert found["standard_error"] == pytest.approx(100 * math.exp(0.02) * of_mean)
    both = compare(row_of("both", {0: list(hard + 1), 1: list(hard + 3)}, tokens),
                   row_of("again", {0: list(hard), 1: list(hard)}, tokens))  # fmt: skip
    # Each seed alone is exact over documents: what is left is the difference between the seeds.
    assert both["standard_error"] == pytest.approx(100 * math.exp(0.02) * 0.01)
    assert compare(one, row_of("none", {5: list(hard)}, tokens)) is None


def test_a_mean_has_its_error_over_seeds_and_of_one_seed_its_own():
    figure = Figure((1.0, 2.0, 6.0), (0.1, 0.1, 0.1))
    assert figure.mean == 3
    assert figure.error == pytest.approx(math.sqrt(7 / 3))
    assert Figure((4.0,), (0.5,)).error == 0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[none]", "[nothing]", "unknown `measure` of an arm: ['nothing']"),
        ("[none]", "none", "measure is not a list of texts"),
        ("set: [memories.cotrain.learning_rate_scale=0.5]", "set: 3", "set is not a list of texts"),
        ("recipe: toy.yaml", "recipe: 3", "recipe is not a text"),
        ("sweeps:\n  - {", "sweeps:\n  {", "`sweeps` is not a list"),
        ("[1e-6, 1e-2]", "1e-2", "`rates` of an arm"),
        ("cotrain.learning", "cotrain.lerning", "arm cotrained: unknown key"),
        ("[dense, generic]", "[dense], set: [dense=null]", "arm mixed: `dense` is measured"),
        ("[dense, generic]", "[generic], set: [anchor_only=true]", "arm mixed: an anchor alone"),
        ("arms: [fetched, cotrained]", "arms: [fatched]", "unknown arm: fatched"),
        ("x: bank_parameters", "x: size", "unknown x of sweep two ways"),
        ("toy.yaml", "tea.yaml", "no such recipe"),
        ("seeds: [0, 1]", "seeds: [-1]", "seeds"),
        ("choose_by: perplexity", "choose_by: luck", "unknown `choose_by`"),
        ("  base:", "  ../base:", "not the name of an arm"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(tmp_path, old, new, message):
    assert old in STUDY
    with pytest.raises(UserError, match=re.escape(message)):
        load_study(write_study(tmp_path, STUDY.replace(old, new, 1)))


def test_facts_are_dealt_evenly_within_kind_and_times():
    facts = facts_of("number", 1, 4) + facts_of("city", 1, 2) + facts_of("city", 8, 3)
    assert halves_of(facts) == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def facts_of(kind: str, times: int, count: int) -> list[Fact]:
    return [Fact(f"The {i}", "x", (), times, kind, "t") for i in range(count)]


@pytest.mark.parametrize("name", ["facts", "text"])
def test_the_studies_compare_what_they_say_they_compare(name):
    study = load_study(ROOT / "train" / "recipes" / "small" / f"{name}.yaml")
    recipes: dict[str, Recipe] = {
        arm: study.recipe_of(arm, 0, (study.arms[arm].settings or [None])[0]) for arm in study.arms
    }
    anchor = sizes_of(recipes["base"], "none")["anchor_parameters"]
    large = sizes_of(recipes["large"], "none")["anchor_parameters"]
    assert 2.19 < large / anchor < 2.23
    fetched = sizes_of(recipes["fetched"], "fetched")["fetched_parameters"]
    assert 0.1 < fetched / anchor < 0.16
    varied = {"fetch-half": 0.5, "fetch-twice": 2, "fetch-four": 4}
    varied |= {"cotrained-twice": 2, "cotrained-twice-prompts": 2, "cotrained-four": 4}
    for arm, recipe in recipes.items():
        if memories_of(recipe, study.arms[arm].measure):
            own = sizes_of(recipe, "fetched")["fetched_parameters"]
            assert own == pytest.approx(varied.get(arm, 1) * fetched, rel=0.02), arm
