"""A quantised bank whose blocks stay packed, as on a GPU, says what it says where they are made
floats, as on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import pytest

from mlx_hmem.bank import Quantization
from mlx_hmem.generation.batch import BatchModel
from mlx_hmem.memory.packed import Packed
from tests.generation.test_batch import ROWS, make_model, prompt, run_in_turns, says

BANKS = {
    "alike": [Quantization(level, "affine", 4, 32) for level in (0, 1, 3)],
    "mixed": [Quantization(1, "affine", 8, 32), Quantization(3, "mxfp4", 4, 32)],
    "partly": [Quantization(3, "affine", 4, 32)],
}
PATHS = [(0, 1, 2), (0, 1, 3), (1, 3, 7)]
each_bank = pytest.mark.parametrize("bank", BANKS)
each_kind = pytest.mark.parametrize("kind", ["ffn", "lora_qk", "kv"])


@contextmanager
def staying_packed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_hmem.memory.packed.stays_packed", lambda: True)
        yield


@each_bank
@each_kind
def test_a_memory_says_the_same_packed_and_as_floats(bank, kind, tmp_path):
    model = make_model("openlm", kind, tmp_path, quantization=BANKS[bank])
    first, second, _ = PATHS
    ids = mx.array([prompt(2)] * len(PATHS))

    def another_topic():
        before = model.fetch_path(second, wait=False)
        before.rows.wait()
        return model.fetch_path(first, wait=False, before=before).rows

    ways = {
        "fetched": lambda: model.fetch_path(first).rows,
        "generic": lambda: model.fetch_path(None).rows,
        "arriving layer by layer": lambda: model.fetch_path(first, wait=False).rows,
        "another topic": another_topic,
        "without a level": lambda: model.fetch_path(first, blocked=[first]).rows,
        "one for each row": lambda: model.rows_of([model.bank.fetch(path) for path in PATHS]),
    }
    for way, make in ways.items():
        floats = model.with_rows(make())(ids)
        mx.eval(floats)
        with staying_packed():
            rows = make()
            packed = model.with_rows(rows)(ids)
        if bank == "alike":
            a_group = rows[0] if isinstance(rows, tuple) else rows[0][0]
            assert isinstance(a_group, Packed), way
        assert mx.allclose(packed, floats, rtol=1e-4, atol=1e-4).item(), way


@each_bank
@each_kind
def test_rows_with_packed_memories_join_and_leave(bank, kind, tmp_path):
    model = make_model("openlm", kind, tmp_path, quantization=BANKS[bank])
    with staying_packed():
        run = run_in_turns(model, list(range(len(ROWS))))
    assert run.most_rows > 2
    for i, tokens in run.tokens.items():
        assert says(model, prompt(i), tokens, ROWS[i][2]) == tokens


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_of_a_batch_is_held_as_it_is_multiplied(packed, tmp_path, monkeypatch):
    """As floats on a CPU, or each join of its rows would make them anew."""
    monkeypatch.setattr("mlx_hmem.memory.packed.stays_packed", lambda: packed)
    model = make_model("openlm", "ffn", tmp_path, quantization=BANKS["alike"])
    batch = BatchModel(model)
    for memory in batch.hold(batch.make_cache(PATHS[0])).values():
        ((group,),) = memory.stored
        assert isinstance(group, Packed if packed else mx.array)
