"""The order of the data: which batches come when, and what those of one subtree save in reads."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from tests.helpers.programs import refused
from train.data.order import Order, ShuffledOrder, SubtreeOrder
from train.loop.loop import train
from train.recipe.recipe import TrainerConfig
from train.step.anchor import initialise
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore
from train.store.records import RecordStore

TRAINING = TrainerConfig(epochs=2.5, batch_size=4)
CLUSTERS = np.random.default_rng(0).permutation(np.repeat([0, 1, 3, 4], [40, 21, 2, 90]))


def order_of(subtree: int | None = None, training: TrainerConfig = TRAINING) -> SubtreeOrder:
    return SubtreeOrder(CLUSTERS, training, 7, subtree)


def batches(order: Order) -> list[tuple[list[int], int, int]]:
    found = [order.batch(step) for step in range(order.num_steps)]
    return [(batch.rows.tolist(), batch.step, batch.num_steps) for batch in found]


def test_an_epoch_is_a_permutation_that_follows_from_the_seed():
    def rows(step: int, size: int, seed: int = 1) -> np.ndarray:
        return ShuffledOrder(12, TrainerConfig(batch_size=size), seed).batch(step).rows

    order = ShuffledOrder(12, TrainerConfig(batch_size=3), seed=1)
    epochs = [np.concatenate([order.batch(4 * e + i).rows for i in range(4)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])
    # The same stream whatever the batch, also for one who comes in later.
    assert np.array_equal(rows(2, 12), epochs[2])
    assert np.array_equal(rows(1, 5), np.concatenate(epochs)[5:10])
    assert not np.array_equal(rows(0, 12, seed=2), epochs[0])


def test_the_number_of_steps_counts_whole_batches_and_about_as_many_where_grouped():
    assert TrainerConfig(epochs=1.5, batch_size=4).num_steps(10) == 3
    assert TrainerConfig(epochs=0.1, batch_size=4).num_steps(1) == 1
    steps = TRAINING.num_steps(len(CLUSTERS))
    assert abs(order_of().num_steps - steps) <= 4


def test_a_batch_is_of_one_cluster_and_a_cluster_has_its_own_steps_and_schedule():
    order = order_of()
    assert order.steps_of == {0: 25, 1: 13, 3: 1, 4: 56}  # 2 has no sequences
    assert order.num_steps == 95
    seen: dict[int, list[int]] = {c: [] for c in order.steps_of}
    for step, (rows, own, num_steps) in enumerate(batches(order)):
        cluster, place = order.place(step)
        assert set(CLUSTERS[rows]) == {cluster}
        assert (own, num_steps) == (place, order.steps_of[cluster])
        assert own == len(seen[cluster])  # its steps come in their own order
        seen[cluster].append(own)
    assert {c: len(steps) for c, steps in seen.items()} == order.steps_of


@pytest.mark.parametrize("cluster", [0, 1, 3, 4])
def test_a_cluster_alone_has_the_batches_that_it_has_among_the_others(cluster: int):
    whole, apart = order_of(), order_of(cluster)
    mixed = [b for i, b in enumerate(batches(whole)) if whole.place(i)[0] == cluster]
    assert batches(apart) == mixed
    assert whole.identity == apart.identity | {"subtree": None}
    # Whoever begins in the middle sees the same.
    assert [order_of(cluster).batch(len(mixed) - 1).rows.tolist()] == [mixed[-1][0]]


def test_each_pass_of_a_cluster_is_a_permutation_of_its_sequences_and_follows_from_the_seed():
    rows = np.concatenate([rows for rows, _, _ in batches(order_of(0))])
    own = np.flatnonzero(CLUSTERS == 0).tolist()
    first, second = rows[:40].tolist(), rows[40:80].tolist()
    assert sorted(first) == sorted(second) == own
    assert len({tuple(first), tuple(second), tuple(own)}) == 3
    other = SubtreeOrder(CLUSTERS, TRAINING, 8, 0)
    assert batches(other) != batches(order_of(0))


def test_every_cluster_is_spread_over_the_whole_run():
    order = order_of()
    places: dict[int, list[int]] = {c: [] for c in order.steps_of}
    for step in range(order.num_steps):
        places[order.place(step)[0]].append(step)
    for cluster in (0, 1, 4):
        steps = np.array(places[cluster])
        wanted = (np.arange(len(steps)) + 0.5) / len(steps)
        # A part of the run is 1/13 long at most; the others' steps move it a little.
        assert np.abs((steps + 0.5) / order.num_steps - wanted).max() < 1 / 13
    # In no fixed turn.
    assert len(set(np.diff(places[4]).tolist())) > 1


def test_the_step_after_the_last_is_the_last_and_other_arms_see_the_same_sequences():
    order = order_of()
    assert order.batch(95).rows.tolist() == order.batch(94).rows.tolist()
    refused("nothing to train on", order_of, 2)
    refused("nothing to train on", ShuffledOrder, 0, TRAINING, 0)
    order = order_of()
    rows = [rows for rows, _, _ in batches(order)]
    one = SubtreeOrder(CLUSTERS, TRAINING, 7, one_schedule=True)
    assert batches(one) == [(r, i, 95) for i, r in enumerate(rows)]


def test_batches_by_subtree_read_and_write_fewer_deep_blocks(tmp_path, monkeypatch):
    config = MemoryConfig(hidden_size=8, num_hidden_layers=1, r=(2, 2), branching=(16, 4))
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, (512, 9)).astype(np.uint16)
    leaves = rng.permutation(np.repeat(np.arange(64), 8))
    paths = np.stack([leaves // 4, leaves], axis=1)
    training = TrainerConfig(epochs=4, batch_size=16, warmup_steps=2)
    counts: Counter[str] = Counter()
    read, write = RecordStore.read, RecordStore.write

    def counted_read(self: RecordStore, name: bytes, *rest: Any, **more: Any) -> bool:
        counts["read"] += name[5] == 2  # level
        return read(self, name, *rest, **more)

    def counted_write(self: RecordStore, records: Any) -> None:
        records = list(records)
        counts["write"] += sum(name[5] == 2 for name, _ in records)
        write(self, records)

    monkeypatch.setattr(RecordStore, "read", counted_read)
    monkeypatch.setattr(RecordStore, "write", counted_write)

    def traffic(name: str, order: Order) -> tuple[int, int]:
        counts.clear()
        model = Model(ModelArgs("openlm", 8, 1, 8, 1, 8, 32, tie_word_embeddings=True))
        initialise(model, 0)
        cache = 12 * (12 * 3 * 2 * 8 + 4)  # twelve of the 64 blocks of level 2
        with BlockStore(tmp_path / name, config, 0, cache) as store:
            trainee = MemoryTrainee(model, store, tokens, paths, 0, training)
            train(trainee, order, training, tmp_path / name, name)
        return counts["read"], counts["write"]

    shuffled, grouped = ShuffledOrder(512, training, 0), SubtreeOrder(paths[:, 0], training, 0)
    assert shuffled.num_steps == grouped.num_steps == 128
    reads, writes = traffic("shuffled", shuffled)
    grouped_reads, grouped_writes = traffic("grouped", grouped)
    print(f"reads {reads} → {grouped_reads}, writes {writes} → {grouped_writes}")
    assert grouped_reads < 0.6 * reads
    assert grouped_writes < 0.6 * writes
    # One subtree after the other: its four blocks stay.
    apart = [traffic(f"apart-{n}", SubtreeOrder(paths[:, 0], training, 0, n)) for n in range(4)]
    assert sum(reads for reads, _ in apart) == 16
