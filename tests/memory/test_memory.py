"""Sizes of memory as the paper gives them, wrong memories refused, memory in a compiled step.

What each kind computes is in test_kinds.py.
"""

import importlib
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Rows, initial_block
from tests.helpers.programs import refused
from tests.helpers.references import config_of, random_rows
from tests.helpers.tiny_anchors import LAYERS, VOCAB, make_anchor
from tests.train.test_paper_recipes import CONFIGS, PARAMETERS


@pytest.mark.parametrize("kind", ["ffn", "lora_ffn", "lora", "kv"])
def test_memory_passed_as_an_argument_works_in_a_compiled_gradient_step(kind):
    anchor, ids = make_anchor("openlm"), mx.random.randint(0, VOCAB, (2, 9))
    config = config_of(anchor, kind)
    slot = attach_memory(anchor, config)

    def loss(rows: Rows) -> mx.array:
        with slot.using(rows):
            return anchor(ids).square().mean()

    plain, compiled = mx.value_and_grad(loss), mx.compile(mx.value_and_grad(loss))
    for seed in range(3):  # a memory frozen into the graph would give the first one's values
        rows = random_rows(config, seed)
        (a, ga), (b, gb) = plain(rows), compiled(rows)
        assert mx.allclose(a, b, rtol=1e-5).item()
        for one, other in zip(ga, gb, strict=True):
            assert mx.allclose(one, other, rtol=1e-4, atol=1e-6).item()


def test_initial_ffn_memory_is_truncated_normal_with_zero_down():
    config = MemoryConfig(256, 4, (64,), (2,))
    block = initial_block(config, 64, np.random.default_rng(0))
    assert block.shape == (4, 3, 64, 256)
    assert (block[:, 2] == 0).all()
    gate_up = block[:, :2] * 256**0.5
    assert np.abs(gate_up).max() <= 3
    assert gate_up.std() == pytest.approx(0.9866, abs=0.01)  # of a normal cut at 3σ


def test_initial_lora_memory_is_uniform_in_a_and_zero_in_b():
    config = MemoryConfig(64, 2, (8,), (2,), kind="lora_ffn", intermediate_size=256)
    block = initial_block(config, 8, np.random.default_rng(0))
    wide = 3 * 8 * 64
    a_gate_up, b_down = np.split(block[:, :wide].reshape(2, 3, 8, 64), [2], axis=1)
    b_gate_up, a_down = np.split(block[:, wide:].reshape(2, 3, 8, 256), [2], axis=1)
    assert not b_down.any()
    assert not b_gate_up.any()
    for a, inputs in ((a_gate_up, 64), (a_down, 256)):
        assert 0.99 < np.abs(a).max() * inputs**0.5 <= 1
        assert a.std() * inputs**0.5 == pytest.approx(3**-0.5, rel=0.03)


# Paper, section 3: parameters of one fetched set with d hidden, L layers, h heads of d_h, FFN d_f.
FORMULAS = {
    "ffn": lambda r, L, d, d_f, hd: 3 * r * L * d,
    "lora_ffn": lambda r, L, d, d_f, hd: 3 * r * L * (d + d_f),
    "lora_qk": lambda r, L, d, d_f, hd: 2 * r * L * (d + hd),
    "lora_vo": lambda r, L, d, d_f, hd: 2 * r * L * (d + hd),
    "kv": lambda r, L, d, d_f, hd: 2 * r * L * hd,
    "lora": lambda r, L, d, d_f, hd: 2 * r * L * (2 * d + hd + d_f),  # two projections of each part
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_fetched_sizes_are_the_papers_formulas(kind):
    anchor = make_anchor("openlm")  # as many key-value heads as heads, as in the paper
    config = config_of(anchor, kind)
    assert config.fetched_parameters == FORMULAS[kind](7, LAYERS, 32, 64, 32)
    blocks = [np.prod(config.block_shape(level)) for level in (1, 2, 3)]
    assert config.bank_parameters == 2 * blocks[0] + 8 * blocks[2]
    assert blocks[1] == 0


@pytest.mark.parametrize(
    ("hidden", "layers", "r", "parameters", "bank"),
    # Paper, tables in sections 4 and 6: fetched 18M of 4.6B, 50M of 12.7B, 153M of 21.1B.
    [
        (512, 35, (256, 64, 16, 0), 18_063_360, 4_624_220_160),
        (1024, 24, (512, 128, 32, 0), 49_545_216, 12_683_575_296),
        (2048, 24, (768, 256, 16, 0), 153_354_240, 21_139_292_160),
    ],
)
def test_fetched_and_bank_sizes_are_the_papers(hidden, layers, r, parameters, bank):
    config = MemoryConfig(hidden, layers, r, (16, 16, 16, 16))
    assert config.fetched_parameters == parameters
    assert config.bank_parameters == bank


def tied(anchor: nn.Module) -> int:
    """Parameters, the head being the embeddings' matrix."""
    named = named_parameters(anchor).items()
    return sum(array.size for name, array in named if not name.startswith("lm_head"))


@pytest.mark.parametrize(
    ("name", "r", "fetched", "bank"),
    [
        ("gemma-3-270m", (512, 128, 32, 0), "23.2", "5.9"),
        ("qwen-2.5-0.5b", (512, 128, 32, 0), "43.4", "11.1"),
        # With (768, 256, 32, 0), as the table prints it, these would be 103.8M and 20.5B.
        ("llama-3.2-1b", (768, 256, 16, 0), "102.2", "14.1"),
    ],
)
def test_memories_of_open_weight_anchors_have_the_papers_sizes(name, r, fetched, bank):
    code = importlib.import_module(f"mlx_lm.models.{CONFIGS[name]['model_type']}")
    anchor = code.Model(code.ModelArgs.from_dict(CONFIGS[name]))  # random, never evaluated
    assert tied(anchor) == PARAMETERS[name]
    config = memory_config(anchor, r, (16, 16, 16, 16))
    assert f"{config.fetched_parameters / 1e6:.1f}" == fetched
    assert f"{config.bank_parameters / 1e9:.1f}" == bank
    attach_memory(anchor, config)


@pytest.mark.parametrize(
    ("where", "layers"),
    [("first 2", (0, 1)), ("middle 1", (1,)), ("last 2", (1, 2)), ([0, 2], (0, 2)), ("all", None)],
)
def test_placements_name_layers(where, layers):
    config = MemoryConfig(32, 3, (4,), (2,)).placed(where)
    assert config.layers == layers
    assert config.block_shape(1)[0] == (3 if layers is None else len(layers))


def test_the_papers_placements_keep_the_number_of_parameters():
    whole = MemoryConfig(512, 35, (256, 64, 16, 0), (16, 16, 16, 16))
    for where, first in (("first 10", 0), ("middle 10", 12), ("last 10", 25)):
        placed = whole.placed(where, keep_parameters=True)
        assert placed.layers == tuple(range(first, first + 10))
        assert placed.r == (896, 224, 56, 0)
        assert placed.fetched_parameters == whole.fetched_parameters
        assert placed.bank_parameters == whole.bank_parameters


@pytest.mark.parametrize(
    "layers", ["last 4", "last", "some 2", (), (1, 1), (2, 1), (1, 3), ("1",)], ids=repr
)
def test_a_wrong_placement_is_refused(layers):
    refused(r"layers|placement", lambda: MemoryConfig(32, 3, (4,), (2,)).placed(layers))


def test_a_memory_of_another_anchor_is_refused_with_both_sides():
    anchor = make_anchor("llama")
    config = config_of(anchor, "lora_qk")
    for change, sides in (
        ({"hidden_size": 16}, "memory: hidden_size 16; anchor: hidden_size 32"),
        ({"num_hidden_layers": 4}, "memory: num_hidden_layers 4; anchor: num_hidden_layers 3"),
        ({"key_value_size": 32}, "memory: key_value_size 32; anchor: key_value_size 16"),
    ):
        wrong = MemoryConfig.from_dict(config.to_dict() | change)
        refused(f"another anchor: {sides}; use", attach_memory, anchor, wrong)
    ungated = make_anchor("nemotron")
    wrong = MemoryConfig.from_dict(config_of(ungated, "ffn").to_dict() | {"gated": True})
    refused("memory: gated True; anchor: gated False", attach_memory, ungated, wrong)


def test_rows_of_another_kind_or_size_are_refused():
    anchor = make_anchor("llama")
    config = config_of(anchor, "ffn")
    slot = attach_memory(anchor, config)
    good = random_rows(config, 0)
    for wrong in (
        random_rows(config_of(anchor, "lora_qk"), 0),
        random_rows(config.placed("last 2"), 0),
        (mx.zeros((3, 3, 5, 16)),),
        (good[0][None, None],),
        good + good,
    ):
        refused("does not fit", slot.set, wrong)
    slot.set(good)
    refused("already", attach_memory, anchor, config)


def test_an_unknown_architecture_is_refused_by_name():
    config = config_of(make_anchor("llama"), "ffn")
    refused("Linear", lambda: attach_memory(nn.Linear(2, 2), config))
    with pytest.raises(UserError, match=r"mamba.*use one of openlm, llama"):
        attach_memory(SimpleNamespace(model_type="mamba"), config)
