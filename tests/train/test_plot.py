"""The picture of a run: what it is drawn from, and that it is drawn."""

import json
import struct
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.config import MemoryConfig
from tests.helpers.programs import refused
from train.loop.plot import block_steps, curves_of, leaf_counts, plot_run, smooth, validations_of
from train.store.blocks import BlockStore
from train.store.checkpoint import Progress


def write_curve(run: Path, stage: str, losses: list[float]) -> None:
    (run / stage).mkdir(parents=True, exist_ok=True)
    rows = ({"step": i, "loss": loss, "learning_rate": 1e-3} for i, loss in enumerate(losses))
    (run / stage / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_paths(run: Path, leaves: list[int]) -> None:
    (run / "sequences").mkdir(parents=True)
    paths = np.array([[leaf // 2, leaf] for leaf in leaves], np.int32)
    np.save(run / "sequences" / "paths.npy", paths)


def size_of(png: Path) -> tuple[int, int]:
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def first_panel(run: Path) -> tuple[Path, tuple[int, int]]:
    """The picture of a run that has but its leaves, and its size."""
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra `plot`, is missing")
    target = run / "run.png"
    write_paths(run, [0, 1, 1, 2, 3] * 20)
    plot_run(run, target)
    return target, size_of(target)


def test_means_leaves_and_curves_are_those_of_what_was_written(tmp_path):
    losses = np.array([4.0, 0.0, 2.0, 6.0, 8.0])
    assert smooth(losses, 1).tolist() == losses.tolist()
    assert smooth(losses, 3).tolist() == [2.0, 2.0, 8 / 3, 16 / 3, 7.0]
    write_paths(tmp_path, [3, 3, 3, 0, 2, 2])
    write_curve(tmp_path, "generic", [3.0, 2.5])
    counts = leaf_counts(tmp_path)
    assert counts.tolist() == [3, 2, 1]
    curves = curves_of(tmp_path)
    assert list(curves) == ["generic"]
    assert curves["generic"].tolist() == [[0, 3.0], [1, 2.5]]


def test_a_panel_is_drawn_for_what_the_run_has(tmp_path):
    target, (one, height) = first_panel(tmp_path)
    write_curve(tmp_path, "anchor", list(np.linspace(8, 2, 300)))
    plot_run(tmp_path, target)
    assert size_of(target) == (2 * one, height)
    write_curve(tmp_path, "memories", [2.0])  # a stage that has just begun
    write_curve(tmp_path, "dense", list(np.linspace(2, 1, 50)))
    plot_run(tmp_path, target)
    assert size_of(target) == (3 * one, height)
    assert not list(tmp_path.glob(".*"))


def test_nothing_to_draw_and_a_broken_curve_are_one_line(tmp_path):
    refused("nothing to draw", plot_run, tmp_path, tmp_path / "run.png")
    write_curve(tmp_path, "anchor", [])
    refused("nothing to draw", plot_run, tmp_path, tmp_path / "run.png")
    (tmp_path / "anchor" / "loss.jsonl").write_text('{"step": 1}\n')
    refused(r"loss.jsonl is not a loss curve", plot_run, tmp_path, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # the import fails as if it were not there
    write_paths(tmp_path, [0, 1])
    refused(r"needs the package matplotlib:.*pip install", plot_run, tmp_path, tmp_path / "run.png")


def write_log(run: Path, stage: str, values: dict[str, list[float | None]]) -> None:
    """A validation after every 10 steps, each after a line of the training."""
    (run / stage).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(len(next(iter(values.values())))):
        found = {memory: curve[i] for memory, curve in values.items()}
        lines += [{"step": 10 * i, "loss": 1.0}, {"step": 10 * i, "validation": found}]
    (run / stage / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_store(run: Path) -> None:
    """Blocks of which some have had steps, as a training leaves them."""
    config = MemoryConfig(hidden_size=8, num_hidden_layers=1, r=(2, 0, 1), branching=(2, 2, 2))
    with BlockStore(run / "memories" / "store", config, seed=0) as store:
        for level, counts in ((1, {0: 5, 1: 2}), (3, {6: 4, 0: 1, 7: 2})):
            clusters = np.array(list(counts))
            *states, _ = store.gather(level, clusters, len(clusters))
            store.scatter(level, clusters, [*states, mx.array(list(counts.values()))])
        store.commit(Progress({"seed": 0, "sizes": config.to_dict()}, step=5))
        *states, _ = store.gather(3, np.array([5]), 1)
        store.scatter(3, np.array([5]), [*states, mx.array([9])])  # not committed


def test_steps_of_blocks_are_those_of_the_last_commit_by_level(tmp_path):
    assert block_steps(tmp_path) == {}
    write_store(tmp_path)
    steps = block_steps(tmp_path)
    assert {level: counts.tolist() for level, counts in steps.items()} == {
        1: [5, 2],
        3: [4, 2, 1, 0, 0, 0, 0, 0],
    }


def test_validations_are_read_by_stage_and_memory_and_nothing_twice(tmp_path):
    write_log(tmp_path, "anchor", {"none": [9.0, 8.0]})
    write_log(tmp_path, "generic", {"none": [8.0, 8.0], "generic": [8.0, 7.5]})
    found = validations_of(tmp_path)
    assert set(found) == {("anchor", "none"), ("generic", "none"), ("generic", "generic")}
    write_log(tmp_path, "memories", {"none": [8.0, None], "fetched": [8.0, 6.0]})
    found = validations_of(tmp_path)
    assert ("generic", "none") not in found  # the same frozen anchor
    assert found["memories", "fetched"].tolist() == [[0, 8.0], [10, 6.0]]
    assert found["memories", "none"].tolist() == [[0, 8.0]]  # the other was infinite


def test_validation_and_blocks_are_drawn_too(tmp_path):
    target, (one, height) = first_panel(tmp_path)
    write_log(tmp_path, "anchor", {"none": [9.0, 8.0]})  # killed before its first checkpoint
    plot_run(tmp_path, target)
    assert size_of(target) == (one, height)
    write_log(tmp_path, "memories", {"none": [8.0, 7.9], "generic": [8.0, 7.0], "fetched": [8, 6]})
    plot_run(tmp_path, target)
    assert size_of(target) == (2 * one, height)
    write_store(tmp_path)  # in place of the leaves
    plot_run(tmp_path, target)
    assert size_of(target) == (2 * one, height)
    write_curve(tmp_path, "anchor", list(np.linspace(8, 2, 300)))
    write_curve(tmp_path, "memories", list(np.linspace(2, 1, 50)))
    plot_run(tmp_path, target)
    assert size_of(target) == (2 * one, 2 * height)
