"""The paper's recipes: they load, have the paper's sizes, and run when scaled down."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem import load
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.bank.writer import planned_bytes
from mlx_hmem.errors import UserError
from tests.helpers.places import ROOT
from tests.helpers.programs import run
from train.command import main
from train.cost.costs import anchor_parameters, gathered_parameters, step_operations, trainings_of
from train.cost.plan import sequences_of
from train.data.order import SubtreeOrder
from train.recipe.recipe import Recipe, TrainerConfig, load_recipe
from train.step.memories import generic_config
from train.step.start import model_args

FOLDER = ROOT / "train" / "recipes" / "paper"
README = (FOLDER / "README.md").read_text()
STARTS = {"a2": "a1", "a3": "a1", "b2": "b1", "c2": "c1"}
# As the models are published, as far as shapes follow from it.
CONFIGS = {
    "gemma-3-270m": dict(
        model_type="gemma3_text", hidden_size=640, num_hidden_layers=18, intermediate_size=2048,
        num_attention_heads=4, num_key_value_heads=1, head_dim=256, vocab_size=262144,
        max_position_embeddings=32768,
    ),
    "qwen-2.5-0.5b": dict(
        model_type="qwen2", hidden_size=896, num_hidden_layers=24, intermediate_size=4864,
        num_attention_heads=14, num_key_value_heads=2, rms_norm_eps=1e-6, vocab_size=151936,
        tie_word_embeddings=True, max_position_embeddings=32768,
    ),
    "llama-3.2-1b": dict(
        model_type="llama", hidden_size=2048, num_hidden_layers=16, intermediate_size=8192,
        num_attention_heads=32, num_key_value_heads=8, head_dim=64, rms_norm_eps=1e-5,
        vocab_size=128256, tie_word_embeddings=True, max_position_embeddings=131072,
    ),
}  # fmt: skip
PARAMETERS = {
    "a": 163_510_016,
    "b": 411_665_408,
    "c": 1_439_893_504,
    "gemma-3-270m": 268_098_176,
    "qwen-2.5-0.5b": 494_032_768,
    "llama-3.2-1b": 1_235_814_400,
}
ROWS = ["a1", "a2", "a3", "a4", "b1", "b2", "b3", "c1", "c2", *CONFIGS]
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def paper(name: str, folder: Path, *overrides: str) -> Recipe:
    """The recipe as it is, with a config alone in the place of the model that it starts from."""
    config = CONFIGS.get(name)
    if name in STARTS:
        config = vars(model_args(load_recipe(FOLDER / f"{STARTS[name]}.yaml")))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        overrides = (f"anchor.path={folder}", *overrides)
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


def test_every_row_of_the_papers_tables_has_a_recipe_and_a_line_in_the_readme():
    assert sorted(ROWS) == NAMES
    assert re.findall(r"`([^`]+)\.yaml` \|", README) == ROWS


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_papers_and_the_readmes(tmp_path, name):
    recipe = paper(name, tmp_path)
    config, row = recipe.memory_config, name if name in CONFIGS else name[0]
    assert anchor_parameters(recipe) == PARAMETERS[row]
    line = next(line for line in README.splitlines() if f"`{name}.yaml` |" in line)
    r, bank, fetched = (cell.strip() for cell in line.split("|")[6:9])
    if recipe.anchor_only:
        assert (r, bank, fetched) == ("–", "–", "–")
        return
    assert r == ", ".join(map(str, recipe.memories.r))
    assert config.num_clusters == (16, 256, 4096, 65536)
    assert bank == f"{config.bank_parameters / 1e9:.1f}B"
    wanted = f"{config.fetched_parameters / 1e6:.1f}M"
    assert fetched in (wanted, f"{config.fetched_parameters / 1e6:.0f}M")
    assert planned_bytes(recipe.planned_bank()) >= 2 * config.bank_parameters
    assert generic_config(config).fetched_parameters == config.fetched_parameters


@pytest.mark.parametrize("name", NAMES)
def test_training_is_the_papers(tmp_path, name):
    recipe = paper(name, tmp_path)
    arms = trainings_of(recipe)
    frozen = name == "a3" or name in CONFIGS
    wanted = ["anchor"] if recipe.anchor_only else ["memories"] + ["generic"] * frozen
    assert list(arms) == wanted
    tokens = 2**41 if name in ("a4", "b3") else 2**40
    for arm, t in arms.items():
        context = recipe.windows.of_anchor if arm == "anchor" else recipe.windows.context
        assert context == (8192 if arm == "anchor" else 2048)
        assert t.batch_size * context == (2**20 if arm == "anchor" else 2**21)
        assert t.num_steps(1000) * t.batch_size * context == tokens
        assert (t.beta1, t.beta2, t.grad_clip, t.warmup_steps) == (0.9, 0.95, 1.0, 10_000)
        assert t.document_mask == (name not in CONFIGS)
        rates = (t.learning_rate, t.final_learning_rate, t.weight_decay)
        if arm == "anchor":
            assert rates == (5e-3, 5e-5, 0.05)
        elif name == "a4":
            assert (rates[0], rates[2]) == (1e-3, 0.1)
        else:
            assert rates == (1e-4, 1e-5, 1e-3)
    assert (recipe.memories.cotrain is None) == (frozen or recipe.anchor_only)
    assert step_operations(recipe, "anchor", 2) == 2 * step_operations(recipe, "anchor", 1) > 0


def banks_in(heading: str) -> list[str]:
    """The --set lines of the README's paragraph that begins so."""
    text = README.split(heading)[1].split("\n\n")[1]
    return [shlex.split(line)[1] for line in text.splitlines()]


@pytest.mark.parametrize(
    ("heading", "bank", "count"),
    [
        ("Bank sizes, on the frozen", "4.6", 6),
        ("18.7B parameters in the bank:", "18.7", 4),
        ("One level only", "4.6", 3),
    ],
)
def test_the_ablations_have_banks_of_one_size(tmp_path, heading, bank, count):
    overrides = banks_in(heading)
    assert len(overrides) == count
    fetched = []
    for override in overrides:
        config = paper("a3", tmp_path, override).memory_config
        assert f"{config.bank_parameters / 1e9:.1f}" == bank, override
        fetched.append(config.fetched_parameters)
    assert fetched == sorted(fetched, reverse="One level" in heading)


def test_placements_of_the_readme_keep_the_parameters(tmp_path):
    whole = paper("a3", tmp_path).memory_config
    lines = [line for line in README.splitlines() if '--set "memories.layers' in line]
    starts = []
    for line in lines:
        config = paper("a3", tmp_path, *shlex.split(line)[1::2]).memory_config
        assert config.bank_parameters == whole.bank_parameters
        assert config.num_memory_layers == 10
        starts.append(config.memory_layers[0])
    assert starts == [0, 12, 25]


def test_sizes_are_of_a_models_own_heads_and_the_plan_counts_longer_sequences(tmp_path):
    config = paper("llama-3.2-1b", tmp_path, "memories.kind=lora_qk").memory_config
    assert (config.query_size, config.key_value_size) == (2048, 512)
    recipe = paper("a1", tmp_path)
    assert sequences_of(recipe, None, 8192 * 100)[0] == 100
    with pytest.raises(UserError, match="no such model directory"):
        load_recipe(FOLDER / "a2.yaml", [f"anchor.path={tmp_path / 'none'}"])


def test_steps_stand_for_epochs_and_are_shared_out_to_subtrees():
    training = TrainerConfig(steps=100, epochs=3, batch_size=4)
    assert training.num_steps(7) == 100
    clusters = np.repeat([0, 1, 2], [10, 30, 60])
    order = SubtreeOrder(clusters, training, seed=0)
    assert order.steps_of == {0: 10, 1: 30, 2: 60}
    alone = SubtreeOrder(clusters, training, seed=0, subtree=1)
    assert alone.num_steps == 30


FACTS = "{kind: invented, topics: 4, entities_per_topic: 4, frequencies: [1, 8], "
FACTS += "plain_documents: 80}"
SMALL = ["corpus.documents=0", "corpus.held_out=0.2", f"corpus.facts=[{FACTS}]"]
SMALL += ["windows.context=64"]
SIZES = ["tokenizer.path=null", "tokenizer.vocab_size=400", "anchor.hidden_size=16"]
SIZES += ["anchor.num_hidden_layers=3", "anchor.num_attention_heads=2", "anchor.head_dim=8"]
SIZES += ["anchor.intermediate_size=32"]
SHORT = ["steps=12", "batch_size=4", "micro_batch_size=2", "warmup_steps=4", "save_every=5"]
MEMORY = ["tree.branching=[2,2,2,2]", "tree.encoder=static", "memories.r=[4,2,1,0]"]
MEMORY += [f"memories.training.{key}" for key in (*SHORT, "learning_rate=1e-2")]


def train(name: str, out: Path, *overrides: str, verb: tuple[str, ...] = ()) -> str:
    settings = [word for override in (*SMALL, *overrides) for word in ("--set", override)]
    said = run(main, *verb, FOLDER / f"{name}.yaml", "--out", out, *settings)
    assert said.status == 0, said.err[-2000:]
    return said.out


@pytest.fixture(scope="module")
def a1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("a1")
    short = [f"anchor.training.{key}" for key in SHORT]
    output = train("a1", out, *SIZES, *short, "windows.anchor_context=128")
    assert "memories: the recipe trains an anchor alone" in output
    return out


def test_an_anchor_alone_ends_in_a_model_directory(a1):
    model = load(a1 / "model")
    assert (model.bank, model.context) == (None, 128)
    assert len(list(model.stream("The", max_tokens=3, memory="none"))) >= 1
    for length in (128, 64, 32):
        rows = np.load(a1 / "anchor-sequences" / f"tokens-{length}.npy")
        assert rows.shape[1] == length + 1
    losses = [json.loads(line)["loss"] for line in (a1 / "anchor" / "loss.jsonl").open()]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    results = json.loads((a1 / "report" / "results.json").read_text())
    assert [p["memory"] for p in results["perplexity"]] == ["anchor alone"]


@pytest.mark.parametrize("name", ["a2", "a3", "a4"])
def test_rows_with_memory_run_from_the_row_they_start_from(tmp_path, a1, name):
    start = SIZES if name == "a4" else [f"anchor.path={a1 / 'model'}"]
    train(name, tmp_path, *start, *MEMORY)
    model = load(tmp_path / "model")
    theirs = named_parameters(load_anchor(a1 / "model")[0])
    same = [
        np.array_equal(np.array(array), np.array(theirs[key]))
        for key, array in named_parameters(model.anchor).items()
    ]
    assert all(same) == (name == "a3")
    if name != "a4":
        for file in ("tokens", "offsets"):  # the same tokenizer, taken over
            ours, before = (np.load(r / "windows" / f"{file}.npy") for r in (tmp_path, a1))
            assert np.array_equal(ours, before)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    scores = {p["memory"]: p["per_token"] for p in results["perplexity"]}
    assert list(scores) == ["anchor alone", "generic", "fetched"]
    assert scores["fetched"] < scores["anchor alone"]


def test_a_scaled_recipe_is_planned(tmp_path, a1, monkeypatch):
    monkeypatch.setattr("train.cost.plan.MEASURE_SECONDS", 0.0)
    start = f"anchor.path={a1 / 'model'}"
    plan = train("a3", tmp_path, start, *MEMORY, verb=("plan",))
    assert "15 blocks" not in plan
    assert "14 blocks" in plan
    assert "generic" in plan


def test_a_batch_of_one_subtree_is_reckoned_with_the_blocks_of_one(tmp_path):
    """Its gathers were padded as if it had sequences of all subtrees."""
    recipe = paper("a3", tmp_path)
    config, size = recipe.memory_config, recipe.memories.training.batch_size
    found = [gathered_parameters(config, size, grouped=grouped) / 1e9 for grouped in (False, True)]
    assert found == [pytest.approx(1.98, abs=0.01), pytest.approx(0.289, abs=0.001)]
