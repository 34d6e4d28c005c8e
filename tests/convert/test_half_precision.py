"""Bundles of anchors in bfloat16 and float16: what is recorded computes in that dtype alone, and
gives what float32 gives but for its roundings."""

import mlx.core as mx
import pytest

from convert.bundle.functions import Functions
from mlx_hmem import load
from tests.convert.test_bundle import make_bundle
from tests.helpers.dtypes import (
    FORWARD,
    HALVES,
    UNIT,
    as_on_metal,
    distance,
    shapes_in_other_floats,
)
from tests.helpers.graphs import traced
from tests.helpers.tiny_anchors import HIDDEN
from tests.model.test_half_precision import half_model

CASES = [("llama", "ffn", "float32"), ("gemma3_text", "kv", None), ("qwen3", "lora_ffn", "float16")]


every = pytest.mark.parametrize(("name", "kind", "bank"), CASES)
both = pytest.mark.parametrize("dtype", HALVES, ids=str)


def about_zero(logits: mx.array) -> mx.array:
    """Logits, or log-probabilities, less their mean: the two are the same then."""
    wide = logits.astype(mx.float32)
    return wide - wide.mean()


@both
@every
def test_a_bundle_is_as_near_to_float32_as_its_roundings(
    name, kind, bank, dtype, model_folder, tmp_path
):
    given = (dtype, name, kind, bank, None)
    folder = half_model(model_folder, tmp_path / "half", *given)
    opened = make_bundle(folder, tmp_path / "out", "--context", 32, "--prefill", 8)
    own = str(dtype).rpartition(".")[2]
    assert {array["dtype"] for array in opened.about["cache"] + opened.about["rows"]} == {own}
    # Its log-probabilities, after a prompt and a token.
    wide = load(half_model(model_folder, tmp_path / "wide", *given, wide=True))
    ids, path = [5, 6, 7, 8, 9], (0, 1, 2)
    blocks = [(level, path[level - 1]) for level in (1, 3)]
    rows = opened.attach(blocks)
    cache = [mx.zeros(c["shape"], getattr(mx, c["dtype"])) for c in opened.about["cache"]]
    inputs = [mx.array([ids[:-1] + [0] * 4], mx.int32), mx.array(0, mx.int32), *cache]
    num_rows = rows[0].shape[2]
    call = (*rows, *opened.weights)
    cache = opened.call([*inputs, *call], 8, kind="prefill", num_tokens=8, num_rows=num_rows)
    inputs = [mx.array([ids[-1:]], mx.int32), mx.array(4, mx.int32), *cache]
    found, *_ = opened.call([*inputs, *call], 5, kind="decode", num_rows=num_rows)
    assert found.dtype == dtype
    wanted, alone = wide(mx.array([ids]), [path]), wide(mx.array([ids]), memory="none")
    found, wanted, alone = map(about_zero, (found, wanted[:, -1], alone[:, -1]))
    most = FORWARD * UNIT[dtype]
    assert distance(found, wanted) <= most
    assert distance(alone, wanted) > 2 * most


@both
@every
def test_what_is_recorded_computes_in_the_dtype_of_the_anchor(
    name, kind, bank, dtype, model_folder, tmp_path
):
    model = load(half_model(model_folder, tmp_path / "half", dtype, name, kind, bank, None))
    functions = Functions(model, 32, [8])
    for function in (functions.step("decode", 1, 6), functions.step("prefill", 8, 6)):
        with as_on_metal():
            steps = traced(function.traced, *function.inputs)
        found = shapes_in_other_floats(steps, dtype)
        clipped = (name, dtype) == ("gemma3_text", mx.float16)
        length = function.inputs[0].shape[1]
        assert found <= ({("float32", (1, length, HIDDEN), False)} if clipped else set())
