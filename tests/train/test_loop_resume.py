"""Training runs that were stopped or killed and go on, to the same bits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_hmem.errors import UserError
from tests.helpers import loop_runs as runs
from tests.helpers.faults import killed
from tests.helpers.programs import refused
from train.data.order import ShuffledOrder
from train.loop.loop import train
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore
from train.store.checkpoint import check_identity


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in runs.KINDS}
    for kind, folder in folders.items():
        runs.run(kind, folder)
    return folders


@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_stopped_run_that_goes_on_equals_an_uninterrupted_one(kind, whole, tmp_path):
    # Before the first checkpoint, in the 7th step of all, in the 10th.
    for steps, done in ((3, None), (6, 4), (5, 8)):
        with runs.trainee_of(kind, tmp_path) as trainee, pytest.raises(KeyboardInterrupt):
            train(
                runs.Ended(trainee, steps, runs.interrupt), runs.order(), runs.CONFIG, tmp_path,
                kind,
            )  # fmt: skip
        assert (tmp_path / "loss.jsonl").exists() == (done is not None)
        assert done is None or runs.saved(tmp_path, kind).step == done
    assert runs.run(kind, tmp_path).step == runs.CONFIG.num_steps(runs.ROWS) == 13
    runs.assert_equal_runs(tmp_path, whole[kind])


@pytest.mark.parametrize(
    ("kind", "moment"), [("anchor", "step"), ("memory", "save"), ("cotrain", "save")]
)
def test_a_killed_process_leaves_a_checkpoint_to_go_on_from(kind, moment, whole, tmp_path):
    killed(runs.killed_run, kind, tmp_path, moment)
    assert runs.saved(tmp_path, kind).step == 4
    runs.run(kind, tmp_path)
    runs.assert_equal_runs(tmp_path, whole[kind])


def test_a_finished_run_is_not_trained_further(whole, tmp_path):
    shutil.copytree(whole["memory"], tmp_path, dirs_exist_ok=True)
    (tmp_path / "loss.jsonl").unlink()  # killed between the last commit and this file
    with runs.trainee_of("memory", tmp_path) as trainee:
        train(runs.Ended(trainee, 0, runs.interrupt), runs.order(), runs.CONFIG, tmp_path, "memory")
    runs.assert_equal_runs(tmp_path, whole["memory"])


def test_a_log_is_cut_where_the_run_goes_on(tmp_path):
    with runs.trainee_of("memory", tmp_path) as trainee, pytest.raises(KeyboardInterrupt):
        train(runs.Ended(trainee, 6, runs.interrupt), runs.order(), runs.CONFIG, tmp_path, "memory")
    path = tmp_path / "log.jsonl"
    before = json.loads(path.read_text())
    assert before["step"] == 4
    # A longer run logs every 20 steps: of what came after the checkpoint, the last half-written.
    with path.open("a") as file:
        file.write(json.dumps({**before, "step": 5}) + '\n{"step": 6, "lo')
    runs.run("memory", tmp_path)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 13]
    assert records[0] == before
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)  # they add up over both starts
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_begins_again_from_the_start_leaves_no_old_log(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 0, "validation": {"none": 3.0}}\n')
    runs.run("anchor", tmp_path)
    assert [record["step"] for record in runs.logged(tmp_path)] == [4, 8, 12, 13]


def test_how_a_run_is_watched_may_change_while_it_goes_on(whole, tmp_path):
    with runs.trainee_of("memory", tmp_path) as trainee, pytest.raises(KeyboardInterrupt):
        train(runs.Ended(trainee, 6, runs.interrupt), runs.order(), runs.CONFIG, tmp_path, "memory")
    runs.run("memory", tmp_path, replace(runs.CONFIG, validate_every=3, validation_sequences=5))
    runs.assert_equal_runs(tmp_path, whole["memory"])


@pytest.mark.parametrize("kind", runs.KINDS)
@pytest.mark.parametrize(
    ("changed", "seed", "rows", "named"),
    [
        ({"learning_rate": 2e-2}, runs.SEED, runs.ROWS, "training.learning_rate was 0.01, is 0.02"),
        ({}, runs.SEED + 1, runs.ROWS, "seed was 5, is 6"),
        ({}, runs.SEED, runs.ROWS - 1, "num_sequences was 10, is 9"),
    ],
    ids=["recipe", "seed", "data"],
)
def test_what_another_run_saved_is_refused(kind, changed, seed, rows, named, whole, tmp_path):
    shutil.copytree(whole[kind], tmp_path, dirs_exist_ok=True)
    config = replace(runs.CONFIG, **changed)
    wanted = rf"belongs to another run: {named}; go on with what it was begun with"
    with runs.trainee_of(kind, tmp_path) as trainee, pytest.raises(UserError, match=wanted):
        train(
            runs.Ended(trainee, 0, runs.interrupt), ShuffledOrder(rows, config, seed), config,
            tmp_path, kind,
        )  # fmt: skip
    runs.assert_equal_runs(tmp_path, whole[kind])


def test_a_run_goes_on_only_with_the_same_sizes_and_files(tmp_path):
    files = {"tokenizer": "a", "tree": "b"}
    with runs.trainee_of("memory", tmp_path) as trainee:
        train(trainee, runs.order(), runs.CONFIG, tmp_path, "memory", files)
    tokens, paths = runs.sequences()
    other = replace(runs.MEMORY, r=(3, 1))
    with BlockStore(tmp_path / "store", other, runs.SEED) as store:
        trainee = MemoryTrainee(runs.make_model(), store, tokens, paths, runs.EOT, runs.CONFIG)
        files["tokenizer"] = "c"
        wanted = r"another run: files.tokenizer was a, is c, sizes.r was \[3, 2\], is \[3, 1\];"
        with pytest.raises(UserError, match=wanted):
            train(trainee, runs.order(), runs.CONFIG, tmp_path, "memory", files)


def test_a_difference_is_named_also_where_a_key_is_new_and_the_many_are_cut(tmp_path):
    with pytest.raises(UserError, match=r"another run: a\.c was None, is 2;"):
        check_identity({"a": {"b": 1}}, {"a": {"b": 1, "c": 2}}, tmp_path)
    refused("and 3 more", lambda: check_identity({}, {str(i): i for i in range(7)}, tmp_path))
    check_identity({"a": [1, 2]}, {"a": (1, 2)}, tmp_path)


def test_a_damaged_checkpoint_is_one_line_and_not_other_numbers(whole, tmp_path):
    """A flipped bit in its weights or moments was trained on with."""
    shutil.copytree(whole["anchor"], tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint.safetensors"
    data = path.read_bytes()
    for at in (len(data) // 3, len(data) // 2, len(data) - 3, data.index(b"num_sequences")):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with runs.trainee_of("anchor", tmp_path) as trainee:
            what = "is damaged: its checksum; move|wrong safetensors header"
            with pytest.raises(UserError, match=what):
                train(trainee, runs.order(), runs.CONFIG, tmp_path, "anchor")
