"""Every architecture with every kind of memory: nothing at the start, then what the paper says."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_unflatten
from mlx_lm.generate import generate_step

from mlx_hmem.anchors.architectures import ARCHITECTURES
from mlx_hmem.anchors.attach import anchor_sizes, attach_memory
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.config import KINDS, PROJECTIONS, MemoryConfig
from mlx_hmem.memory import FetchedMemory, initial_block, join_blocks, split_block
from mlx_hmem.model.stream import AnchorWithMemory
from tests.helpers import references
from tests.helpers.programs import refused
from tests.helpers.tiny_anchors import EXPERTS, GATED, UNGATED, make_anchor

WITHOUT_EXPERTS = [pair for pair in references.PAIRS if pair[0] not in EXPERTS]
every_pair = pytest.mark.parametrize(("name", "kind"), references.PAIRS)


def assert_is_patched(anchor, other, name, kind, patch, close):
    """A memory attached to ``anchor`` is the memory in the weights of ``other``, its equal."""
    ids, config = references.make_ids(), references.config_of(anchor, kind)
    if kind == "kv":
        references.switch_rope_off(anchor)
        references.switch_rope_off(other)
    names, alone = named_parameters(anchor).keys(), anchor(ids)
    assert mx.abs(alone - other(ids)).max().item() < close
    slot, rows = attach_memory(anchor, config), references.random_rows(config, 0, size=0.15)
    assert named_parameters(anchor).keys() == names
    assert mx.array_equal(anchor(ids), alone)
    with slot.using(rows):
        attached = anchor(ids)
    assert mx.array_equal(anchor(ids), alone)
    mx.eval(attached)
    references.apply_reference(other, name, kind, rows, patch.setattr)
    assert mx.abs(attached - alone).max().item() > 1e-3
    assert mx.abs(attached - other(ids)).max().item() < close


@every_pair
def test_memory_equals_the_patched_anchor_and_keeps_the_names(name, kind, monkeypatch):
    assert_is_patched(make_anchor(name), make_anchor(name), name, kind, monkeypatch, 1e-5)


@every_pair
def test_starting_values_have_no_effect_at_all_but_are_not_all_zero(name, kind):
    anchor, ids = make_anchor(name), references.make_ids()
    alone, config = anchor(ids), references.config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    blocks = [initial_block(config, r, np.random.default_rng(r)) for r in (4, 3)]
    assert [b.shape for b in blocks] == [config.block_shape(1), config.block_shape(3)]
    assert all(np.abs(b).max() > 0.1 for b in blocks)
    with slot.using(join_blocks([mx.array(b) for b in blocks], config)):
        assert mx.array_equal(anchor(ids), alone)


@every_pair
def test_a_row_of_a_batch_equals_the_row_alone(name, kind):
    anchor, ids = make_anchor(name), references.make_ids(shape=(3, 9))
    config = references.config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    memories = [references.random_rows(config, seed, size=0.15) for seed in range(3)]
    with slot.using(tuple(mx.stack(groups) for groups in zip(*memories, strict=True))):
        together = anchor(ids)
    for row, memory in enumerate(memories):
        with slot.using(memory):
            alone = anchor(ids[row : row + 1])
        assert mx.abs(together[row : row + 1] - alone).max().item() < 2e-5  # of logits of about 3


# Experts know float32 only; what memory joins there is llama's.
@pytest.mark.parametrize(("name", "kind"), WITHOUT_EXPERTS)
def test_gradients_of_the_memory_equal_finite_differences(name, kind):
    assert max(references.gradient_errors(name, kind)) < 1e-3


@every_pair
def test_mlx_lm_generates_through_it_as_the_whole_sequence_says(name, kind):
    anchor = make_anchor(name)
    config = references.config_of(anchor, kind)
    slot, rows = attach_memory(anchor, config), references.random_rows(config, 7, size=0.6)
    prompt = references.make_ids(shape=(1, 6))[0]
    model = AnchorWithMemory(anchor, slot, rows)
    tokens = [token for token, _ in generate_step(prompt, model, max_tokens=8)]
    ids = prompt.tolist()
    for token in tokens:
        assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
        ids.append(token)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("kind", ["ffn", "lora_ffn", "lora"])
def test_a_mixture_of_experts_is_named_with_the_kinds_that_fit(name, kind):
    anchor = make_anchor(name)
    layer = 1 if name == "qwen3_moe" else 0  # qwen3_moe's layer 0 is an FFN here
    config = MemoryConfig(**{"intermediate_size": 48} | anchor_sizes(anchor), r=(2,),
                          branching=(2,), **references.of_kind(kind))  # fmt: skip
    refused(
        rf"layer {layer}: .*lora_qk or lora_vo or kv or lora on query",
        attach_memory,
        anchor,
        config,
    )
    if name == "qwen3_moe":  # but its one FFN can be joined
        attach_memory(anchor, config.placed([0]))


def test_every_architecture_of_the_table_is_tried():
    assert set(ARCHITECTURES) == set(GATED + UNGATED + EXPERTS)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_some_layers_changes_those_alone(kind):
    anchor, ids = make_anchor("llama"), references.make_ids()
    config = references.config_of(anchor, kind)
    slot, rows = attach_memory(anchor, config), references.random_rows(config, 0)
    without = tuple(mx.concatenate([0 * g[:1], g[1:]]) for g in rows)
    if kind == "kv":  # keys alone do nothing
        without = (mx.concatenate([rows[0][:1] * mx.array([1, 0])[:, None, None], rows[0][1:]]),)
    with slot.using(without):
        wanted = anchor(ids)
    other = make_anchor("llama")
    last = attach_memory(other, config.placed("last 2"))
    with last.using(tuple(g[1:] for g in rows)):
        assert mx.abs(other(ids) - wanted).max().item() < 1e-6


@pytest.mark.parametrize("kind", ["lora_ffn", "lora_qk", "lora_vo"])
@pytest.mark.parametrize("name", ["llama", "nemotron"])
def test_a_fixed_kind_is_lora_with_its_targets(name, kind):
    anchor, ids, logits, starts = make_anchor(name), references.make_ids(), [], []
    fixed = references.config_of(anchor, kind)
    free = replace(fixed, kind="lora", targets=fixed.patched)
    assert fixed.to_dict() | {"kind": "lora", "targets": fixed.patched} == free.to_dict()
    for config in (fixed, free):
        slot = attach_memory(make := make_anchor(name), config)
        with slot.using(references.random_rows(config, 0)):
            logits.append(make(ids))
        starts.append(initial_block(config, 4, np.random.default_rng(0)))
    assert mx.array_equal(*logits)
    assert np.array_equal(*starts)


def test_all_seven_projections_at_once_are_the_three_fixed_kinds_together(monkeypatch):
    anchor, ids = make_anchor("phi3"), references.make_ids()
    kinds = [references.config_of(anchor, kind) for kind in ("lora_qk", "lora_vo", "lora_ffn")]
    config = replace(kinds[0], kind="lora", targets=tuple(PROJECTIONS))
    own = {}
    for seed, fixed in enumerate(kinds):
        rows = references.random_rows(fixed, seed, size=0.15)
        own |= named_matrices(fixed, rows)
        references.patch_weights(anchor, fixed, rows)
    groups = [mx.stack([own[name] for name in names], 1) for names in config.matrices.values()]
    slot = attach_memory(other := make_anchor("phi3"), config)
    with slot.using(tuple(groups)):
        assert mx.abs(other(ids) - anchor(ids)).max().item() < 1e-5
    assert mx.abs(other(ids) - anchor(ids)).max().item() > 1e-3


def named_matrices(config, rows):
    pairs = zip(config.matrices.values(), rows, strict=True)
    return {name: group[:, i] for names, group in pairs for i, name in enumerate(names)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"targets": None}, "targets is not a list .*query, key, value, output, gate, up, down"),
        ({"targets": ()}, "targets"),
        ({"targets": ("up", "query")}, "in this order"),
        ({"targets": ("query", "query")}, "targets"),
        ({"targets": ("query", "lm_head")}, "lm_head"),
        ({"targets": "query"}, "targets"),
        ({"targets": ({},)}, "targets"),
        ({"gated": False, "targets": ("gate",)}, "gate"),
        ({"kind": "ffn", "targets": ("up",)}, "kind ffn has no targets.*use kind lora"),
        ({"intermediate_size": 0}, "intermediate_size"),
    ],
    ids=repr,
)
def test_wrong_targets_are_refused(change, words):
    config = references.config_of(make_anchor("llama"), "lora")
    refused(words, MemoryConfig.from_dict, config.to_dict() | change)


def test_a_config_without_targets_is_written_as_before():
    config = references.config_of(make_anchor("llama"), "lora_qk")
    assert "targets" not in config.to_json()
    assert MemoryConfig.from_dict(config.to_dict()) == config
    config = references.config_of(make_anchor("llama"), "lora")
    assert MemoryConfig.from_dict(json.loads(config.to_json())) == config


def test_blocks_split_and_join_as_fetched_memory_does():
    config = references.config_of(make_anchor("llama"), "lora_qk")
    blocks = [np.arange(np.prod(config.block_shape(n)), dtype=np.float32) for n in (1, 3)]
    shaped = [
        mx.array(b.reshape(config.block_shape(n))) for b, n in zip(blocks, (1, 3), strict=True)
    ]
    fetched = FetchedMemory((shaped[0], None, shaped[1]), config)
    for index, (rows, width) in enumerate(config.groups):
        parts = [split_block(block, config)[index] for block in shaped]
        assert [p.shape for p in parts] == [(3, rows, 4, width), (3, rows, 3, width)]
        assert mx.array_equal(fetched.rows[index], mx.concatenate(parts, axis=2))
    assert sorted(np.concatenate([np.array(g).ravel() for g in fetched.rows])) == sorted(
        np.concatenate(blocks)
    )


def quantize(anchor: nn.Module, bits: int, mode: str) -> None:
    def fits(_: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and module.weight.shape[-1] % 32 == 0

    nn.quantize(anchor, 32, bits, mode=mode, class_predicate=fits)


def dequantize(anchor: nn.Module) -> None:
    """Puts plain linear modules with the same rounded weights in place of quantised ones."""
    for path, module in anchor.named_modules():
        if isinstance(module, nn.QuantizedLinear):
            weight = mx.dequantize(
                module.weight, module.scales, module.get("biases"),
                group_size=module.group_size, bits=module.bits, mode=module.mode,
            )  # fmt: skip
            plain = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                plain.bias = module.bias
            plain.weight = weight.astype(mx.float32)
            anchor.update_modules(tree_unflatten([(path, plain)]))


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
@pytest.mark.parametrize(("name", "kind"), WITHOUT_EXPERTS)
def test_a_quantised_anchor_takes_full_precision_memory(name, kind, bits, mode, monkeypatch):
    anchor, other = make_anchor(name), make_anchor(name)
    quantize(anchor, bits, mode)
    quantize(other, bits, mode)
    dequantize(other)
    assert_is_patched(anchor, other, name, kind, monkeypatch, 1e-4)
