"""Training blocks: lazy AdamW, the gradient of shared blocks, and that memory learns at all."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model
from mlx_hmem.config import KINDS, MemoryConfig
from tests.helpers.rank_worker import SEED, make_model
from tests.helpers.references import of_kind
from tests.helpers.stores import EOT
from train.recipe.recipe import TrainerConfig
from train.step.adamw import adamw, bias_corrections
from train.step.gradient import packed_mask
from train.step.loss import masked_loss
from train.step.memories import MemoryTrainee, generic_config
from train.store.blocks import BlockStore

VOCABULARY, CONTEXT = 32, 10
TABLE = MemoryConfig(hidden_size=8, num_hidden_layers=2, r=(4,), branching=(3,))
MEMORY = MemoryConfig(hidden_size=16, num_hidden_layers=2, r=(4, 0, 2), branching=(2, 2, 2))
BETAS = (0.9, 0.95)
OPEN: dict[str, Any] = {}


def path_of(leaf: int) -> list[int]:
    return [leaf // 4, leaf // 2, leaf]


@pytest.fixture(autouse=True)
def stores(tmp_path: Path) -> Iterator[None]:
    """What :func:`make_store` opens in a test, closed after it."""
    with contextlib.ExitStack() as stack:
        OPEN.update(stack=stack, folder=tmp_path)
        yield


def make_store(config: MemoryConfig, seed: int = SEED) -> BlockStore:
    """An empty store of its own."""
    folder = Path(tempfile.mkdtemp(dir=OPEN["folder"]))
    return OPEN["stack"].enter_context(BlockStore(folder, config, seed))


def make_trainee(leaves: list[int], **changes: float) -> MemoryTrainee:
    """One random sequence for each of ``leaves``, with some padding and document borders."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (len(leaves), CONTEXT + 1)).astype(np.uint16)
    tokens[1::2, 4] = EOT
    tokens[2::3, -3:] = EOT
    config = TrainerConfig(**changes)  # type: ignore[arg-type]
    paths = np.array([path_of(leaf) for leaf in leaves])
    return MemoryTrainee(make_model(), make_store(MEMORY), tokens, paths, EOT, config)


def randomise(trainee: MemoryTrainee) -> None:
    """Blocks that have an effect, as if trained before."""
    rng = np.random.default_rng(1)
    for level in trainee.levels:
        clusters = np.arange(MEMORY.num_clusters[level - 1])
        parts = trainee.store.gather(level, clusters, len(clusters))
        parts[0] = mx.array(rng.normal(0, 0.3, parts[0].shape), mx.float32)
        trainee.store.scatter(level, clusters, parts)


def copies(trainee: MemoryTrainee) -> dict[str, np.ndarray]:
    result = {}
    for level in trainee.levels:
        count = MEMORY.num_clusters[level - 1]
        names = ("weights", "first", "second", "steps")
        parts = trainee.store.gather(level, np.arange(count), count)
        result |= {f"level-{level}.{n}": np.array(p) for n, p in zip(names, parts, strict=True)}
    return result


def test_level_1_in_a_cache_without_room_trains_to_the_same_bits(tmp_path):
    leaves, states = [0, 7, 2, 5, 1, 6], []
    for name, options in (("a", {}), ("b", {"cache_level_1": True, "cache_bytes": 1})):
        trainee = make_trainee(leaves)
        with BlockStore(tmp_path / name, MEMORY, SEED, **options) as store:
            trainee.store = store
            for step in range(6):
                rows = np.arange(2) + step % 3 * 2
                trainee.step(rows, 0.01, (rows + 2) % 6)
            in_memory = sum(store.record_bytes(level) for level, _ in store._cache)
            assert (store._cached_bytes < in_memory) is (name == "a")
            states.append(copies(trainee))
    for name, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][name], name)


def test_for_sequences_of_one_subtree_no_block_of_another_is_gathered():
    """The gathers were padded for a batch of all subtrees: of the paper's bank 2.0 G parameters
    where 0.29 G do."""
    rows, sizes, states = np.array([0, 1, 3]), [], []
    for grouped in (False, True):
        trainee = make_trainee([0, 1, 5, 0, 6])
        randomise(trainee)
        gather, asked = trainee.store.gather, {}
        trainee.grouped = grouped
        trainee.turn_to(trainee.store, trainee.tokens, trainee.paths)
        trainee.store.gather = lambda level, clusters, size, asked=asked, gather=gather: (
            asked.update({level: size}) or gather(level, clusters, size)
        )
        trainee.step(rows, 0.01)
        trainee.store.gather = gather
        sizes.append(asked)
        states.append(copies(trainee))
    assert sizes == [{1: 2, 3: 3}, {1: 1, 3: 2}]
    for name, array in states[0].items():
        np.testing.assert_allclose(array, states[1][name], 1e-5, 1e-7, err_msg=name)


def lazy_step(store: BlockStore, clusters: np.ndarray, gradient: mx.array, rate: float) -> None:
    blocks = store.gather(1, clusters, len(clusters))
    corrections = bias_corrections(blocks[3], BETAS)
    store.scatter(1, clusters, adamw(blocks, gradient, mx.array(rate), corrections, BETAS, 0.1))


def test_lazy_adamw_with_every_block_touched_is_mlx_adamw():
    rng = np.random.default_rng(0)
    store, alone, clusters = make_store(TABLE), make_store(TABLE), np.arange(3)
    weights = {"blocks": store.gather(1, clusters, 3)[0]}
    reference = optim.AdamW(1.0, list(BETAS), weight_decay=0.1, bias_correction=True)
    for step in range(6):
        gradient, rate = mx.array(rng.normal(0, 10.0**-step, (3, 2, 3, 4, 8))), 0.1 / (step + 1)
        gradient = gradient.astype(mx.float32)
        lazy_step(store, clusters, gradient, rate)
        reference.learning_rate = rate
        weights = reference.apply_gradients({"blocks": gradient}, weights)
        found, *_, steps = map(np.array, store.gather(1, clusters, 3))
        np.testing.assert_allclose(found, np.array(weights["blocks"]), rtol=0, atol=1e-6)
    assert steps.tolist() == [6, 6, 6]
    # Block by block in other steps is the same again: a block knows only its own steps.
    rng = np.random.default_rng(0)
    gradients = [rng.normal(0, 10.0**-step, (3, 2, 3, 4, 8)) for step in range(6)]
    for cluster in (2, 0, 1):
        for step, gradient in enumerate(gradients):
            one = np.array([cluster])
            own = mx.array(gradient[one].astype(np.float32))
            lazy_step(alone, one, own, 0.1 / (step + 1))
    np.testing.assert_allclose(np.array(alone.gather(1, clusters, 3)[0]), found, rtol=0, atol=1e-6)


def test_start_values_follow_from_seed_level_and_cluster_alone():
    def blocks(level: int, count: int, seed: int) -> np.ndarray:
        config = MemoryConfig(8, 2, (4, 4), (2, count // 2) if level == 2 else (count, 2))
        return np.array(make_store(config, seed).gather(level, np.arange(count), count)[0])

    many = blocks(2, 6, seed=1)
    assert np.array_equal(blocks(2, 4, seed=1), many[:4])
    others = [*many, *blocks(1, 5, seed=1), *blocks(2, 6, seed=2)]
    assert len({block.tobytes() for block in others}) == 17
    assert not many[:, :, 2].any()  # down: no effect at the start


def test_a_block_that_no_sequence_chose_stays_as_it_is_bit_for_bit():
    trainee = make_trainee([0, 1, 5], weight_decay=0.5)
    randomise(trainee)
    trainee.step(np.array([0, 1, 2]), 1e-2)  # clusters 0 and 1 of level 1; 0, 1 and 5 of level 3
    before = copies(trainee)
    trainee.step(np.array([0, 1, 1]), 1e-2)
    after = copies(trainee)
    for level, touched, count in ((1, {0}, 2), (3, {0, 1}, 8)):
        for cluster in range(count):
            for name in ("weights", "first", "second", "steps"):
                old, new = (state[f"level-{level}.{name}"][cluster] for state in (before, after))
                assert np.array_equal(old, new) == (cluster not in touched), (level, cluster, name)
    assert after["level-1.steps"].tolist() == [2, 1]
    assert after["level-3.steps"].tolist() == [2, 2, 0, 0, 0, 1, 0, 0]
    assert not any(name.startswith("level-2") for name in after)  # r = 0


def direct_gradients(
    trainee: MemoryTrainee, rows: list[int]
) -> tuple[float, dict[tuple[int, int], np.ndarray]]:
    """Loss and gradients by (level, cluster), each sequence alone with the memory of its path."""
    model = make_model()
    slot = attach_memory(model, MEMORY)
    state, sums, loss_sum, count_sum = copies(trainee), {}, 0.0, 0.0

    def loss(first: mx.array, third: mx.array, batch: mx.array) -> mx.array:
        inputs = batch[:, :-1]
        with slot.using((mx.concatenate([first, third], axis=2),)):
            return masked_loss(model(inputs, mask=packed_mask(inputs, EOT)), batch, EOT)

    for row in rows:
        tokens, (top, _, leaf) = trainee.tokens[row], trainee.paths[row]
        count = float(np.sum((tokens[:-1] != EOT) | (tokens[1:] != EOT)))
        blocks = [mx.array(state[f"level-{n}.weights"][c]) for n, c in ((1, top), (3, leaf))]
        batch = mx.array(tokens[None].astype(np.int32))
        value, gradients = mx.value_and_grad(loss, argnums=(0, 1))(*blocks, batch)
        loss_sum, count_sum = loss_sum + count * value.item(), count_sum + count
        for key, gradient in zip(((1, int(top)), (3, int(leaf))), gradients, strict=True):
            sums[key] = sums.get(key, 0) + count * np.array(gradient)
    return loss_sum / count_sum, {key: total / count_sum for key, total in sums.items()}


@pytest.mark.parametrize("leaves", [[0, 1, 6, 1], [2, 2, 2, 2], [0, 2, 4, 6]])
def test_the_gradient_of_a_shared_block_is_the_sum_over_its_sequences(leaves):
    """Also with fewer unique blocks than sequences: what fills them up changes nothing."""
    trainee = make_trainee(leaves, grad_clip=1e9, beta1=0.5)
    randomise(trainee)
    loss, gradients = direct_gradients(trainee, [0, 1, 2, 3])
    value, norm = trainee.step(np.arange(4), 1e-2)
    assert value == pytest.approx(loss, rel=1e-5)
    direct_norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    assert norm == pytest.approx(direct_norm, rel=1e-4)
    state = copies(trainee)
    assert {(1, leaf // 4) for leaf in leaves} | {(3, leaf) for leaf in leaves} == set(gradients)
    for (level, cluster), gradient in gradients.items():
        # From zero, the first moment after one step is (1 - beta1) times the gradient.
        found = state[f"level-{level}.first"][cluster] / 0.5
        np.testing.assert_allclose(found, gradient, rtol=1e-3, atol=1e-6)
        assert np.abs(gradient).max() > 1e-3


def test_the_gradient_is_clipped_to_its_norm_over_all_blocks():
    trainee, free = (make_trainee([0, 5], grad_clip=clip) for clip in (0.01, 1e9))
    for each in (trainee, free):
        randomise(each)
    norms = [each.step(np.arange(2), 1e-2)[1] for each in (trainee, free)]
    assert norms[0] == norms[1] > 0.1  # before clipping
    for name, first in copies(trainee).items():
        if name.endswith(".first"):
            wanted = copies(free)[name] * (0.01 / norms[0])
            np.testing.assert_allclose(first, wanted, rtol=1e-3, atol=1e-9)


# One prompt with an answer that depends on the cluster: no generic memory can know it.
PROMPT, ANSWERS = [EOT, 5, 6, 7], [11, 12, 13, 14, 15, 16, 17, 18]


def answer_losses(generic: bool) -> tuple[list[float], MemoryTrainee, Model]:
    """Losses of 150 steps on ``PROMPT`` + the answer of the sequence's leaf, nats per answer."""
    model = make_model()
    model.model.norm.weight = model.model.norm.weight * 4  # else no logit could be large enough
    tokens = np.array([[*PROMPT, a, EOT, EOT] for a in ANSWERS], np.uint16)
    config, paths = MEMORY, np.array([path_of(leaf) for leaf in range(8)])
    if generic:
        config, paths = generic_config(MEMORY), np.zeros((8, 1), np.int32)
    training = TrainerConfig(weight_decay=1e-3)
    trainee = MemoryTrainee(model, make_store(config), tokens, paths, EOT, training)
    # 5 targets count: the prompt's three, the answer, the end. Only the answer is uncertain.
    losses = [5 * trainee.step(np.arange(8), 2e-2)[0] for _ in range(150)]
    return losses, trainee, model


def test_fetched_memory_learns_what_generic_memory_cannot():
    fetched, generic = answer_losses(generic=False)[0], answer_losses(generic=True)[0]
    assert fetched[0] == pytest.approx(generic[0], rel=1e-5)  # both start without effect
    assert fetched[-1] < 0.1
    assert np.log(8) - 1e-3 < generic[-1] < generic[0] / 5  # the rest, but not the answer


def test_the_anchor_is_not_trained_and_generic_memory_has_a_fetched_ones_size():
    _, trainee, model = answer_losses(generic=False)
    untouched = named_parameters(make_model())
    untouched["model.norm.weight"] *= 4
    for name, array in named_parameters(model).items():
        assert np.array_equal(np.array(array), np.array(untouched[name])), name
    assert all((copies(trainee)[f"level-{level}.steps"] == 150).all() for level in (1, 3))
    generic = generic_config(MEMORY)
    assert generic.block_shape(1) == (2, 3, 6, 16)
    assert generic.fetched_parameters == MEMORY.fetched_parameters


@pytest.mark.parametrize("layers", ["all", "first 1"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_and_starts_from_the_anchors_own_loss(kind, layers):
    model = make_model()
    config = memory_config(model, MEMORY.r, MEMORY.branching, **of_kind(kind)).placed(layers)
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (4, CONTEXT + 1)).astype(np.uint16)
    batch = mx.array(tokens.astype(np.int32))
    alone = masked_loss(model(batch[:, :-1]), batch, EOT).item()
    paths = np.array([path_of(leaf) for leaf in (0, 1, 5, 7)])
    training = TrainerConfig(weight_decay=0.0)
    trainee = MemoryTrainee(model, make_store(config), tokens, paths, EOT, training)
    losses = [trainee.step(np.arange(4), 3e-2)[0] for _ in range(30)]
    assert losses[0] == pytest.approx(alone, rel=1e-5)
    assert losses[-1] < 0.95 * losses[0]
    assert all(np.isfinite(losses))


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_learns_at_its_share_of_the_rate(kind):
    """What begins as zeros writes; without a rate the rest stays, whatever the kind calls it."""
    config = memory_config(make_model(), MEMORY.r, MEMORY.branching, **of_kind(kind))
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (4, CONTEXT + 1)).astype(np.uint16)
    paths = np.array([path_of(leaf) for leaf in (0, 1, 5, 7)])
    moved = {}
    for share in (None, 0.0, 0.5):
        store = make_store(config)
        training = TrainerConfig(weight_decay=0.1, reading_rate=share)
        trainee = MemoryTrainee(make_model(), store, tokens, paths, EOT, training)
        before = np.array(store.gather(1, np.arange(2), 2)[0])
        for _ in range(2):  # while B is zero A has no gradient
            trainee.step(np.arange(4), 1e-2)
        moved[share] = np.abs(np.array(store.gather(1, np.arange(2), 2)[0]) - before)
    reads, writes = moved[None][before != 0], moved[None][before == 0]
    assert reads.max() > 0
    assert writes.max() > 0
    assert moved[0.0][before != 0].max() == 0
    assert moved[0.5][before == 0].max() > 0
    assert 0.3 < moved[0.5][before != 0].mean() / reads.mean() < 0.7
