"""A job per subtree of the bank, and their merge: the bits of one job."""

import functools
import json
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.anchors.openlm import Model, ModelArgs
from tests.helpers.faults import killed, stop_at
from tests.helpers.programs import assert_refused, refused
from tests.helpers.programs import run as program
from tests.helpers.recipes import write_recipe
from train.command import main
from train.data.order import Order
from train.loop import arms
from train.loop.log import UNWATCHED
from train.parallel.merge import merge_subtrees
from train.parallel.subtrees import run_subtree, subtree_name
from train.ranks import ALONE
from train.recipe.recipe import CotrainSection, Recipe, load_recipe
from train.stages import STAGES, alone, is_done, mark_done, run_stages
from train.step.anchor import initialise
from train.step.memories import MemoryTrainee
from train.step.start import save_anchor
from train.store.blocks import BlockStore
from train.store.records import RecordStore

CHANGES = [
    "windows.context=32", "tree.branching=[3, 2, 2]",
    "anchor.training={epochs: 0.1, warmup_steps: 1}", "memories.r=[4, 0, 2]",
    "memories.group_by_subtree=true",
    "memories.training={epochs: 0.5, learning_rate: 8e-3, warmup_steps: 3, save_every: 4}",
    "dense.training={epochs: 0.1}",
]  # fmt: skip
COMPANY = (ALONE, UNWATCHED)


def rows_of(order: Order) -> list[list[int]]:
    return [order.batch(step).rows.tolist() for step in range(order.num_steps)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return load_recipe(write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", *CHANGES))


@pytest.fixture(scope="module")
def prepared(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run up to the stage before ``memories``."""
    run = tmp_path_factory.mktemp("prepared") / "run"
    names = list(STAGES)
    run_stages(recipe, run, names[: names.index("memories")])
    return run


def copy_of(run: Path, target: Path) -> Path:
    return Path(shutil.copytree(run, target))


@pytest.fixture(scope="module")
def one(recipe: Recipe, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One job."""
    run = copy_of(prepared, tmp_path_factory.mktemp("one") / "run")
    run_stages(recipe, run, ["memories"])
    return run


@pytest.fixture(scope="module")
def apart(recipe: Recipe, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job for each subtree, not merged."""
    run = copy_of(prepared, tmp_path_factory.mktemp("apart") / "run")
    for subtree in (2, 0, 1):
        run_subtree(recipe, run, subtree)
    return run


def merge(recipe: Recipe, run: Path, *others: Path) -> None:
    function = functools.partial(merge_subtrees, others=list(others))
    run_stages(recipe, run, ["memories"], {"memories": function})


def state_of(recipe: Recipe, run: Path, name: str = "memories") -> dict[object, bytes]:
    """Weights, moments and steps of every touched block, and the place of the run."""
    with arms.open_store(recipe, run, name, readonly=True) as store:
        state: dict[object, bytes] = {k: store._record(k).tobytes() for k in store.touched()}
        progress = store.progress()
    identity = json.dumps(progress.identity, sort_keys=True).encode()
    return state | {"curve": progress.curve_array().tobytes(), "identity": identity}


def assert_as_one_job(recipe: Recipe, run: Path, one: Path) -> None:
    assert is_done(STAGES["memories"], recipe, run)
    found, wanted = state_of(recipe, run), state_of(recipe, one)
    assert found.keys() == wanted.keys()
    for key in wanted:
        assert found[key] == wanted[key], key
    curve = Path("memories") / "loss.jsonl"
    assert (run / curve).read_bytes() == (one / curve).read_bytes()


def test_merged_subtrees_are_one_job_bit_for_bit(recipe, apart, one, tmp_path):
    run = copy_of(apart, tmp_path / "run")
    merge(recipe, run)
    assert_as_one_job(recipe, run, one)
    state = state_of(recipe, one)
    levels = Counter(key[0] for key in state if isinstance(key, tuple))
    assert levels == {1: 3, 3: 12}  # r is 0 on level 2
    steps = [np.frombuffer(state[1, n][-4:], np.int32)[0] for n in range(3)]
    assert min(steps) > 4  # more than one checkpoint each
    assert sum(steps) == arms.subtree_order(recipe, arms.sequences(run)[1]).num_steps
    # Again, and on to the next stage.
    merge(recipe, run)
    run_stages(recipe, run, ["generic"])


def test_subtrees_of_other_machines_are_merged_from_where_they_lie(recipe, apart, one, tmp_path):
    run, other = copy_of(apart, tmp_path / "run"), tmp_path / "other"
    shutil.move(run / subtree_name(1), other / "brought")
    shutil.move(run / subtree_name(2), other / "run" / subtree_name(2))
    shutil.copytree(run / subtree_name(0), other / "run" / subtree_name(0))  # there too
    refused("no subtree was trained here", merge, recipe, run, other)
    merge(recipe, run, other / "brought", other / "run")
    assert_as_one_job(recipe, run, one)


def test_a_stopped_subtree_goes_on_to_the_same_bits(recipe, prepared, apart, tmp_path, monkeypatch):
    run = copy_of(prepared, tmp_path / "run")
    stop_at(monkeypatch, MemoryTrainee, "step", 6)
    with pytest.raises(KeyboardInterrupt):
        run_subtree(recipe, run, 1)
    unfinished = r"subtrees are not finished: .*subtree-01 at step 4 of \d+;"
    refused(unfinished, merge, recipe, run)
    assert not is_done(STAGES["memories"], recipe, run)
    run_subtree(recipe, run, 1)
    assert state_of(recipe, run, subtree_name(1)) == state_of(recipe, apart, subtree_name(1))


def test_a_missing_subtree_is_named(recipe, apart, tmp_path):
    run = copy_of(apart, tmp_path / "run")
    for subtree in (0, 2):
        shutil.rmtree(run / subtree_name(subtree))
    refused("subtrees are missing: 0, 2; train each", merge, recipe, run)
    assert not (run / "memories" / "store" / "data.mdb").exists()


@pytest.mark.parametrize("what", ["anchor", "training", "seed", "whole"])
def test_a_subtree_of_another_run_is_refused_by_what_differs(what, recipe, apart, one, tmp_path):
    run = copy_of(apart, tmp_path / "run")
    shutil.rmtree(run / subtree_name(2))
    foreign, training = copy_of(apart, tmp_path / "foreign"), recipe.memories.training
    shutil.rmtree(foreign / subtree_name(2))
    other, named = recipe, "stage was memories, is memories/subtree-00"
    if what == "anchor":
        config = foreign / "anchor" / "config.json"
        weights = foreign / "anchor" / "model.safetensors"
        model = Model(ModelArgs("openlm", 16, 2, 32, 2, 8, 400, tie_word_embeddings=True))
        initialise(model, 99)
        save_anchor(model, json.loads(config.read_text()), foreign / "anchor")
        assert weights.read_bytes() != (run / "anchor" / "model.safetensors").read_bytes()
        named = r"files\.anchor was xxh3:\w+, is xxh3:\w+"
    elif what == "training":
        training = replace(training, weight_decay=0.3)
        other = replace(recipe, memories=replace(recipe.memories, training=training))
        named = r"training\.weight_decay was 0\.3, is 0\.05"
    elif what == "seed":
        other, named = replace(recipe, seed=2), "seed was 2, is 1"
    if what == "whole":
        shutil.copytree(one / "memories", foreign / subtree_name(2))
    else:
        arms.train_memory(other, foreign, subtree_name(2), *COMPANY, subtree=2)
    other = foreign / subtree_name(2)
    refused(rf"subtree-02 belongs to another run: {named}", merge, recipe, run, other)
    assert not is_done(STAGES["memories"], recipe, run)


def killed_merge(recipe: Recipe, run: Path, moment: str) -> None:
    """A merge that SIGKILL ends when the blocks are written, or when they are live."""
    commit = RecordStore.commit

    def die(self: RecordStore, values: dict[bytes, bytes]) -> None:
        assert len(self._staged) == 15
        if moment == "after":
            commit(self, values)
        os.kill(os.getpid(), signal.SIGKILL)

    RecordStore.commit = die  # type: ignore[method-assign]
    merge(recipe, run)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_merge_leaves_nothing_or_all(moment, recipe, apart, one, tmp_path):
    run = copy_of(apart, tmp_path / "run")
    killed(killed_merge, recipe, run, moment)
    assert not is_done(STAGES["memories"], recipe, run)
    if moment == "before":
        with arms.open_store(recipe, run, "memories", readonly=True) as store:
            assert store.touched() == []
            assert store.progress() is None
    else:
        assert state_of(recipe, run) == state_of(recipe, one)
    merge(recipe, run)
    assert_as_one_job(recipe, run, one)


def test_a_merge_does_not_mix_with_an_unfinished_job_nor_one_job_with_subtrees(
    recipe, apart, one, tmp_path
):
    run = copy_of(apart, tmp_path / "run")
    refused(r"trained apart: .*subtree-00, .*train merge", arms.run_memories, recipe, run, *COMPANY)
    with (
        arms.open_store(recipe, run, "memories") as store,
        arms.open_store(recipe, one, "memories", readonly=True) as source,
    ):
        progress = source.progress()
        store.commit(replace(progress, step=3, curve=progress.curve[:3]))
    refused("holds an unfinished training of all subtrees: step 3 of", merge, recipe, run)


def test_two_processes_do_not_train_one_subtree_and_may_train_two(recipe, prepared, tmp_path):
    run = copy_of(prepared, tmp_path / "run")
    with alone("training", run / subtree_name(0)):
        refused(r"memories/subtree-00 is running in another process", run_subtree, recipe, run, 0)
        run_subtree(recipe, run, 1)


def test_a_subtree_asks_for_the_disk_of_its_own_blocks(recipe, prepared, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(BlockStore, "check_disk", lambda self, *sizes: asked.append(sizes[0]))
    run_subtree(recipe, copy_of(prepared, tmp_path / "run"), 1)
    assert asked == [{1: 1, 3: 4}]


def test_a_subtree_without_sequences_has_nothing_to_train(
    recipe, prepared, apart, tmp_path, capsys
):
    run = copy_of(prepared, tmp_path / "run")
    paths = np.load(run / "sequences" / "paths.npy")
    paths[paths[:, 0] == 1] = paths[0] if paths[0, 0] != 1 else paths[paths[:, 0] != 1][0]
    np.save(run / "sequences" / "paths.npy", paths)
    mark_done(STAGES["sequences"], recipe, run)
    for subtree in range(3):
        run_subtree(recipe, run, subtree)
    assert "memories/subtree-01: no sequence belongs to it, nothing to train" in (
        capsys.readouterr().out
    )
    merge(recipe, run)
    with arms.open_store(recipe, run, "memories", readonly=True) as store:
        assert {cluster for level, cluster in store.touched() if level == 1} == {0, 2}


def test_what_cannot_be_trained_by_subtree_is_refused(recipe, prepared):
    for subtree in (-1, 3):
        refused(f"no such subtree: {subtree}; use 0 to 2", run_subtree, recipe, prepared, subtree)
    plain = replace(recipe, memories=replace(recipe.memories, group_by_subtree=False))
    refused("memories.group_by_subtree is false; set it to true", run_subtree, plain, prepared, 0)
    cotrain = replace(recipe, memories=replace(recipe.memories, cotrain=CotrainSection()))
    refused("subtrees cannot be trained apart with co-training", run_subtree, cotrain, prepared, 0)
    refused("needs a stage that is not done", run_subtree, recipe, prepared / "none", 0)
    refused("subtree is not true or false", replace, recipe.memories, group_by_subtree="yes")


def test_the_programs_refuse_in_one_line_and_show_their_help(tmp_path):
    known = [write_recipe(tmp_path / "tiny.yaml"), "--out", tmp_path / "run"]
    assert_refused(
        program(main, *known, "--subtree", 1), "--subtree is for one stage: 1; add --only memories"
    )
    assert_refused(program(main, "merge", *known), "memories.group_by_subtree is false")
    assert program(main, "merge", "--help").status == 0
    assert "folders of runs" in program(main, "merge", "--help").out


def test_all_arms_of_a_grouped_run_see_the_same_sequences(recipe, prepared, one, tmp_path):
    run = copy_of(prepared, tmp_path / "run")
    paths, training = arms.sequences(run)[1], recipe.memories.training
    arm, memories = arms.arm_order(recipe, paths, training), arms.subtree_order(recipe, paths)
    assert rows_of(arm) == rows_of(memories)
    arms.run_generic(recipe, run, *COMPANY)
    curves = [
        (r / "loss.jsonl").read_text().splitlines() for r in (one / "memories", run / "generic")
    ]
    first, second = (json.loads(curve[0])["loss"] for curve in curves)
    assert abs(first - second) < 1e-3  # the same first batch, blocks without effect
    assert len(curves[0]) == len(curves[1]) == memories.num_steps


def test_the_dense_arm_is_of_the_grouping_too(recipe):
    """Runs from before the key was known: test_recipe.py."""
    for grouped in (False, True):
        memories = replace(recipe.memories, group_by_subtree=grouped)
        parts = replace(recipe, memories=memories).sections(["memories", "dense"])
        assert (
            parts["memories"]["group_by_subtree"] is parts["dense"]["group_by_subtree"] is grouped
        )
