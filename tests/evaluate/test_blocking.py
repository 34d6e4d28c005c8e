"""Withholding clusters: the path that is left is that of a tree which never had them."""

import json

import numpy as np
import pytest

from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import recall
from mlx_hmem.evaluate.command import main
from mlx_hmem.evaluate.paper.blocking import blocking, other_clusters
from mlx_hmem.evaluate.paper.fact_runs import FactRun
from mlx_hmem.evaluate.paper.fact_tables import atomic_numbers
from mlx_hmem.evaluate.routing import withhold
from mlx_hmem.evaluate.tasks.task import GENERATION, Task
from mlx_hmem.retriever import ClusterTree
from tests.helpers.programs import refused
from tests.helpers.task_helpers import data_of, run_task
from tests.retriever.test_kmeans import topics

PROMPTS = [fact.prompt for fact in atomic_numbers().facts[:30]]


@pytest.fixture(scope="module")
def tree():
    return ClusterTree.fit(topics(3000, dim=24), branching=(5, 3, 4), seed=1)


def without(tree, level, cluster):
    """The tree as if this cluster had never had examples."""
    counts, below = [own.copy() for own in tree.counts], 1
    for at in range(level - 1, tree.depth):
        below *= tree.branching[at] if at >= level else 1
        counts[at][cluster * below : (cluster + 1) * below] = 0
    return ClusterTree(tree.branching, tree.centroids, counts, tree.seed)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_barred_cluster_is_as_if_it_were_not_there(tree, level):
    for probe in topics(100, dim=24, seed=5):
        best = tree.route(probe)
        barred = (level, best[level - 1])
        left = tree.route(probe, barred=[barred])
        assert left == without(tree, *barred).route(probe)
        assert left[: level - 1] == best[: level - 1]
        assert left[level - 1] != best[level - 1]
        other = (level, (best[level - 1] + 1) % tree.num_clusters[level - 1])
        assert tree.route(probe, barred=[other]) == best


def test_a_cluster_whose_children_are_all_barred_is_left_aside(tree):
    probe = topics(1, dim=24, seed=5)[0]
    best = tree.route(probe)
    leaves = [(3, path[2]) for path in tree.leaves() if path[0] == best[0]]
    assert tree.route(probe, barred=leaves) == tree.route(probe, barred=[(1, best[0])])
    with pytest.raises(UserError, match="every cluster is barred"):
        tree.route(probe, barred=[(1, cluster) for cluster in range(5)])


def test_rows_are_recall_along_the_paths_that_are_left(model, tmp_path):
    facts = list(atomic_numbers().facts[:8])
    run = FactRun(model, tmp_path, "m", progress=False)
    whole = recall(model, facts, progress=False)
    # Of so small a model: the facts that it answers are those that it is made to.
    facts = [
        type(f)(f.prompt, (text.split() or ["x"])[0], (), 0, "k", "t")
        for f, text in zip(facts, whole.continuations, strict=True)
    ]
    whole = recall(model, facts, progress=False)
    rows = {(row.name.split()[0], row.level): row for row in blocking(run, facts, [1, 3])}
    assert list(rows) == [
        ("nothing", 0), ("best", 3), ("best", 1), ("another", 3), ("another", 1),
        ("generic", 0), ("anchor", 0),
    ]  # fmt: skip
    first = rows["nothing", 0]
    assert first.accuracy.right == first.known.total == sum(whole.right) > 3
    for level in (1, 3):
        vectors = model.retriever.vectors([fact.prompt for fact in facts])
        tree = model.retriever.tree
        paths = [tree.route(v, barred=[(level, tree.route(v)[level - 1])]) for v in vectors]
        expected = recall(model, facts, paths=paths, progress=False)
        row = rows["best", level]
        assert row.accuracy.right == sum(expected.right) < first.accuracy.right
        known = [a for a, b in zip(expected.right, whole.right, strict=True) if b]
        assert (row.known.right, row.known.total, row.moved) == (sum(known), len(known), 8)
        same = rows["another", level]
        assert (same.accuracy, same.moved) == (first.accuracy, 0)
    for memory, name in (("none", "anchor"), ("generic", "generic")):
        found = recall(model, facts, memory, progress=False)
        assert rows[name, 0].accuracy.right == sum(found.right)


def test_another_cluster_is_never_the_own_one(model):
    paths = model.retriever.route_many(PROMPTS * 5)
    for level in (1, 2, 3):
        clusters = other_clusters(model, paths, level, seed=0)
        assert all(c != path[level - 1] for c, path in zip(clusters, paths, strict=True))
        assert withhold(model, PROMPTS * 5, level, clusters) == paths
        assert len(set(clusters)) > 1


def test_tasks_are_scored_with_the_best_cluster_withheld(model, tmp_path):
    rows = [{"context": prompt, "answer": "x", "aliases": []} for prompt in PROMPTS[:8]]
    data = data_of(Task("numbers", GENERATION, 0), tmp_path, rows)
    texts = {}
    for level in (0, 1):
        _, kept = run_task(model, data, tmp_path / str(level), "fetched", withheld=level)
        texts[level] = [row["text"] for row in kept]
    assert texts[0] != texts[1]
    (tmp_path / "both").mkdir()
    for level in (0, 1):
        run_task(model, data, tmp_path / "both", "fetched", withheld=level)
    assert len(list((tmp_path / "both" / "out").glob("numbers*"))) == 2


def test_the_command_shows_each_level(model_folder, tmp_path, capsys):
    command = [str(model_folder), "--atomic-numbers", "--limit", "5", "--out", str(tmp_path)]
    main([*command, "--block-best", "all", "--json"])
    (found,) = json.loads(capsys.readouterr().out)["blocking"]
    assert [row["level"] for row in found["rows"]] == [0, 3, 2, 1, 3, 2, 1, 0, 0]
    assert np.isclose(found["rows"][3]["withheld"], 1 / 3)
    main([*command, "--block-best", "1"])
    assert "best 1/3 withheld" in capsys.readouterr().out
    for levels, message in (("4", "no such level"), ("0.0625", "no list of levels")):
        refused(message, main, [*command, "--block-best", levels])
