"""Every architecture with every kind of memory: nothing at the start, then what the paper says.

The references are not the attached code: FFN memory against widened matrices, LoRA against patched
weights, KV against attention written out inside the architecture's own attention function.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step

from mlx_hmem.anchors.architectures import ARCHITECTURES
from mlx_hmem.anchors.attach import anchor_sizes, attach_memory, memory_config
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.generation import AnchorWithMemory
from mlx_hmem.memory import KINDS, FetchedMemory, Rows, initial_block, join_blocks, split_block
from tests.tiny_anchors import EXPERTS, GATED, HEADS, LAYERS, UNGATED, VOCAB, make_anchor, module_of

PAIRS = [(name, kind) for name in GATED + UNGATED for kind in KINDS]
PAIRS += [(name, kind) for name in EXPERTS for kind in ("lora_qk", "lora_vo", "kv")]
every_pair = pytest.mark.parametrize(("name", "kind"), PAIRS)


def config_of(anchor: nn.Module, kind: str, layers: tuple[int, ...] | None = None) -> MemoryConfig:
    return memory_config(anchor, r=(4, 0, 3), branching=(2, 2, 2), kind=kind, layers=layers)


def random_rows(config: MemoryConfig, seed: int, size: float = 0.3) -> Rows:
    rng = np.random.default_rng(seed)
    blocks = [
        mx.array(size * rng.standard_normal(config.block_shape(level), np.float32))
        for level in (1, 3)
    ]
    return join_blocks(blocks, config)


def make_ids(seed: int = 3, shape: tuple[int, int] = (2, 9)) -> mx.array:
    return mx.random.randint(0, VOCAB, shape, key=mx.random.key(seed))


def widen(anchor: nn.Module, rows: Rows) -> None:
    """Puts FFN memory into the anchor's own FFN matrices, bias 0 for the new units."""
    for index, layer in enumerate(anchor.layers):
        mlp, *rest = layer.mlp, *rows[0][index]
        down, inner = rest[-1], rest[:-1]
        if "gate_up_proj" in mlp:  # one matrix: all gates, then all ups
            gate, up = mx.split(mlp.gate_up_proj.weight, 2)
            mlp.gate_up_proj.weight = mx.concatenate([gate, inner[0], up, inner[1]])
            names = []
        else:
            names = [n for n in ("gate_proj", "up_proj", "c_fc") if n in mlp]
        for linear, added in zip((mlp[n] for n in names), inner, strict=bool(names)):
            linear.weight = mx.concatenate([linear.weight, added])
            if "bias" in linear:
                linear.bias = mx.concatenate([linear.bias, mx.zeros(added.shape[0])])
        last = mlp["down_proj" if "down_proj" in mlp else "c_proj"]
        last.weight = mx.concatenate([last.weight, down.T], axis=1)


def patched(weight: mx.array, start: int, a: mx.array, b: mx.array) -> mx.array:
    """``weight`` with 2 · Bᵀ A added to its rows from ``start`` on."""
    end = start + b.shape[-1]
    return mx.concatenate([weight[:start], weight[start:end] + 2 * b.T @ a, weight[end:]])


def patch_weights(anchor: nn.Module, kind: str, rows: Rows) -> None:
    """Puts LoRA memory into the anchor's own weights."""
    for index, layer in enumerate(anchor.layers):
        g = [group[index] for group in rows]
        if kind == "lora_ffn":
            mlp = layer.mlp
            last = mlp["down_proj" if "down_proj" in mlp else "c_proj"]
            last.weight = patched(last.weight, 0, g[1][-1], g[0][-1])
            ups = list(zip(g[0][:-1], g[1][:-1], strict=True))  # gate if there is one, up
            if "gate_up_proj" in mlp:
                for place, (a, b) in enumerate(ups):
                    shared = mlp.gate_up_proj
                    shared.weight = patched(shared.weight, place * b.shape[-1], a, b)
            else:
                names = [n for n in ("gate_proj", "up_proj", "c_fc") if n in mlp]
                for linear, (a, b) in zip((mlp[n] for n in names), ups, strict=True):
                    linear.weight = patched(linear.weight, 0, a, b)
            continue
        attention = layer["attn" if "attn" in layer else "self_attn"]
        shared = next((attention[n] for n in ("qkv_proj", "c_attn") if n in attention), None)
        q, kv = g[1].shape[-1], g[2].shape[-1]
        if kind == "lora_qk":
            places = {"q_proj": (0, g[0][0], g[1][0]), "k_proj": (q, g[0][1], g[2][0])}
        else:
            places = {"v_proj": (q + kv, g[0][0], g[2][0])}
            last = attention["c_proj" if "c_proj" in attention else "o_proj"]
            last.weight = patched(last.weight, 0, g[1][0], g[0][1])
        for name, (start, a, b) in places.items():
            linear = shared if shared is not None else attention[name]
            start = start if shared is not None else 0
            linear.weight = patched(linear.weight, start, a, b)


def write_out_kv(anchor: nn.Module, name: str, rows: Rows, monkeypatch) -> None:
    """Adds softmax(q Kᵀ · scale) V in the attention function of the architecture's own module.

    That function sees queries after RoPE, so RoPE must be off.
    """
    code, layer = module_of(name), iter(range(LAYERS * 100))
    before = code.scaled_dot_product_attention

    def attention(queries, keys, values, cache, scale, mask, **kwargs):
        output = before(queries, keys, values, cache=cache, scale=scale, mask=mask, **kwargs)
        k, v = (
            part.reshape(part.shape[0], HEADS, -1).transpose(1, 0, 2)
            for part in rows[0][next(layer) % LAYERS]
        )
        weights = mx.softmax(scale * (queries @ k.swapaxes(-1, -2)), axis=-1)
        return output + weights @ v

    monkeypatch.setattr(code, "scaled_dot_product_attention", attention)


def switch_rope_off(anchor: nn.Module) -> None:
    for layer in anchor.layers:
        if "self_attn" in layer:
            layer.self_attn.rope = lambda x, offset=0: x


@every_pair
def test_memory_equals_the_patched_anchor_and_keeps_the_names(name, kind, monkeypatch):
    ids, anchor, other = make_ids(), make_anchor(name), make_anchor(name)
    if kind == "kv":
        switch_rope_off(anchor)
        switch_rope_off(other)
    names, alone = named_parameters(anchor).keys(), anchor(ids)
    config = config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    assert named_parameters(anchor).keys() == names
    assert mx.array_equal(anchor(ids), alone)
    rows = random_rows(config, 0, size=0.15)
    with slot.using(rows):
        attached = anchor(ids)
    assert mx.array_equal(anchor(ids), alone)
    mx.eval(attached)
    if kind == "ffn":
        widen(other, rows)
    elif kind == "kv":
        write_out_kv(other, name, rows, monkeypatch)
    else:
        patch_weights(other, kind, rows)
    assert mx.abs(attached - alone).max().item() > 1e-3
    assert mx.abs(attached - other(ids)).max().item() < 1e-5


@every_pair
def test_starting_values_have_no_effect_at_all_but_are_not_all_zero(name, kind):
    anchor, ids = make_anchor(name), make_ids()
    alone, config = anchor(ids), config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    blocks = [initial_block(config, r, np.random.default_rng(r)) for r in (4, 3)]
    assert [b.shape for b in blocks] == [config.block_shape(1), config.block_shape(3)]
    assert all(np.abs(b).max() > 0.1 for b in blocks)
    with slot.using(join_blocks([mx.array(b) for b in blocks], config)):
        assert mx.array_equal(anchor(ids), alone)


@every_pair
def test_a_row_of_a_batch_equals_the_row_alone(name, kind):
    anchor, ids = make_anchor(name), make_ids(shape=(3, 9))
    config = config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    memories = [random_rows(config, seed, size=0.15) for seed in range(3)]
    with slot.using(tuple(mx.stack(groups) for groups in zip(*memories, strict=True))):
        together = anchor(ids)
    for row, memory in enumerate(memories):
        with slot.using(memory):
            alone = anchor(ids[row : row + 1])
        assert mx.abs(together[row : row + 1] - alone).max().item() < 1e-5


# Experts know float32 only; what memory joins there is llama's.
@pytest.mark.parametrize(("name", "kind"), [pair for pair in PAIRS if pair[0] not in EXPERTS])
def test_gradients_of_the_memory_equal_finite_differences(name, kind):
    with mx.stream(mx.cpu):  # float64 is there only; RoPE and norms stay near float32
        anchor, ids = make_anchor(name), make_ids(shape=(1, 5))
        config = config_of(anchor, kind)
        anchor.update(tree_map(lambda a: a.astype(mx.float64), anchor.parameters()))
        slot = attach_memory(anchor, config)
        rows = tuple(g.astype(mx.float64) for g in random_rows(config, 5))

        def loss(rows: Rows) -> mx.array:
            with slot.using(rows):
                return anchor(ids).square().mean()

        gradients = mx.grad(loss)(rows)
        rng = np.random.default_rng(0)
        for group, gradient in enumerate(gradients):
            # Near the gradient: across it, rounding would be all that is measured.
            direction = gradient * mx.array(rng.uniform(0.2, 1.8, gradient.shape), mx.float64)
            direction = direction / mx.linalg.norm(direction)

            def moved(size: float, group: int = group, direction: mx.array = direction) -> float:
                changed = [*rows[:group], rows[group] + size * direction, *rows[group + 1 :]]
                return loss(tuple(changed)).item()

            expected = (gradient * direction).sum().item()
            h = min(4e-3, 2e-3 / abs(expected))
            measured = 8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))
            measured /= 12 * h
            assert measured == pytest.approx(expected, rel=1e-3)
            assert abs(measured) > 1e-6


@every_pair
def test_mlx_lm_generates_through_it_as_the_whole_sequence_says(name, kind):
    anchor = make_anchor(name)
    config = config_of(anchor, kind)
    slot, rows = attach_memory(anchor, config), random_rows(config, 7, size=0.6)
    prompt = make_ids(shape=(1, 6))[0]
    model = AnchorWithMemory(anchor, slot, rows)
    tokens = [token for token, _ in generate_step(prompt, model, max_tokens=8)]
    ids = prompt.tolist()
    for token in tokens:
        assert token == mx.argmax(model(mx.array([ids]))[0, -1]).item()
        ids.append(token)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("kind", ["ffn", "lora_ffn"])
def test_a_mixture_of_experts_is_named_with_the_kinds_that_fit(name, kind):
    anchor = make_anchor(name)
    layer = 1 if name == "qwen3_moe" else 0  # qwen3_moe's layer 0 is an FFN here
    config = MemoryConfig(**{"intermediate_size": 48} | anchor_sizes(anchor), r=(2,),
                          branching=(2,), kind=kind)  # fmt: skip
    with pytest.raises(UserError, match=rf"layer {layer}: .*lora_qk or lora_vo or kv"):
        attach_memory(anchor, config)
    if name == "qwen3_moe":  # but its one FFN can be joined
        attach_memory(anchor, config.placed([0]))


def test_every_architecture_of_the_table_is_tried():
    assert set(ARCHITECTURES) == set(GATED + UNGATED + EXPERTS)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_on_some_layers_changes_those_alone(kind):
    anchor, ids = make_anchor("llama"), make_ids()
    config = config_of(anchor, kind)
    slot, rows = attach_memory(anchor, config), random_rows(config, 0)
    without = tuple(mx.concatenate([0 * g[:1], g[1:]]) for g in rows)
    if kind == "kv":  # keys alone do nothing
        without = (mx.concatenate([rows[0][:1] * mx.array([1, 0])[:, None, None], rows[0][1:]]),)
    with slot.using(without):
        wanted = anchor(ids)
    other = make_anchor("llama")
    last = attach_memory(other, config.placed("last 2"))
    with last.using(tuple(g[1:] for g in rows)):
        assert mx.abs(other(ids) - wanted).max().item() < 1e-6


def test_blocks_split_and_join_as_fetched_memory_does():
    config = config_of(make_anchor("llama"), "lora_qk")
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
