"""The OpenLM anchor against golden numbers made with PyTorch, and against the paper's counts."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_hmem.anchors import openlm
from tests.helpers.places import shared
from tests.helpers.references import openlm_differences


def tiny_args(**changes: object) -> openlm.ModelArgs:
    return openlm.ModelArgs(**dict(
        model_type="openlm", hidden_size=64, num_hidden_layers=3, intermediate_size=160,
        num_attention_heads=6, head_dim=8, vocab_size=101,
    ) | changes)  # fmt: skip


def tiny_model(seed: int = 0, **changes: object) -> openlm.Model:
    mx.random.seed(seed)
    model = openlm.Model(tiny_args(**changes))
    mx.eval(model.parameters())
    return model


@pytest.mark.parametrize("name", ["tied", "sep"])
def test_logits_and_every_gradient_equal_pytorch(name: str) -> None:
    path = shared("fixtures", f"openlm_tiny_ln_{name}.npz")
    found = openlm_differences(path, tied=name == "tied")
    assert all(value < 1e-4 for value in found.values()), found


@pytest.mark.parametrize(
    ("preset", "count"),
    [("openlm-160m", 163_510_016), ("openlm-410m", 411_665_408), ("openlm-1b", 1_439_893_504)],
)
def test_presets_have_the_papers_parameter_counts(preset: str, count: int) -> None:
    model = openlm.Model(openlm.PRESETS[preset])  # lazy: nothing is allocated
    assert sum(v.size for _, v in tree_flatten(model.parameters())) == count


@pytest.mark.parametrize("traditional", [False, True])
def test_kv_cache_gives_the_logits_of_the_whole_sequence(traditional: bool) -> None:
    model = tiny_model(rope_traditional=traditional, norm_type="rms_norm")
    ids = mx.random.randint(0, 101, (2, 12))
    cache = make_prompt_cache(model)
    pieces = [model(ids[:, :7], cache=cache)] + [
        model(ids[:, i : i + 1], cache=cache) for i in range(7, 12)
    ]
    assert mx.abs(mx.concatenate(pieces, axis=1) - model(ids)).max().item() < 1e-5


def test_interleaved_and_half_split_rope_differ_only_by_the_order_of_dimensions() -> None:
    half = tiny_model(rope_traditional=False, qk_norm=False)
    interleaved = tiny_model(rope_traditional=True, qk_norm=False)
    weights = dict(tree_flatten(half.parameters()))
    order = mx.array([4 * (i % 2) + i // 2 for i in range(8)])  # position i takes from order[i]
    for layer in range(3):
        for part in ("q_proj", "k_proj"):
            key = f"model.layers.{layer}.self_attn.{part}.weight"
            weights[key] = weights[key].reshape(6, 8, 64)[:, order].reshape(48, 64)
    interleaved.load_weights(list(weights.items()))
    ids = mx.random.randint(0, 101, (2, 12))
    assert mx.abs(half(ids) - interleaved(ids)).max().item() < 1e-5


def test_document_mask_hides_the_other_documents_of_a_sequence() -> None:
    model = tiny_model()
    a, b = mx.random.randint(0, 101, (1, 5)), mx.random.randint(0, 101, (1, 7))
    mask = openlm.document_mask(mx.array([[0] * 5 + [1] * 7]))
    packed = model(mx.concatenate([a, b], axis=1), mask=mask)
    assert mx.abs(packed[:, :5] - model(a)).max().item() < 1e-5
    assert mx.abs(packed[:, 5:] - model(b)).max().item() < 1e-5  # RoPE is relative


def test_an_unknown_norm_and_a_head_that_should_be_tied_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_type"):
        tiny_args(norm_type="batch_norm")
    weights = dict(tree_flatten(tiny_model().parameters()))
    tied = tiny_model(tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head"):  # once the head vanished without a word
        tied.load_weights(list(tied.sanitize(weights).items()))
