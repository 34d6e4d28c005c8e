"""Attached memory: no effect at the start, then equal to a physically widened FFN."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import gemma3_text, llama, olmo2, qwen2, qwen3, smollm3

import mlx_hmem  # noqa: F401  (before mlx.core)
from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.memory.ffn import ffn_memory, initial_block

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=3,
    intermediate_size=48,
    num_attention_heads=4,
    head_dim=8,
    vocab_size=64,
)
LLAMA_LIKE = dict(SIZES, rms_norm_eps=1e-5, num_key_value_heads=2, max_position_embeddings=128)
CONFIG = MemoryConfig(hidden_size=32, num_hidden_layers=3, r=(4, 0, 3), branching=(2, 2, 2))


def make_anchor(kind: str) -> nn.Module:
    mx.random.seed(1)
    anchor = {
        "openlm": lambda: Model(ModelArgs(model_type="openlm", **SIZES)),
        "llama": lambda: llama.Model(llama.ModelArgs(model_type="llama", **LLAMA_LIKE)),
        "qwen2": lambda: qwen2.Model(
            qwen2.ModelArgs.from_dict(dict(LLAMA_LIKE, model_type="qwen2"))
        ),
        "qwen3": lambda: qwen3.Model(
            qwen3.ModelArgs.from_dict(
                dict(LLAMA_LIKE, model_type="qwen3", rope_theta=1e4, tie_word_embeddings=True)
            )
        ),
        "olmo2": lambda: olmo2.Model(
            olmo2.ModelArgs.from_dict(dict(LLAMA_LIKE, model_type="olmo2"))
        ),
        "smollm3": lambda: smollm3.Model(
            smollm3.ModelArgs.from_dict(dict(LLAMA_LIKE, model_type="smollm3"))
        ),
        "gemma3_text": lambda: gemma3_text.Model(
            gemma3_text.ModelArgs.from_dict(
                dict(LLAMA_LIKE, model_type="gemma3_text", sliding_window_pattern=3)
            )
        ),
    }[kind]()
    mx.eval(anchor.parameters())
    return anchor


KINDS = ["openlm", "llama", "qwen2", "qwen3", "olmo2", "smollm3", "gemma3_text"]


def random_memory(seed: int) -> FetchedMemory:
    rng = np.random.default_rng(seed)
    shapes = [CONFIG.block_shape(level) for level in (1, 3)]
    a, b = (mx.array(0.2 * rng.standard_normal(shape, np.float32)) for shape in shapes)
    return FetchedMemory((a, None, b))


def widen(anchor: nn.Module, rows: mx.array) -> None:
    """Puts the memory's rows into the anchor's own FFN matrices."""
    for index, layer in enumerate(anchor.layers):
        gate, up, down = rows[index]
        mlp = layer.mlp
        mlp.gate_proj.weight = mx.concatenate([mlp.gate_proj.weight, gate])
        mlp.up_proj.weight = mx.concatenate([mlp.up_proj.weight, up])
        mlp.down_proj.weight = mx.concatenate([mlp.down_proj.weight, down.T], axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_equals_a_widened_ffn_and_keeps_the_names(kind: str) -> None:
    ids = mx.random.randint(0, 64, (2, 9))
    anchor = make_anchor(kind)
    names, alone = named_parameters(anchor).keys(), anchor(ids)
    slot = attach_memory(anchor, CONFIG)
    assert named_parameters(anchor).keys() == names
    assert mx.array_equal(anchor(ids), alone)
    rows = random_memory(0).rows
    with slot.using(rows):
        attached = anchor(ids)
    assert mx.array_equal(anchor(ids), alone)
    widened = make_anchor(kind)
    widen(widened, rows)
    assert mx.abs(attached - widened(ids)).max().item() < 1e-5
    assert mx.abs(attached - alone).max().item() > 1e-3  # the memory does something


@pytest.mark.parametrize("kind", KINDS)
def test_a_starting_block_leaves_the_anchor_bit_equal(kind: str) -> None:
    anchor, ids = make_anchor(kind), mx.random.randint(0, 64, (2, 9))
    alone = anchor(ids)
    slot = attach_memory(anchor, CONFIG)
    start = initial_block((3, 3, 7, 32), np.random.default_rng(0))
    assert np.abs(start[:, :2]).max() > 0
    with slot.using(mx.array(start)):
        assert mx.array_equal(anchor(ids), alone)


def test_a_row_of_a_batch_equals_the_row_alone() -> None:
    anchor = make_anchor("openlm")
    slot = attach_memory(anchor, CONFIG)
    ids = mx.random.randint(0, 64, (3, 9))
    memories = [random_memory(seed).rows for seed in range(3)]
    with slot.using(mx.stack(memories)):
        together = anchor(ids)
    for row, memory in enumerate(memories):
        with slot.using(memory):
            alone = anchor(ids[row : row + 1])
        assert mx.abs(together[row : row + 1] - alone).max().item() < 1e-5


def test_gradients_equal_finite_differences() -> None:
    x = mx.random.normal((2, 5, 8))
    rows = 0.3 * mx.random.normal((3, 4, 8))

    def loss(rows: mx.array) -> mx.array:
        return mx.sin(ffn_memory(x, rows, nn.silu)).sum()

    gradient = np.array(mx.grad(loss)(rows))
    base, rng = np.array(rows), np.random.default_rng(0)
    for _ in range(10):
        direction = rng.standard_normal(base.shape).astype(np.float32)
        step = 1e-2 * direction / np.linalg.norm(direction)
        measured = (loss(mx.array(base + step)) - loss(mx.array(base - step))).item() / 2
        assert measured == pytest.approx(float((gradient * step).sum()), rel=2e-2, abs=2e-5)


def test_initial_block_is_truncated_normal_with_zero_down() -> None:
    block = initial_block((4, 3, 64, 256), np.random.default_rng(0))
    assert (block[:, 2] == 0).all()
    gate_up = block[:, :2] * 256**0.5
    assert np.abs(gate_up).max() <= 3
    assert gate_up.std() == pytest.approx(0.9866, abs=0.01)  # of a normal cut at 3σ


@pytest.mark.parametrize(
    ("r", "parameters", "bank"),
    # Paper, tables in sections 4 and 6: fetched 18M of 4.6B, 50M of 12.7B, 153M of 21.1B.
    [
        ((512, 35, (256, 64, 16, 0)), 18_063_360, 4_624_220_160),
        ((1024, 24, (512, 128, 32, 0)), 49_545_216, 12_683_575_296),
        ((2048, 24, (768, 256, 16, 0)), 153_354_240, 21_139_292_160),
    ],
)
def test_fetched_and_bank_sizes_are_the_papers(r: tuple, parameters: int, bank: int) -> None:
    hidden, layers, multipliers = r
    config = MemoryConfig(hidden, layers, multipliers, (16, 16, 16, 16))
    assert config.fetched_parameters == parameters
    assert config.bank_parameters == bank


def test_a_memory_of_another_size_is_refused() -> None:
    anchor = make_anchor("openlm")
    with pytest.raises(UserError, match="another anchor"):
        attach_memory(anchor, MemoryConfig(16, 3, (4,), (2,)))
    slot = attach_memory(anchor, CONFIG)
    with pytest.raises(UserError, match="does not fit"):
        slot.set(mx.zeros((3, 3, 5, 16)))
    with pytest.raises(UserError, match="already"):
        attach_memory(anchor, CONFIG)


def test_an_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="Linear"):
        attach_memory(nn.Linear(2, 2), CONFIG)


def test_memory_passed_as_an_argument_works_in_a_compiled_gradient_step() -> None:
    anchor, ids = make_anchor("openlm"), mx.random.randint(0, 64, (2, 9))
    slot = attach_memory(anchor, CONFIG)

    def loss(rows: mx.array) -> mx.array:
        with slot.using(rows):
            return anchor(ids).square().mean()

    plain, compiled = mx.value_and_grad(loss), mx.compile(mx.value_and_grad(loss))
    for seed in range(3):  # a memory frozen into the graph would give the first one's values
        rows = random_memory(seed).rows
        (a, ga), (b, gb) = plain(rows), compiled(rows)
        assert mx.allclose(a, b, rtol=1e-5).item()
        assert mx.allclose(ga, gb, rtol=1e-4, atol=1e-6).item()
