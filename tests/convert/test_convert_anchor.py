"""Anchors from PyTorch and back: OpenLM checkpoints and Hugging Face folders."""

import json
import os
import re
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert.anchors.openlm_config import inverse_frequencies
from convert.command import main
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, save_safetensors
from tests.helpers.anchor_checkpoints import (
    CONFIG,
    Weights,
    bits,
    convert,
    logits,
    random_openlm,
    save_hugging_face,
    save_openlm,
)
from tests.helpers.places import shared
from tests.helpers.programs import process, refused, run


def golden(name: str) -> tuple[Weights, Weights]:
    data = dict(np.load(shared("fixtures", f"openlm_tiny_ln_{name}.npz")))
    return {key[2:]: value for key, value in data.items() if key.startswith("w/")}, data


# OpenLM


@pytest.mark.parametrize("name", ["tied", "sep"])
@pytest.mark.parametrize(("shards", "prefix"), [(1, ""), (3, "_orig_mod.module.model.")])
def test_openlm_gives_the_logits_of_pytorch(tmp_path, name, shards, prefix):
    weights, data = golden(name)
    config = CONFIG | {"weight_tying": name == "tied"}
    source = save_openlm(tmp_path / "source", weights, config, shards, prefix)
    out = convert(source, tmp_path / "out")
    assert np.abs(logits(out, data["ids"]) - data["logits"]).max() < 1e-4
    assert ("lm_head.weight" in bits(out)) == (name == "sep")


@pytest.mark.parametrize("name", ["tied", "sep"])
def test_what_no_config_says_is_inferred_and_said(tmp_path, capsys, name):
    weights, data = golden(name)
    inv_freq = {f"layers.{i}.attention.pos_embed.inv_freq": inverse_frequencies(1e5, 8)
                for i in range(3)}  # fmt: skip
    source = save_openlm(tmp_path / "source", weights | inv_freq, None)
    out = convert(source, tmp_path / "out")
    assert np.abs(logits(out, data["ids"]) - data["logits"]).max() < 1e-4
    said = capsys.readouterr().err
    for words in (
        "rope_theta 100000: from inv_freq", "head_dim 8: from inv_freq", "n_heads 6: from",
        "positional_embedding_type rotary", f"weight_tying {name == 'tied'}", "qk_norm True",
        "model_norm gain_only_layer_norm", "seq_len 2048", "no tokenizer",
        "dropped layers.{i}.attention.pos_embed.inv_freq (3)",
    ):  # fmt: skip
        assert words in said


def test_the_command_line_goes_before_the_config(tmp_path):
    source = save_openlm(tmp_path / "source", random_openlm(), None)
    out = convert(source, tmp_path / "out", "--set", "seq_len=512", "--set", "model_norm=rms_norm")
    config = json.loads((out / "config.json").read_text())
    assert (config["max_position_embeddings"], config["norm_type"]) == (512, "rms_norm")


def test_without_a_buffer_the_rope_is_interleaved_with_openlms_own_base(tmp_path):
    weights = {k: v for k, v in random_openlm().items() if "inv_freq" not in k}
    source = save_openlm(tmp_path / "source", weights, {"hidden_dim": 64, "n_heads": 6})
    config = json.loads((convert(source, tmp_path / "out") / "config.json").read_text())
    assert config["rope_traditional"] is True
    assert config["rope_theta"] == 10_000


ROUND_TRIPS: list[dict[str, Any]] = [
    {},
    {"tie_word_embeddings": True, "rope_traditional": True, "norm_type": "rms_norm"},
    {"qk_norm": False, "rope_theta": 12_345.5, "norm_eps": 1e-6, "max_position_embeddings": 64},
]


@pytest.mark.parametrize("changes", ROUND_TRIPS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_openlm_to_pytorch_and_back_is_bit_equal(tmp_path, changes, dtype):
    args = ModelArgs("openlm", 32, 2, 64, 3, 8, 50, **changes)
    mx.random.seed(1)
    anchor = Model(args)
    anchor.set_dtype(dtype)
    source = tmp_path / "source"
    source.mkdir()
    save_safetensors(source / "model.safetensors", named_parameters(anchor))
    (source / "config.json").write_text(json.dumps(vars(args) | {"eos_token_id": 0}))
    (source / "tokenizer.json").write_text("{}")
    middle = convert(source, tmp_path / "torch", "--to", "pytorch")
    assert {f.name for f in middle.iterdir()} == {"model.pt", "model.json", "tokenizer.json"}
    out = convert(middle, tmp_path / "out")
    assert bits(out) == bits(source)
    assert json.loads((out / "config.json").read_text()) == vars(args) | {"eos_token_id": 0}
    assert (out / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 100}, "vocab_size is 100 in the config, 101 by"),
        ({"hidden_dim": 65}, "hidden_dim is 65 in the config, 64 by"),
        ({"n_layers": 4}, "n_layers is 4 in the config, 3 by"),
        ({"head_dim": 16}, "head_dim is 16 in the config, 8 by inv_freq"),
        ({"n_heads": 5}, "5 heads × head_dim 8 = 40, in_proj makes it 48"),
        ({"ffn_dim": 161}, "ffn_dim is 161 in the config, 160 by"),
        ({"qk_norm": False}, "qk_norm is False in the config, True by"),
        ({"weight_tying": True}, "weight_tying is true, output.weight and tok_embeddings"),
        ({"rope_theta": 10000}, "rope_theta 10000, inv_freq makes it 100000"),
        ({"positional_embedding_type": "head_rotary"}, "not supported: head_rotary"),
        ({"ffn_type": "gelu"}, "ffn_type is not supported: gelu"),
        ({"model_norm": "default_layer_norm"}, "model_norm is not supported"),
        ({"post_embed_norm": True}, "a norm after the embedding"),
        ({"qk_nrom": True}, "no meaning here: qk_nrom"),
        ({"norm_eps": "small"}, "norm_eps is not a number"),
        ({"weight_tying": "no"}, "weight_tying is not true or false"),
        ({"n_heads": 0}, "n_heads does not fit"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_one_line(tmp_path, changes, words):
    source = save_openlm(tmp_path / "source", random_openlm(), CONFIG | changes)
    refused(re.escape(words), convert, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def damaged(change: Callable[[Weights], object]) -> Weights:
    weights = random_openlm()
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("layers.1.ffn_norm.weight"), "missing: layers.1.ffn_norm.weight"),
        (lambda w: w.update({"layers.1.mlp.bias": np.zeros(3, "f4")}), "left over: layers.1.mlp"),
        (lambda w: w.update({"norm.weight": np.zeros(63, "f4")}), "norm.weight is (63,), config"),
        (lambda w: w.update({"model.norm.weight": w["norm.weight"]}), "two tensors have one name"),
        (lambda w: w.pop("tok_embeddings.weight"), "cannot tell what"),
    ],
)
def test_a_tensor_missing_left_over_or_of_the_wrong_shape_is_named(tmp_path, change, words):
    source = save_openlm(tmp_path / "source", damaged(change), CONFIG)
    refused(re.escape(words), convert, source, tmp_path / "out")


@pytest.mark.parametrize("number", [10_000_000, 10**400])
def test_one_name_makes_no_model_of_ten_million_layers(tmp_path, number):
    """It was begun, and did not end."""
    name = f"layers.{number}.ffn_norm.weight"
    config = {key: value for key, value in CONFIG.items() if key != "n_layers"}
    weights = random_openlm() | {name: np.zeros(64, "f4")}
    source = save_openlm(tmp_path / "source", weights, config)
    refused(re.escape(f"left over: {name[:200]};"), convert, source, tmp_path / "out")


def test_dtype_rounds_and_never_to_infinity(tmp_path):
    weights = random_openlm()
    source = save_openlm(tmp_path / "source", weights, CONFIG)
    out = convert(source, tmp_path / "out", "--dtype", "bfloat16")
    found = load_safetensors(out / "model.safetensors")
    wanted = mx.array(weights["tok_embeddings.weight"]).astype(mx.bfloat16)
    assert mx.array_equal(found["model.embed_tokens.weight"], wanted)
    assert all(array.dtype == mx.bfloat16 for array in found.values())
    weights["norm.weight"] = weights["norm.weight"] * 0 + 1e5
    source = save_openlm(tmp_path / "large", weights, CONFIG)
    with pytest.raises(UserError, match=r"model\.norm\.weight has numbers too large"):
        convert(source, tmp_path / "half", "--dtype", "float16")


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_pass_no_program(tmp_path, value):
    """They gave models with right checksums and empty answers."""
    model = convert(save_openlm(tmp_path / "good", random_openlm(), CONFIG), tmp_path / "model")
    weights = random_openlm()
    weights["norm.weight"][3] = value
    source = save_openlm(tmp_path / "source", weights, CONFIG)
    words = r"model\.norm\.weight has numbers that are not finite"
    refused(words, convert, source, tmp_path / "out")
    refused(words, convert, source, tmp_path / "out", "--dtype", "bfloat16")
    arrays = load_safetensors(model / "model.safetensors")
    arrays["model.norm.weight"] = mx.full(arrays["model.norm.weight"].shape, value)
    save_safetensors(model / "model.safetensors", arrays)
    said = r"norm\.weight has numbers that are not finite"
    refused(said, convert, model, tmp_path / "out", "--to", "pytorch")
    refused(words, main, ["quantize", str(model), str(tmp_path / "out"), "--anchor-bits", "4"])
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_is_chosen_from_a_folder_of_several(tmp_path):
    source = save_openlm(tmp_path / "source", random_openlm(), CONFIG)
    os.rename(source / "epoch_3.pt", source / "epoch3.pt")
    second = save_openlm(tmp_path / "second", random_openlm(1), None)
    os.rename(second / "epoch_3.pt", source / "last.pt")
    refused(r"2 checkpoints in .*epoch3\.pt, last\.pt", convert, source, tmp_path / "out")
    first = convert(source / "epoch3.pt", tmp_path / "first")
    last = convert(source / "last.pt", tmp_path / "last")
    assert bits(first) != bits(last)
    shards = save_openlm(tmp_path / "shards", random_openlm(), CONFIG, shards=3)
    one = convert(shards / "epoch_3-00002-of-00003.pt", tmp_path / "one")
    assert bits(one) == bits(first)
    (shards / "epoch_3-00002-of-00003.pt").unlink()
    refused("2 of 3 shards", convert, shards, tmp_path / "none")


# The command


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda f: None, "no such file or folder"),
        (lambda f: f.mkdir(), "no checkpoint in"),
        (lambda f: f.write_text("hello"), "is not a PyTorch checkpoint"),
        (lambda f: (f.mkdir(), (f / "bank").mkdir()), "without its hmem.json"),
        (lambda f: (f.mkdir(), (f / "config.json").write_text("[")), "not valid JSON"),
        (
            lambda f: (f.mkdir(), (f / "config.json").write_text('{"model_type": "llama"}')),
            "no weights",
        ),
    ],
)
def test_a_source_that_is_none_is_one_line(tmp_path, make, words):
    source = tmp_path / "source.pt"
    make(source)
    refused(words, convert, source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_options_that_would_do_nothing_are_refused(tmp_path):
    source = save_hugging_face(tmp_path / "source", "llama", mx.float32)
    upload = ["--to", "pytorch", "--upload", "a/b"]
    for more in (["--set", "x=1"], ["--config", "f"], upload, ["--upload", "nonsense"]):
        refused("", convert, source, tmp_path / "out", *more)
    checkpoint = save_openlm(tmp_path / "openlm", random_openlm(), CONFIG)
    for more in (["--to", "pytorch"], ["--set", "x"], ["--tokenizer", str(tmp_path / "no")]):
        refused("", convert, checkpoint, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_the_program_ends_a_wrong_input_in_one_line_and_status_2(tmp_path):
    source = save_openlm(tmp_path / "source", random_openlm(), CONFIG)
    done = process("-m", "convert", source, tmp_path / "out")
    assert done.status == 0
    assert "142,688 parameters in 36 tensors" in done.out
    again = run(main, source, tmp_path / "out")
    assert again.status == 2
    assert again.err.splitlines()[-1].startswith("error: the destination exists")
