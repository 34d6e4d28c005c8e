"""Validation during training: what it says, and that the training does not notice it."""

import contextlib
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import perplexity, read_texts
from mlx_hmem.memory import join_blocks
from mlx_hmem.model.load import load
from tests.helpers.loop_runs import CONTEXT, EOT, KINDS, SEED, VOCABULARY, make_model
from tests.helpers.places import ROOT
from tests.helpers.programs import refused
from tests.helpers.recipes import write_recipe
from tests.helpers.stores import store_state
from train.data.order import ShuffledOrder
from train.data.tokenizer import train_tokenizer
from train.data.windows import Windows, choose
from train.loop.log import Reporting, read_log
from train.loop.loop import train
from train.loop.validation import Validation, held_out_windows
from train.recipe.recipe import CotrainSection, TrainerConfig, load_recipe
from train.stages import STAGES, is_done, run_stages
from train.step.anchor import AnchorTrainee
from train.step.memories import MemoryTrainee, generic_path
from train.store.blocks import BlockStore

ROWS = 20
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(3, 0, 2), branching=(2, 2, 3))
CONFIG = TrainerConfig(epochs=3, batch_size=3, learning_rate=1e-2, warmup_steps=2, save_every=5)
WATCHED = replace(CONFIG, validate_every=2)
COTRAIN = CotrainSection(generic_probability=0.4)


def leaf_paths(count: int, seed: int) -> np.ndarray:
    leaves = np.random.default_rng(seed).integers(0, 12, count)
    return np.stack([leaves // 6, leaves // 3, leaves], axis=1)


def sequences() -> np.ndarray:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (ROWS, CONTEXT + 1)).astype(np.uint16)
    tokens[rng.random(tokens.shape) < 0.15] = EOT
    return tokens


def held_out(begin: tuple[int, ...] = (EOT,)) -> Windows:
    rng = np.random.default_rng(1)
    rows = [[*begin, *rng.integers(1, VOCABULARY, n)] for n in (3, 11, 7, 1, 11, 5, 2)]
    return Windows(np.concatenate(rows), np.cumsum([0, *map(len, rows)]), begin)


@contextlib.contextmanager
def made(kind: str, folder: Path, cache_bytes: int = 1) -> Iterator[tuple[object, Validation]]:
    """A trainee and its validation, on a cache that holds no more than a step needs."""
    model, tokens, windows = make_model(), sequences(), held_out()
    if kind == "anchor":
        yield AnchorTrainee(model, tokens, EOT, CONFIG), Validation(model, windows, 3)
        return
    paths = {"fetched": leaf_paths(len(windows), 2)}
    if kind == "cotrain":
        paths["generic"] = np.tile(generic_path(MEMORY), (len(windows), 1))
    with BlockStore(folder / "store", MEMORY, SEED, cache_bytes) as store:
        cotrain = COTRAIN if kind == "cotrain" else None
        own = leaf_paths(ROWS, 3)
        trainee = MemoryTrainee(model, store, tokens, own, EOT, CONFIG, cotrain)
        yield trainee, Validation(model, windows, 3, trainee, paths)


def saved(kind: str, folder: Path) -> dict[str, bytes]:
    """All weights, moments, steps and losses."""
    if kind == "anchor":
        files = ["checkpoint.safetensors", "loss.jsonl"]
        return {name: (folder / name).read_bytes() for name in files}
    with BlockStore(folder / "store", MEMORY, SEED, readonly=True) as store:
        result = {name: array.tobytes() for name, array in store_state(store).items()}
    return result | {"loss": (folder / "loss.jsonl").read_bytes()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_is_the_same_with_validation_and_without(kind: str, tmp_path: Path):
    for name, config in (("plain", CONFIG), ("watched", WATCHED)):
        with made(kind, tmp_path / name) as (trainee, validation):
            order = ShuffledOrder(ROWS, config, SEED)
            validate = validation if name == "watched" else None
            train(trainee, order, config, tmp_path / name, kind, validate=validate)
    assert saved(kind, tmp_path / "plain") == saved(kind, tmp_path / "watched")
    records = read_log(tmp_path / "watched" / "log.jsonl")
    validations = {r["step"]: r["validation"] for r in records if "validation" in r}
    assert order.num_steps == 20
    assert list(validations) == list(range(0, 21, 2))
    memories = {"anchor": set(), "memory": {"fetched"}, "cotrain": {"generic", "fetched"}}[kind]
    assert all(set(values) == {"none", *memories} for values in validations.values())
    # Blocks begin without effect; training then tells the memories apart.
    assert len(set(validations[0].values())) == 1
    assert len(set(validations[20].values())) == 1 + len(memories)
    alone = {values["none"] for values in validations.values()}
    assert (len(alone) == 1) == (kind == "memory")  # its anchor is frozen


@pytest.mark.parametrize("begin", [(EOT,), (EOT, 7)])
def test_a_validation_is_the_mean_over_windows_taken_one_by_one(begin: tuple[int, ...], tmp_path):
    windows = held_out(begin)
    with made("cotrain", tmp_path) as (trainee, validation):
        for step in range(6):
            trainee.step(np.arange(3 * step, 3 * step + 3), 2e-2)
        paths, model = validation.paths, validation.anchor
        found = Validation(model, windows, 3, trainee, paths)()
        for mode in ("none", "generic", "fetched"):
            nats, count = 0.0, 0
            for i in range(len(windows)):
                rows = None
                if mode != "none":
                    path = paths[mode][i]
                    blocks = [trainee.store.current(n, int(path[n - 1])) for n in (1, 3)]
                    rows = join_blocks([mx.array(block) for block in blocks], MEMORY)
                tokens = windows[i].tolist()
                with trainee.slot.using(rows):
                    logits = model(mx.array([tokens]))[0]
                logs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
                scored = range(len(begin), len(tokens))
                nats -= sum(float(logs[place - 1, tokens[place]]) for place in scored)
                count += len(scored)
            assert count == 40
            assert found[mode] == pytest.approx(math.exp(nats / count), rel=1e-5)
        assert len({round(value, 3) for value in found.values()}) == 3


def test_reading_blocks_leaves_the_cache_as_it_is_and_sees_what_is_not_yet_saved(tmp_path):
    with BlockStore(tmp_path, MEMORY, SEED, cache_bytes=1) as store:
        gathered = {}
        for clusters in ([0, 1], [5, 7], [3]):  # each pushes out the one before
            *states, steps = store.gather(3, np.array(clusters), len(clusters))
            updated = [state + sum(clusters) + 1 for state in states]
            store.scatter(3, np.array(clusters), [*updated, steps + 1])
            gathered |= dict(zip(clusters, np.array(updated[0]), strict=True))
        store.gather(1, np.array([1]), 1)
        before = list(store._cache), store._cached_bytes, set(store._dirty)
        for cluster, block in gathered.items():
            assert np.array_equal(store.current(3, cluster), block)
        untouched = store.current(1, 0)
        assert before == (list(store._cache), store._cached_bytes, store._dirty)
        assert np.array_equal(untouched, np.array(store.gather(1, np.array([0]), 1)[0][0]))


def write_run(run: Path, texts: list[str]) -> Path:
    """What of a run the choice of windows reads."""
    (run / "corpus").mkdir(parents=True)
    lines = (json.dumps({"id": str(i), "title": "", "text": t}) for i, t in enumerate(texts))
    (run / "corpus" / "held_out.jsonl").write_text("".join(line + "\n" for line in lines))
    train_tokenizer(
        [f"the {a} sees the {b}" for a in range(40) for b in range(9)], 280, run / "tokenizer"
    )
    return run


def test_a_few_held_out_windows_are_chosen_whatever_their_order_if_there_are_any(tmp_path):
    texts = [f"the {n} sees the {n + 1} and the {n % 7}" for n in range(30)]
    runs = [write_run(tmp_path / "a", texts), write_run(tmp_path / "b", texts[::-1])]
    few = replace(WATCHED, validation_sequences=8)
    a, b = (held_out_windows(run, few, 16) for run in runs)
    assert len(a) == 8
    assert np.array_equal(a.tokens, b.tokens)
    assert np.diff(a.offsets).max() <= 16
    everything = held_out_windows(runs[0], replace(few, validation_sequences=1000), 16)
    assert len(everything) > 30  # of two windows, some of them
    assert held_out_windows(runs[0], CONFIG, 16) is None
    part = choose(everything, np.array([4, 2]))
    assert [part[i].tolist() for i in (0, 1)] == [everything[i].tolist() for i in (4, 2)]
    with pytest.raises(UserError, match=r"nothing to validate on.*corpus\.held_out"):
        held_out_windows(write_run(tmp_path, []), WATCHED, 16)


CHANGES = [
    "windows.context=48",
    "anchor.training={steps: 20, warmup_steps: 5}",
    "memories.training={steps: 20, learning_rate: 3e-2, warmup_steps: 5, validate_every: 15, "
    "validation_sequences: 1000}",
    "memories.cotrain={learning_rate_scale: 0.1}",
    "export.dtype=float32",
]


def test_the_last_validation_is_what_the_model_made_scores_and_no_validation_is_no_other_run(
    tmp_path: Path,
):
    path, run = write_recipe(tmp_path / "tiny.yaml", *CHANGES), tmp_path / "run"
    recipe = load_recipe(path)
    names = list(STAGES)[: list(STAGES).index("export") + 1]
    run_stages(recipe, run, [name for name in names if name != "dense"])
    assert "validation" not in (run / "anchor" / "log.jsonl").read_text()
    records = read_log(run / "memories" / "log.jsonl")
    validations = {r["step"]: r["validation"] for r in records if "validation" in r}
    assert list(validations) == [0, 15, 20]
    model, texts = load(run / "model"), read_texts(run / "corpus" / "held_out.jsonl")
    for memory, found in validations[20].items():
        wanted = perplexity(model, texts, memory, context=48, progress=False)
        assert found == pytest.approx(wanted.per_token, rel=1e-4), memory
    assert len(set(validations[20].values())) == 3
    # Asking more often is no reason to train again.
    again = load_recipe(path, ["memories.training.validate_every=0"])
    assert is_done(STAGES["memories"], again, run)


def test_a_service_that_is_unknown_or_not_installed_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not there
    refused(r"wandb needs its package:.*pip install wandb", Reporting, "wandb", "p")
    refused(r"no such service.*tensorboard; use wandb or swanlab", Reporting, "tensorboard", "p")


# In a process of its own: wandb leaves threads and a server behind.
REPORTED = """
import sys
from pathlib import Path
import tests.train.test_validation as t
from train.loop.log import Reporting, Watching
with t.made("cotrain", Path(sys.argv[1])) as (trainee, validation):
    order = t.ShuffledOrder(t.ROWS, t.WATCHED, t.SEED)
    t.train(trainee, order, t.WATCHED, Path(sys.argv[1]), "memories", None, validation,
            Watching(Reporting("wandb", "tiny")))
"""


def test_what_is_logged_also_goes_to_weights_and_biases(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    command = [sys.executable, "-c", REPORTED, str(tmp_path)]
    root = ROOT
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    stored = file.read_bytes()
    for name in (b"tokens_per_s", b"validation/fetched", b"learning_rate", b"memories"):
        assert name in stored
