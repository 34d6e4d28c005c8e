"""Anchors in bfloat16 and float16, as a Mac runs them: what is added to a half-precision stream is
of its dtype, and no further from float32 than its roundings."""

import itertools

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem.anchors.architectures import head_of
from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.fused import FusedMemory
from mlx_hmem.memory import stack_rows
from tests.helpers import dtypes
from tests.helpers.dtypes import FAST, FORWARD, HALVES, UNIT, as_on_metal, distance, half_anchor
from tests.helpers.graphs import leading_to
from tests.helpers.references import PAIRS, config_of, make_ids, random_rows
from tests.helpers.tiny_anchors import HIDDEN

both = pytest.mark.parametrize("dtype", HALVES, ids=str)
# All kinds, and architectures that differ in what memory joins; experts know float32 only on a CPU.
CASES = [("openlm", "ffn"), ("openlm", "kv"), ("llama", "lora_qk"), ("gemma3_text", "ffn")]
CASES += [("gemma3_text", "kv"), ("qwen3", "lora_ffn"), ("phi3", "lora"), ("gpt2", "lora_vo")]
# Of architectures that share their code, one.
TRACED = [pair for pair in PAIRS if pair[0] not in ("mistral", "smollm3")]
# mlx-lm clips Gemma's residual sums to the range of float16: added, clipped and rounded in one.
CLIPPED = {("float32", (2, length, HIDDEN), False) for length in (1, 9)}


def test_what_stands_in_for_a_kernel_gives_its_dtype():
    floats = (*HALVES, mx.float32)
    for a, b in itertools.product(floats, floats):
        x, w, four = mx.ones((1, 8), a), mx.ones(8, b), mx.ones((1, 2, 3, 4), a)
        options = {"dims": 4, "traditional": False, "base": None, "scale": 1.0, "offset": 0}
        options["freqs"] = mx.ones(2, b)
        given = {
            "rms_norm": ((x, w, 1e-5), {}),
            "layer_norm": ((x, w, w, 1e-5), {}),
            "rope": ((four,), options),
            "scaled_dot_product_attention": ((four, four.astype(b), four), {"scale": 1.0}),
        }
        for stand_in in FAST:
            arguments, named = given[stand_in.__name__]
            real = getattr(mx.fast, stand_in.__name__)(*arguments, **named)
            assert stand_in(*arguments, **named).dtype == real.dtype, stand_in.__name__
        assert dtypes.softmax(x).dtype == mx.softmax(x, precise=True).dtype


@pytest.mark.parametrize(("name", "kind"), TRACED)
def test_a_half_precision_anchor_computes_in_its_dtype_alone(name, kind):
    """A prompt and a token behind it, with a memory for all rows and one for each."""
    ids = make_ids()
    for dtype in HALVES:
        anchor = half_anchor(name, dtype)
        config = config_of(anchor, kind)
        slot = attach_memory(anchor, config)
        one = tuple(group.astype(dtype) for group in random_rows(config, 0))
        two = stack_rows([one, one])
        mx.eval(ids, one, two)
        for rows in (one, two):
            with as_on_metal(), slot.using(rows):
                cache = make_prompt_cache(anchor)
                steps = leading_to(anchor(ids, cache=cache), anchor(ids[:, :1], cache=cache))
            allowed = CLIPPED if (name, dtype) == ("gemma3_text", mx.float16) else set()
            assert dtypes.shapes_in_other_floats(steps, dtype) == allowed


@both
@pytest.mark.parametrize("name", ["openlm", "gemma3_text"])
@pytest.mark.parametrize(("bits", "mode", "group"), [(4, "affine", 32), (4, "mxfp4", 32)])
def test_some_outputs_of_a_quantised_head_are_in_its_dtype(name, bits, mode, group, dtype):
    """MLX dequantises to bfloat16 where a mode has no scales of the anchor's dtype."""
    anchor, hidden = half_anchor(name, dtype), mx.ones((2, HIDDEN), dtype)
    nn.quantize(anchor, group, bits, mode=mode)
    mx.eval(hidden, anchor.parameters())
    logits = head_of(anchor, mx.array([3, 1, 4]))(hidden)
    assert logits.dtype == dtype
    assert distance(logits, head_of(anchor)(hidden)[:, [3, 1, 4]]) <= 2 * UNIT[dtype]


@both
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_memory_in_half_precision_is_as_near_to_float32_as_its_roundings(name, kind, dtype):
    """Attached for all rows, attached to each, and fused."""
    ids, found = make_ids(), []
    for wide in (True, False):
        anchor = half_anchor(name, dtype, wide)
        config = config_of(anchor, kind)
        # As a bank has it: the anchor's own numbers, in float32.
        rows = tuple(group.astype(dtype).astype(mx.float32) for group in random_rows(config, 0))
        slot = attach_memory(anchor, config)
        found.append(anchor(ids))
        for memory in (rows, stack_rows([rows, rows])):
            with slot.using(memory):
                found.append(anchor(ids))
        if kind == "ffn":
            with FusedMemory(half_anchor(name, dtype, wide), config) as fused:
                fused.set((rows[0][..., :4, :], None, rows[0][..., 4:, :]))
                found.append(fused.anchor(ids))
                mx.eval(found)
    half = len(found) // 2
    most = FORWARD * UNIT[dtype]
    assert distance(found[1], found[0]) > 4 * most  # else a memory left out would not show
    for exact, own in zip(found[:half], found[half:], strict=True):
        assert own.dtype == dtype
        assert distance(own, exact) <= most
