"""GGUF files that are not converted, each with one line."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.command import main
from tests.convert.test_gguf_in import converted, model, scaled
from tests.helpers.gguf_models import write_gguf
from tests.helpers.programs import refused

gguf = pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model(tmp_path_factory.mktemp("gguf"), "llama")


FAULTS: dict[str, tuple[Any, str]] = {
    "another scaling": (scaled("su"), "no such scaling of RoPE is converted: su"),
    "a part of RoPE": (lambda w: w.add_uint32("llama.rope.dimension_count", 4), "4 of 8 numbers"),
    "two widths": (lambda w: w.add_uint32("llama.attention.value_length", 4), "of two widths"),
    "layers that differ": (
        lambda w: w.add_array("llama.attention.head_count_kv", [2, 1, 2]),
        "layers that differ are not converted: llama.attention.head_count_kv",
    ),
    "a text for a number": (
        lambda w: w.add_string("llama.block_count", "3"), "llama.block_count is no int: '3'"
    ),
    "too many layers": (lambda w: w.add_uint32("llama.block_count", 5), "missing: blk.3."),
    "too few layers": (lambda w: w.add_uint32("llama.block_count", 2), "left over: blk.2."),
    "layers without end": (
        lambda w: w.add_uint32("llama.block_count", 2**31 - 1), "fewer tensors than layers: 214748"
    ),
    "another size": (
        lambda w: w.add_uint32("llama.feed_forward_length", 63),
        r"blk.0.ffn_gate.weight is \(64, 32\), config.json makes it \(63, 32\)",
    ),
    "no heads": (lambda w: w.add_uint32("llama.attention.head_count", 0), "without heads"),
    "a norm that is none": (
        lambda w: w.add_float32("llama.attention.layer_norm_rms_epsilon", math.nan),
        "is no float: nan",
    ),
    "a tensor of no use": (
        lambda w: w.add_tensor("blk.0.mtp.weight", np.zeros(4, "f4")), "left over: blk.0.mtp.weight"
    ),
    "an adapter": (
        lambda w: w.add_string("general.type", "adapter"), "holds no model: general.type adapter"
    ),
    "no number": (
        lambda w: w.add_tensor("output.weight", np.full((64, 32), np.inf, "f4")), "are not finite"
    ),
    "capped logits": (
        lambda w: w.add_final_logit_softcapping(30.0), "does not heed this setting: final_logit"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line(tmp_path, llama, fault, monkeypatch):
    add, words = FAULTS[fault]

    def instead(writer: Any) -> None:
        made = gguf.GGUFWriter(tmp_path / "other", "llama")
        add(made)
        for found in made.kv_data:
            for key, value in found.items():
                if key != "general.architecture":
                    writer.kv_data[0][key] = value
        for found in made.tensors:
            for name, info in found.items():
                writer.add_tensor(name, info.tensor)

    write_gguf(tmp_path / "m.gguf", llama, "llama", more=[instead])
    refused(words, converted, tmp_path / "m.gguf")
    assert not (tmp_path / "m").exists()


def test_an_unknown_architecture_and_type_are_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(
        "no such architecture is converted: mamba; known: llama, qwen2",
        converted,
        tmp_path / "m.gguf",
    )
    refused("becomes a model of MLX", main, [str(tmp_path / "m.gguf"), "out", "--to", "pytorch"])


def test_what_nothing_asks_for_is_named(tmp_path, llama, capsys):
    more = [lambda w: w.add_float32("llama.expert_weights_scale", 2.5),
            lambda w: w.add_vocab_size(64)]  # fmt: skip
    converted(write_gguf(tmp_path / "m.gguf", llama, "llama", more=more))
    said = "settings that are not used: llama.expert_weights_scale\n"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "Q1_0"])
def test_a_type_that_nobody_dequantises_is_named_with_what_helps(tmp_path, kind):
    source = model(tmp_path, "llama", hidden_size=256, intermediate_size=512, head_dim=64)
    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]

    def zeros(name: str, weight: np.ndarray) -> tuple[np.ndarray, Any]:
        width = weight.shape[-1] // block * nbytes
        return np.zeros((*weight.shape[:-1], width), np.uint8), number

    file = write_gguf(tmp_path / "m.gguf", source, "llama", zeros)
    refused(f"not dequantised: {kind}; use another file of this model", converted, file)
    assert not (tmp_path / "m").exists()


def test_a_gguf_that_is_said_to_be_a_folder_is_one_line(llama, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", llama, "llama")
    words = [str(file), str(tmp_path / "out"), "--from", "huggingface"]
    refused("takes a folder: .*leave --from out", main, words)
