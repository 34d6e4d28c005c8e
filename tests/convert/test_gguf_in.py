"""GGUF files to MLX: each architecture and each type."""

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert.anchors import weights
from convert.anchors.hugging_face_config import SUPPORTED
from convert.command import main
from convert.gguf import tensors as gguf_tensors
from convert.gguf.names import NAMES
from convert.gguf.rope import FREQS, llama3_factors, llama3_of
from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.files import load_safetensors
from tests.convert.test_convert_hugging_face import run_torch
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.faults import stop_at
from tests.helpers.gguf_models import ARCHITECTURES, to_q8, write_gguf
from tests.helpers.places import bytes_of
from tests.helpers.programs import refused

gguf = pytest.importorskip("gguf", reason="pip install gguf")
EDITS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "gemma3_text": {
        "num_hidden_layers": 6,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 8,
    },
}


def model(folder: Path, name: str, **edits: Any) -> Path:
    """A tiny random model of mlx-lm, with norms and biases that are not 0 or 1."""
    source = checkpoints.save_hugging_face(folder / f"{name}-mlx", name, mx.float32)
    changes = EDITS.get(name, {}) | edits
    if changes:
        config = json.loads((source / "config.json").read_text()) | changes
        (source / "config.json").write_text(json.dumps(config))
        from mlx_hmem.anchors.load import anchor_of_config, named_parameters

        mx.random.seed(1)
        arrays = named_parameters(anchor_of_config(config))
    else:
        arrays = load_safetensors(source / "model.safetensors")
    rng = np.random.default_rng(0)
    noise = {n: mx.array(rng.normal(0, 0.05, a.shape).astype("f4")) for n, a in arrays.items()}
    made = {n: a.astype(mx.float32) + noise[n] for n, a in arrays.items()}
    if "gemma" in name or "nemotron" in name:  # plus one is exact for few bits only
        made = {n: a.astype(mx.bfloat16).astype(mx.float32) if "norm" in n else a
                for n, a in made.items()}  # fmt: skip
    mx.save_safetensors(str(source / "model.safetensors"), made)
    return source


def converted(file: Path, *more: str) -> Path:
    return checkpoints.convert(file, file.with_suffix(""), *more)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("llama"), "llama")


def test_every_architecture_that_is_converted_has_its_table():
    assert sorted(NAMES) == sorted(SUPPORTED) == sorted(ARCHITECTURES)
    assert {name: names.architecture for name, names in NAMES.items()} == ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_llama_cpp_would_write_is_read_back_to_the_same_bits(tmp_path, name):
    source = model(tmp_path, name)
    out = converted(write_gguf(tmp_path / "m.gguf", source, name))
    assert checkpoints.bits(out) == checkpoints.bits(source)
    ids = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
    assert np.array_equal(checkpoints.logits(out, ids), checkpoints.logits(source, ids))


# With the sizes that transformers takes where it does not look into the file.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {}, "phi3": {}, "nemotron": {}, "qwen3": {"head_dim": 128},
    "gpt2": {"n_positions": 1024, "n_ctx": 1024},
    # mlx-lm rounds the root of the width to bfloat16: that of 64 it need not.
    "gemma3_text": {"head_dim": 256, "query_pre_attn_scalar": 256, "hidden_size": 64},
}  # fmt: skip


def test_transformers_reads_the_same_model_out_of_the_file(tmp_path):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install torch")
    ids = np.random.default_rng(0).integers(0, 64, (2, 40))
    for name, sizes in TRANSFORMERS.items():
        source = model(tmp_path, name, **sizes)
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "ids.npy", ids)
        more = [
            lambda w: w.add_token_list([f"<{i}>" for i in range(64)]),
            lambda w: w.add_pad_token_id(0),
        ]
        write_gguf(tmp_path / name / "m.gguf", source, name, more=more)
    pytest.importorskip("accelerate", reason="pip install accelerate")
    run_torch("gguf", *(tmp_path / name for name in TRANSFORMERS))
    for name in TRANSFORMERS:
        out = converted(tmp_path / name / "m.gguf")
        theirs = np.load(tmp_path / name / "logits.npy")
        difference = np.abs(checkpoints.logits(out, ids) - theirs).max()
        assert difference < 2e-4 * np.abs(theirs).max(), name


def random_blocks(kind: Any, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits that are numbers, as a quantised tensor of ``shape``."""
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (math.prod(shape) // block, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        good = np.isfinite(gguf.dequantize(blocks, kind)).all(axis=1)
    blocks[~good] = 0
    return blocks.reshape(*shape[:-1], -1)


KINDS = [kind.name for kind in gguf.quants._type_traits]


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_is_what_the_package_makes_of_it(tmp_path, kind, monkeypatch):
    """In chunks of odd lengths that have nothing to do with rows, and in threads."""
    monkeypatch.setattr(weights, "CHUNK", 5000)
    monkeypatch.setattr(gguf_tensors, "LINE", 768)
    number, wanted = gguf.GGMLQuantizationType[kind], {}
    source = model(tmp_path, "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=1,
                   num_key_value_heads=4, head_dim=64)  # fmt: skip

    def quantize(name: str, weight: np.ndarray) -> tuple[np.ndarray, Any]:
        data = random_blocks(number, weight.shape, len(wanted))
        with np.errstate(all="ignore"):
            wanted[name] = gguf.dequantize(data, number)
        return data, number

    out = converted(write_gguf(tmp_path / "m.gguf", source, "llama", quantize))
    found = load_safetensors(out / "model.safetensors")
    dtype = "BF16" if kind == "BF16" else "F32"
    for ours, theirs in (("model.embed_tokens", "token_embd"),
                         ("model.layers.0.self_attn.v_proj", "blk.0.attn_v"),
                         ("model.layers.0.mlp.down_proj", "blk.0.ffn_down")):  # fmt: skip
        array = found[f"{ours}.weight"]
        assert array.dtype == weights.MLX_TYPES[dtype]
        made, expected = np.array(array.astype(mx.float32)), wanted[f"{theirs}.weight"]
        assert np.array_equal(made.view("u4"), expected.astype("f4").view("u4"))
    query = np.array(found["model.layers.0.self_attn.q_proj.weight"].astype(mx.float32))
    turned = wanted["blk.0.attn_q.weight"].reshape(4, 32, 2, 256)
    assert np.array_equal(query.reshape(4, 2, 32, 256), turned.transpose(0, 2, 1, 3))


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_numbers_of_two_bytes_keep_their_bits_and_need_no_package(
    tmp_path, llama, kind, monkeypatch
):
    dtype = {"F16": mx.float16, "BF16": mx.bfloat16}[kind]

    def two_bytes(name: str, weight: np.ndarray) -> tuple[np.ndarray, Any]:
        number = gguf.GGMLQuantizationType[kind]
        return gguf.quantize(weight, number), number

    file = write_gguf(tmp_path / "m.gguf", llama, "llama", two_bytes)
    monkeypatch.setattr(gguf_tensors, "needed", None)
    found = load_safetensors(converted(file) / "model.safetensors")
    for name, array in load_safetensors(llama / "model.safetensors").items():
        rounded = array.astype(dtype) if array.ndim > 1 else array
        assert found[name].dtype == rounded.dtype
        assert mx.array_equal(found[name], rounded), name


def test_a_file_is_rounded_or_quantised_on_the_way(tmp_path, llama):
    file = write_gguf(tmp_path / "m.gguf", llama, "llama", to_q8)
    wide = load_safetensors(converted(file) / "model.safetensors")
    half = checkpoints.convert(file, tmp_path / "half", "--dtype", "float16")
    assert all(
        mx.array_equal(array, wide[name].astype(mx.float16))
        for name, array in load_safetensors(half / "model.safetensors").items()
    )
    wide_rows = model(tmp_path, "llama", hidden_size=64, head_dim=16)
    file = write_gguf(tmp_path / "w.gguf", wide_rows, "llama", to_q8)
    bits = checkpoints.convert(file, tmp_path / "bits", "-q")
    assert json.loads((bits / "config.json").read_text())["quantization"]["bits"] == 4
    load_anchor(bits)


def test_without_the_package_a_line_says_how_to_get_it(tmp_path, llama, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", llama, "llama", to_q8)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    refused(r"Q8_0 needs the package gguf: .*pip install 'mlx-hmem\[gguf\]'", converted, file)


def test_a_set_of_shards_is_converted_by_any_of_them(tmp_path, llama):
    whole = converted(write_gguf(tmp_path / "whole.gguf", llama, "llama"))
    write_gguf(tmp_path / "m.gguf", llama, "llama", split_max_tensors=6)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert len(shards) == 5
    out = checkpoints.convert(shards[2], tmp_path / "out")
    assert bytes_of(out) == bytes_of(whole)
    refused("a folder of GGUF files.*give the path of one", main, [str(tmp_path), str(out)])


def test_a_head_is_dropped_where_it_is_the_embedding(tmp_path, llama, capsys):
    embedding = np.array(load_safetensors(llama / "model.safetensors")["model.embed_tokens.weight"])
    more = [lambda w: w.add_tensor("output.weight", embedding)]
    out = converted(write_gguf(tmp_path / "tied.gguf", llama, "llama", more=more))
    assert checkpoints.bits(out) == checkpoints.bits(llama)
    assert "dropped output.weight (1): equal to the embedding" in capsys.readouterr().err
    more = [lambda w: w.add_tensor("output.weight", embedding + 1)]
    out = converted(write_gguf(tmp_path / "own.gguf", llama, "llama", more=more))
    head = load_safetensors(out / "model.safetensors")["lm_head.weight"]
    assert np.array_equal(np.array(head), embedding + 1)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize(("low", "high", "original"), [(1.0, 4.0, 8192), (1.0, 3.0, 512)])
def test_llama_3s_scaling_is_found_again_from_its_factors(tmp_path, llama, low, high, original):
    base, dims = 5e5, 64
    factors = llama3_factors(base, dims, 8.0, low, high, original).astype("f4")
    found = llama3_of([float(each) for each in factors], base)
    assert found is not None
    assert (found["factor"], found["rope_type"]) == (8.0, "llama3")
    assert found["original_max_position_embeddings"] == original
    assert (found["low_freq_factor"], round(found["high_freq_factor"], 3)) == (low, high)
    assert llama3_of([1.0] * 8, base) is None
    refused("is not of Llama 3's scaling", llama3_of, [1.0, 5.0, 2.0, 9.0], base)
    small = llama3_factors(1e4, 8, 8.0, 1.0, 4.0, 512).astype("f4")
    more = [lambda w: w.add_tensor(FREQS, small)]
    out = converted(write_gguf(tmp_path / f"{original}.gguf", llama, "llama", more=more))
    assert json.loads((out / "config.json").read_text())["rope_scaling"]["factor"] == 8.0


def test_both_lists_of_phi_3_are_kept(tmp_path):
    source = model(tmp_path, "phi3")
    more = [
        lambda w: w.add_tensor("rope_factors_long.weight", np.array([1, 2, 3, 4], "f4")),
        lambda w: w.add_tensor("rope_factors_short.weight", np.array([1, 1, 1, 1.5], "f4")),
        lambda w: w.add_rope_scaling_attn_factors(1.19),
    ]
    out = converted(write_gguf(tmp_path / "m.gguf", source, "phi3", more=more))
    scaling = json.loads((out / "config.json").read_text())["rope_scaling"]
    assert (scaling["type"], scaling["long_factor"]) == ("longrope", [1.0, 2.0, 3.0, 4.0])
    assert scaling["short_factor"] == [1.0, 1.0, 1.0, 1.5]
    load_anchor(out)


def scaled(kind: str, factor: float = 4.0) -> Any:
    def add(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(64)

    return add


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_other_scalings_of_rope_go_into_the_config(tmp_path, llama, kind):
    out = converted(write_gguf(tmp_path / "m.gguf", llama, "llama", more=[scaled(kind)]))
    anchor, config = load_anchor(out)
    assert config["rope_scaling"]["factor"] == 4.0
    assert type(anchor.layers[0].self_attn.rope).__name__ == {"yarn": "YarnRoPE"}.get(kind, "RoPE")


@pytest.mark.parametrize(("dtype", "said"), [("float16", True), ("bfloat16", False)])
def test_gemma_in_float16_has_a_line(tmp_path, dtype, said, capsys):
    """Its sums go up to 10^5, and mlx-lm cuts them at 65,504: of Gemma 3 270M perplexity 20.6 in
    bfloat16 was 22.1."""
    file = write_gguf(tmp_path / "m.gguf", model(tmp_path, "gemma3_text"), "gemma3_text")
    converted(file, "--dtype", dtype)
    assert ("worse in float16" in capsys.readouterr().err) == said


def test_a_tokenizer_of_ones_own_goes_before_that_of_the_file(tmp_path, llama):
    more = [
        lambda w: w.add_tokenizer_model("gpt2"),
        lambda w: w.add_token_list([str(i) for i in range(64)]),
        lambda w: w.add_eos_token_id(5),
        lambda w: w.add_eot_token_id(6),
    ]
    file = write_gguf(tmp_path / "m.gguf", llama, "llama", more=more)
    refused("names no pre-tokenizer that is known", converted, file)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "tokenizer.json").write_text("{}")
    out = converted(file, "--tokenizer", str(tmp_path / "own"))
    assert (out / "tokenizer.json").read_text() == "{}"
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [5, 6]
    refused("this option is for OpenLM", converted, file, "--set", "n_heads=1")


def test_a_conversion_that_was_stopped_goes_on(tmp_path, llama, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf", llama, "llama", to_q8)
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    whole, out = converted(file), tmp_path / "out"
    stop_at(monkeypatch, weights, "write_safetensors", 3)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert(file, out)
    monkeypatch.undo()
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    part = tmp_path / "out.part"
    before = {f.name: f.stat().st_mtime_ns for f in part.glob("model*.safetensors")}
    assert len(before) == 2
    assert not (part / "config.json").exists()
    os.utime(file, ns=(1, 1))  # another file: what lies there is of no use
    checkpoints.convert(file, tmp_path / "anew")
    checkpoints.convert(file, out)
    assert bytes_of(out) == bytes_of(whole)
