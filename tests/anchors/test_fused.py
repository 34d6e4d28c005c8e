"""Memory inside the anchor's own FFN weights equals attached memory, and leaves no trace."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step, stream_generate

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.fused import FusedMemory, is_fused
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.stream import AnchorWithMemory
from tests.helpers.programs import refused
from tests.helpers.references import config_of, make_ids
from tests.helpers.tiny_anchors import EXPERTS, GATED, UNGATED, make_anchor
from tests.memory.test_kinds import quantize

Blocks = tuple[mx.array | None, ...]
MISSING = [(), (1,), (1, 3)]  # levels without their block; level 2 has none anyway
every_ffn = pytest.mark.parametrize("name", GATED + UNGATED)


def make_block(config: MemoryConfig, r: int, seed: int, size: float = 0.3) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(size * rng.standard_normal(config.shape_of(r), np.float32))


def make_blocks(config: MemoryConfig, seed: int, without: tuple[int, ...] = ()) -> Blocks:
    return tuple(
        make_block(config, r, 10 * seed + level) if r and level not in without else None
        for level, r in enumerate(config.r, 1)
    )


def attached_logits(name: str, config: MemoryConfig, blocks: Blocks) -> mx.array:
    anchor = make_anchor(name)
    with attach_memory(anchor, config).using(FetchedMemory(blocks, config).rows):
        logits = anchor(make_ids())
        mx.eval(logits)
    return logits


def same_parameters(anchor, other) -> bool:
    mine, others = named_parameters(anchor), named_parameters(other)
    return list(mine) == list(others) and all(mx.array_equal(mine[n], others[n]) for n in mine)


@every_ffn
@pytest.mark.parametrize("without", MISSING)
def test_fused_equals_attached_and_the_anchor_comes_back_bit_for_bit(name, without):
    anchor, ids = make_anchor(name), make_ids()
    config, alone, names = config_of(anchor, "ffn"), anchor(ids), list(named_parameters(anchor))
    blocks = make_blocks(config, 1, without)
    with FusedMemory(anchor, config) as fused:
        assert mx.array_equal(anchor(ids), alone)
        fused.set(blocks)
        logits = fused.anchor(ids)
        assert list(named_parameters(anchor)) == names
    assert mx.abs(logits - attached_logits(name, config, blocks)).max().item() < 1e-5
    if set(without) != {1, 3}:
        assert mx.abs(logits - alone).max().item() > 1e-3
    assert mx.array_equal(anchor(ids), alone)
    assert same_parameters(anchor, make_anchor(name))


@every_ffn
def test_biases_are_not_lost_and_those_of_the_new_units_are_zero(name):
    def with_biases():
        anchor = make_anchor(name)
        for layer in anchor.layers:
            for module in layer.mlp.children().values():
                module.bias = mx.arange(module.weight.shape[0]) / 100 + 0.5
        return anchor

    anchor, other, ids = with_biases(), with_biases(), make_ids()
    config, alone = config_of(anchor, "ffn"), anchor(ids)
    blocks = make_blocks(config, 2)
    slot = attach_memory(other, config)
    with FusedMemory(anchor, config) as fused, slot.using(FetchedMemory(blocks, config).rows):
        fused.set(blocks)
        assert mx.allclose(anchor(ids), other(ids), rtol=1e-5, atol=1e-5)
    assert mx.array_equal(anchor(ids), alone)
    assert same_parameters(anchor, with_biases())


@pytest.mark.parametrize("name", ["llama", "phi3", "starcoder2"])  # one of each layout
def test_switching_some_levels_equals_setting_all_anew(name):
    anchor, ids = make_anchor(name), make_ids()
    config = config_of(anchor, "ffn")
    first, second = make_blocks(config, 1), make_blocks(config, 2)
    generic = (make_block(config, sum(config.r), 9),)
    steps = [first, (first[0], None, second[2]), second, (None, None, second[2]), generic, first]
    fused = FusedMemory(anchor, config)
    for blocks in steps:
        fused.set(blocks)
        anew = make_anchor(name)
        FusedMemory(anew, config).set(blocks)
        assert same_parameters(anchor, anew)
        assert mx.array_equal(anchor(ids), anew(ids))
        assert mx.abs(anchor(ids) - attached_logits(name, config, blocks)).max().item() < 1e-5


def test_only_the_levels_that_changed_are_written():
    anchor = make_anchor("llama")
    config = config_of(anchor, "ffn")
    fused, first = FusedMemory(anchor, config), make_blocks(config, 1)
    fused.set(first)
    weight, start = anchor.layers[1].mlp.up_proj.weight, 64
    weight[start : start + 7] = 5.0  # by hand, to see what is written over
    fused.set((first[0], None, make_block(config, 3, 8)))
    assert mx.all(weight[start : start + 4] == 5.0).item()
    assert not mx.any(weight[start + 4 : start + 7] == 5.0).item()


def test_switching_takes_no_second_copy_of_a_matrix():
    anchor = make_anchor("openlm")
    config = MemoryConfig(32, 3, r=(1 << 14,), branching=(2,))
    blocks = [make_block(config, 1 << 14, seed) for seed in (1, 2)]
    fused = FusedMemory(anchor, config)
    fused.set(blocks[:1])
    weight = anchor.layers[0].mlp.up_proj.weight
    mx.eval(blocks)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fused.set(blocks[1:])
    assert weight.nbytes > 2_000_000
    assert mx.get_peak_memory() < before + weight.nbytes / 2


def test_fused_anchor_and_narrow_anchor_hold_what_their_parameters_need():
    def held() -> int:
        mx.synchronize()
        return mx.get_active_memory()

    anchor = make_anchor("phi3")
    config = MemoryConfig(32, 3, r=(1 << 12,), branching=(2,))
    block = make_block(config, 1 << 12, 1)
    mx.eval(block)
    before = held()
    fused = FusedMemory(anchor, config)
    fused.set((block,))
    slack = 1 << 16
    assert held() - before < block.nbytes + slack
    fused.clear()
    assert held() - before < slack


def test_memory_on_some_layers_leaves_the_others_as_they_are():
    anchor = make_anchor("llama")
    config = config_of(anchor, "ffn", layers=(0, 2))
    fused, blocks = FusedMemory(anchor, config), make_blocks(config, 4)
    fused.set(blocks)
    assert [layer.mlp.up_proj.weight.shape[0] for layer in anchor.layers] == [71, 64, 71]
    wanted = attached_logits("llama", config, blocks)
    assert mx.abs(anchor(make_ids()) - wanted).max().item() < 1e-5


@every_ffn
def test_mlx_lm_generates_what_it_generates_with_attached_memory(name):
    anchor, other = make_anchor(name), make_anchor(name)
    config = config_of(anchor, "ffn")
    rng = np.random.default_rng(7)
    blocks = (mx.array(0.6 * rng.standard_normal(config.block_shape(1), np.float32)), None, None)
    prompt = make_ids(shape=(1, 6))[0]
    fused = FusedMemory(anchor, config)
    fused.set(blocks)
    rows = FetchedMemory(blocks, config).rows
    attached = AnchorWithMemory(other, attach_memory(other, config), rows)
    mine = [token for token, _ in generate_step(prompt, anchor, max_tokens=8)]
    assert mine == [token for token, _ in generate_step(prompt, attached, max_tokens=8)]
    assert len(mine) == 8


def test_blocks_of_a_bank_in_bfloat16_join_a_float32_anchor_and_the_other_way_round():
    for anchor_type, block_type in ((mx.float32, mx.bfloat16), (mx.bfloat16, mx.float32)):
        anchor = make_anchor("qwen3")
        anchor.set_dtype(anchor_type)
        config = config_of(anchor, "ffn")
        first, _, last = make_blocks(config, 1)
        first = first.astype(block_type)
        FusedMemory(anchor, config).set((first, None, last))
        up = anchor.layers[0].mlp.up_proj.weight
        assert up.dtype == anchor_type
        assert mx.array_equal(up[64:68], first[0, 1].astype(anchor_type))


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
def test_a_quantised_anchor_is_refused_with_the_remedy(bits, mode):
    anchor = make_anchor("llama")
    quantize(anchor, bits, mode)
    with pytest.raises(UserError, match="anchor: QuantizedLinear; use the attached form"):
        FusedMemory(anchor, config_of(anchor, "ffn"))


@pytest.mark.parametrize("kind", ["lora_ffn", "lora_qk", "lora_vo", "lora", "kv"])
def test_another_kind_is_refused_with_the_remedy(kind):
    anchor = make_anchor("llama")
    with pytest.raises(UserError, match=f"kind {kind}; use the attached form"):
        FusedMemory(anchor, config_of(anchor, kind))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    anchor = make_anchor("llama")
    config = config_of(anchor, "ffn")
    for wrong in ({"hidden_size": 16}, {"num_hidden_layers": 2}, {"gated": False}):
        other = MemoryConfig(**{**config.to_dict(), **wrong})
        refused(f"made for another anchor: memory: {next(iter(wrong))}", FusedMemory, anchor, other)
    fused, blocks = FusedMemory(anchor, config), make_blocks(config, 1)
    for wrong_blocks in (blocks[:2], (blocks[2], None, blocks[0]), blocks[:1], (None,)):
        refused("does not fit", fused.set, wrong_blocks)
    assert not is_fused(anchor)
    assert same_parameters(anchor, make_anchor("llama"))
    for name in EXPERTS:
        experts = make_anchor(name)
        with pytest.raises(UserError, match="no FFN memory can join layer"):
            FusedMemory(experts, MemoryConfig(32, 3, r=(4,), branching=(2,)))


def test_one_anchor_holds_one_fused_memory():
    anchor = make_anchor("llama")
    config = config_of(anchor, "ffn")
    first, second = FusedMemory(anchor, config), FusedMemory(anchor, config)
    first.set(make_blocks(config, 1))
    refused("already", lambda: second.set(make_blocks(config, 2)))
    refused("already", FusedMemory, anchor, config)
    second.clear()  # holds nothing
    assert is_fused(anchor)
    first.clear()
    second.set(make_blocks(config, 2))
    second.clear()
    assert same_parameters(anchor, make_anchor("llama"))


def test_a_stop_half_way_leaves_the_anchor_as_it_was(monkeypatch):
    anchor = make_anchor("starcoder2")
    config = config_of(anchor, "ffn")
    for stop_at in range(1, 12):
        calls, real = [], mx.eval

        def stopping(*arrays, calls=calls, real=real, stop_at=stop_at):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            real(*arrays)

        monkeypatch.setattr(mx, "eval", stopping)
        stopped = False
        try:
            FusedMemory(anchor, config).set(make_blocks(config, 1))
        except KeyboardInterrupt:
            stopped = True
        monkeypatch.undo()
        assert stopped == (stop_at <= 10)  # three layers of up, its bias and down, and the end
        if stopped:
            assert same_parameters(anchor, make_anchor("starcoder2"))


def test_a_model_fuses_a_path_and_refuses_its_own_calls_meanwhile(model: MemoryModel):
    path = model.retriever.route("some text")
    other = model.retriever.tree.route(-model.retriever.encoder.encode(["some text"])[0])
    ids = mx.array([[5, 6, 7, 8]])
    attached = [model(ids, paths=[p]) for p in (path, other)]
    generic, alone = model(ids, memory="generic"), model(ids, memory="none")
    prompt = ids[0].tolist()
    wanted = [r.token for r in model.stream_ids(prompt, model.fetch("some text"), max_tokens=6)]
    with model.fuse(path) as fused:
        assert mx.abs(fused.anchor(ids) - attached[0]).max().item() < 1e-4
        pieces = stream_generate(fused.anchor, model.tokenizer, prompt, max_tokens=6)
        assert [piece.token for piece in pieces] == wanted
        fused.set(model.bank.fetch(other).blocks)
        assert mx.abs(fused.anchor(ids) - attached[1]).max().item() < 1e-4
        refused("fused", model, ids, paths=[path])
        refused("fused", model, ids, memory="none")
    with model.fuse() as fused:
        assert mx.abs(fused.anchor(ids) - generic).max().item() < 1e-4
    assert mx.array_equal(model(ids, memory="none"), alone)
