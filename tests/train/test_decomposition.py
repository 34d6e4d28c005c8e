"""Dataset decomposition: the pieces are the documents, batches hold as many tokens each, and a run
on them learns what the documents alone would teach."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from tests.helpers.faults import stop_at
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused
from train.data.buckets import SMALLEST, Buckets, decompose, lengths, padding_of
from train.data.order import BucketOrder
from train.data.sequences import run_anchor_sequences
from train.data.tokenizer import load_tokenizer, train_tokenizer
from train.data.windows import Windows
from train.loop.arms import anchor_sequences
from train.loop.loop import train
from train.ranks import ALONE
from train.recipe.recipe import Recipe, TrainerConfig, WindowsSection
from train.step.anchor import AnchorTrainee, initialise
from train.step.gradient import BatchGradient
from train.step.loss import masked_loss
from train.store.checkpoint import CHECKPOINT

EOT, VOCABULARY, CONTEXT = 0, 300, 128
ARGS = ModelArgs("openlm", 16, 2, 24, 2, 8, VOCABULARY, tie_word_embeddings=True)
TRAINING = TrainerConfig(
    epochs=2, batch_size=2, micro_batch_size=1, learning_rate=1e-2, warmup_steps=2, save_every=4
)
LENGTHS = [1, 5, 31, 32, 33, 64, 100, 127, 128, 129, 200, 255, 256, 300, 384, 500, 40, 40, 90, 70]


def documents_of(sizes: list[int], begin: tuple[int, ...] = (EOT,)) -> Windows:
    """Documents of these sizes, of tokens that no other has in that order."""
    random = np.random.default_rng(len(sizes))
    parts = [[*begin, *random.integers(2, VOCABULARY, n)] for n in sizes]
    offsets = np.cumsum([0, *map(len, parts)])
    return Windows(np.concatenate(parts).astype(np.uint16), offsets, begin)


def buckets_of(sizes: list[int] = LENGTHS) -> Buckets:
    return Buckets(decompose(documents_of(sizes), CONTEXT))


def model_of(seed: int = 3) -> Model:
    model = Model(ARGS)
    initialise(model, seed)
    return model


def put_together(pieces: dict[int, np.ndarray], sizes: list[int]) -> list[np.ndarray]:
    """The documents, each with the EOT after it: from every bucket as many pieces as binary digits
    say, largest first; one token stands in two neighbours."""
    taken, found = dict.fromkeys(pieces, 0), []
    for size in sizes:
        parts, left = [], size
        for length in sorted(pieces, reverse=True):
            count = left // length if length > min(pieces) else -(-left // length)
            rows = pieces[length][taken[length] : taken[length] + count]
            taken[length], left = taken[length] + count, left - count * length
            for row in rows:
                assert not parts or parts[-1][-1] == row[0]
                parts.append(row)
        document = np.concatenate([parts[0][:1], *(part[1:] for part in parts)])
        assert (document[size + 1 :] == EOT).all()
        found.append(document[: size + 1])
    assert taken == {length: len(rows) for length, rows in pieces.items()}
    return found


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 700), min_size=1, max_size=20),
    context=st.sampled_from([8, 32, 64, 256]),
    begin=st.sampled_from([(EOT,), (EOT, 1)]),
)
def test_the_pieces_of_a_document_are_the_document(sizes, context, begin):
    documents = documents_of(sizes, begin)
    pieces = decompose(documents, context)
    assert list(pieces) == lengths(context)
    assert min(pieces) == min(SMALLEST, context)
    assert all(rows.shape[1] == length + 1 for length, rows in pieces.items())
    assert all(rows.dtype == np.uint16 for rows in pieces.values())
    own = [documents[i] for i in range(len(documents))]
    for found, wanted in zip(put_together(pieces, [len(d) for d in own]), own, strict=True):
        assert np.array_equal(found, [*wanted, EOT])
    # Every token is a target once, and so is the EOT after each document; no more than that.
    counted = [(r[:, :-1] != EOT) | (r[:, 1:] != EOT) for r in pieces.values()]
    targets = [r[:, 1:][c] for r, c in zip(pieces.values(), counted, strict=True)]
    wanted_targets = [*(token for document in own for token in document[1:]), *[EOT] * len(own)]
    assert sorted(np.concatenate(targets)) == sorted(wanted_targets)
    # One document a row: an EOT is its first token, or the padding and end of the last one.
    for rows in pieces.values():
        inner = rows[:, 1:] == EOT
        assert (inner[:, 1:] >= inner[:, :-1]).all()
    padded = len(own) * min(pieces)
    assert padding_of(pieces.values(), EOT) * sum(r[:, 1:].size for r in pieces.values()) < padded


def test_batches_are_of_one_bucket_and_of_as_many_tokens_each():
    buckets, seen = buckets_of(), []
    order = BucketOrder(buckets.counts, TRAINING, seed=1)
    tokens = sum(length * n for length, n in buckets.counts.items())
    assert order.num_steps == 2 * (tokens // CONTEXT) // 2
    for step in range(order.num_steps):
        batch = order.batch(step)
        assert (batch.step, batch.num_steps) == (step, order.num_steps)
        rows = buckets[batch.rows]
        assert rows[:, 1:].size == TRAINING.batch_size * CONTEXT
        seen += [(rows.shape[1] - 1, i) for i in batch.rows.tolist()]
    assert (
        order.batch(order.num_steps).rows.tolist() == order.batch(order.num_steps - 1).rows.tolist()
    )
    # Each bucket by its share of the tokens, and mixed.
    for length, count in buckets.counts.items():
        of_length = [i for own, i in seen if own == length]
        assert abs(len(of_length) * length - 2 * count * length) <= TRAINING.batch_size * CONTEXT
        assert np.ptp(np.unique(of_length, return_counts=True)[1]) <= 1  # pass after pass
    assert len({own for own, _ in seen[: len(seen) // 2]}) == len(buckets.counts)


def test_the_order_follows_from_seed_and_step_alone_and_empty_buckets_get_none():
    def rows(step: int, seed: int = 1, **changes: int) -> list[int]:
        order = BucketOrder(buckets_of().counts, replace(TRAINING, **changes), seed)
        return order.batch(step).rows.tolist()

    order = BucketOrder(buckets_of().counts, TRAINING, 1)
    whole = [order.batch(step).rows.tolist() for step in range(order.num_steps)]
    assert [rows(step) for step in reversed(range(len(whole)))] == whole[::-1]
    assert [rows(step, seed=2) for step in range(len(whole))] != whole
    assert order.identity != BucketOrder({128: 9, 64: 3}, TRAINING, 1).identity
    steps = BucketOrder(buckets_of().counts, replace(TRAINING, steps=7), 1)
    assert (steps.num_steps, sum(steps.steps_of.values())) == (7, 7)
    refused("nothing to train on", BucketOrder, {128: 0, 64: 0}, TRAINING, 1)
    order = BucketOrder({128: 0, 64: 20, 32: 0}, TRAINING, 1)
    rows = [order.batch(step).rows for step in range(order.num_steps)]
    assert all(len(own) == 4 and own.max() < 20 for own in rows)


def test_the_loss_of_a_piece_is_that_of_the_documents_same_tokens_alone():
    """Those of the piece's first tokens too: nothing before it is seen."""
    model, sizes = model_of(), [77, 150, 20]
    documents, buckets = documents_of(sizes), buckets_of(sizes)
    first, second = np.array([*documents[0], EOT]), np.array([*documents[1], EOT])
    tails = {(0, 64): first[:65], (0, 78): first[64:], (1, 128): second[:129]}
    tails |= {(1, 151): second[128:], (2, 21): np.array([*documents[2], EOT])}

    def loss(tokens: np.ndarray) -> float:
        batch = mx.array(tokens.astype(np.int32))[None]
        return masked_loss(model(batch[:, :-1]), batch, EOT).item()

    wanted, weights = sorted(map(loss, tails.values())), named_parameters(model)
    gradient = BatchGradient(
        model, None, EOT, TrainerConfig(batch_size=1, document_mask=False), ALONE
    )
    found = [
        gradient({"anchor": weights, "blocks": []}, buckets[np.array([i])])[0]
        for i in range(len(buckets))
    ]
    assert sorted(found) == pytest.approx(wanted, rel=1e-5)


def test_training_needs_no_mask_where_rows_hold_one_document():
    """The same loss, norm and update as with the mask of packed documents, in parts or whole."""
    buckets, results = buckets_of(), []
    rows = BucketOrder(buckets.counts, TRAINING, 1).batch(3).rows
    for tokens, part in ((buckets, 1), (buckets, None), (np.stack([*buckets[rows]]), None)):
        config = replace(TRAINING, micro_batch_size=part)
        trainee = AnchorTrainee(model_of(), tokens, EOT, config)
        own = rows if tokens is buckets else np.arange(len(rows))
        figures = trainee.step(own, 1e-2)
        weights = [np.array(w) for _, w in tree_flatten(trainee.model.parameters())]
        results.append((figures, weights))
    for figures, weights in results[1:]:
        assert figures == pytest.approx(results[0][0], rel=1e-5)
        for one, other in zip(weights, results[0][1], strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


def test_a_run_that_was_stopped_equals_a_whole_one(tmp_path, monkeypatch):
    def run(folder: Path) -> None:
        buckets = buckets_of()
        order = BucketOrder(buckets.counts, TRAINING, seed=1)
        assert order.num_steps > 12
        train(AnchorTrainee(model_of(), buckets, EOT, TRAINING), order, TRAINING, folder, "anchor")

    run(tmp_path / "whole")
    stop_at(monkeypatch, AnchorTrainee, "step", 7, 14)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped")
    run(tmp_path / "stopped")
    whole, stopped = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "stopped")
    for name in (CHECKPOINT, "loss.jsonl"):
        assert whole[name] == stopped[name]


def test_the_stage_writes_buckets_of_whole_documents(tmp_path, capsys):
    texts = [f"Town {i} lies on a river" + " and has more people" * i for i in range(40)]
    train_tokenizer(texts, VOCABULARY, tmp_path / "tokenizer")
    (tmp_path / "corpus").mkdir()
    lines = "".join(f'{{"text": "{text}"}}\n' for text in texts)
    (tmp_path / "corpus" / "train.jsonl").write_text(lines)
    recipe = Recipe(name="t", windows=WindowsSection(32, anchor_context=64, decompose=True))
    run_anchor_sequences(recipe, tmp_path)
    tokens, order = anchor_sequences(recipe, tmp_path, TRAINING)
    assert isinstance(tokens, Buckets)
    assert isinstance(order, BucketOrder)
    assert f"{tokens.counts[64]} of 64, {tokens.counts[32]} of 32 tokens" in capsys.readouterr().out
    processor = load_tokenizer(tmp_path)
    sizes = [1 + len(processor.encode(text)) for text in texts]
    whole = put_together(tokens.pieces, sizes)
    assert [processor.decode(w[1:-1].tolist()) for w in whole] == texts


def test_a_bucket_may_be_empty_and_a_context_that_does_not_halve_is_refused(tmp_path):
    for length, pieces in buckets_of([20, 40]).pieces.items():
        np.save(tmp_path / f"tokens-{length}.npy", pieces)
    again = Buckets.load(tmp_path, CONTEXT)
    assert again.counts == {128: 0, 64: 0, 32: 3}
    assert again.shape == (3, 129)
    refused(r"power of two: 96; set .* 128", WindowsSection, 96, decompose=True)
