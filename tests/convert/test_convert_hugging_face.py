"""Hugging Face folders to MLX and back, bit for bit and with the logits of PyTorch."""

import hashlib
import importlib
import json
import os
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.anchors import hugging_face
from convert.torch_files.tensors import bits_of
from convert.torch_files.writer import write_torch
from mlx_hmem.anchors.load import INDEX, anchor_hash, load_anchor
from mlx_hmem.budget.needs import needs_of
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, save_safetensors
from tests.conftest import edit_json
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.programs import process, refused
from tests.helpers.tiny_anchors import make_anchor


@pytest.mark.parametrize("name", checkpoints.HF)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_hugging_face_and_back_is_bit_equal_and_what_mlx_lm_makes(tmp_path, name, dtype):
    source = checkpoints.save_hugging_face(tmp_path / "source", name, dtype)
    theirs = checkpoints.convert(source, tmp_path / "theirs", "--to", "pytorch")
    out = checkpoints.convert(theirs, tmp_path / "out")
    assert checkpoints.bits(out) == checkpoints.bits(source)
    # Another way: mlx-lm's own sanitize of the PyTorch names.
    anchor = make_anchor(name)
    own = anchor.sanitize if hasattr(anchor, "sanitize") else dict
    sanitised = own(load_safetensors(theirs / "model.safetensors"))
    ours = load_safetensors(out / "model.safetensors")
    assert sanitised.keys() == ours.keys()
    assert all(mx.array_equal(array, ours[key]) for key, array in sanitised.items())


def renamed(folder: Path, new_name, more: checkpoints.Weights | None = None) -> Path:
    """The weights under other names, and more beside them."""
    file = folder / "model.safetensors"
    weights = {new_name(name): array for name, array in load_safetensors(file).items()}
    save_safetensors(file, weights | {n: mx.array(a) for n, a in (more or {}).items()})
    return folder


@pytest.mark.parametrize("name", checkpoints.HF)
def test_names_that_wrappers_left_are_read(tmp_path, name):
    """torch.compile of each layer, FSDP and activation checkpointing, DDP, a module around it all;
    or the model without what stands around its layers."""
    source = checkpoints.save_hugging_face(tmp_path / "source", name, mx.float32)
    theirs = checkpoints.convert(source, tmp_path / "theirs", "--to", "pytorch")

    def wrapped(name: str) -> str:
        within = "\\1_orig_mod._checkpoint_wrapped_module."
        inner = re.sub(r"((?:layers|h)\.\d+\.)", within, name)
        return f"_orig_mod.module.model._fsdp_wrapped_module.{inner}"

    for new_name in (wrapped, lambda name: name.removeprefix("model.")):
        source = renamed(Path(shutil.copytree(theirs, tmp_path / "renamed")), new_name)
        out = checkpoints.convert(source, tmp_path / "out")
        assert checkpoints.bits(out) == checkpoints.bits(tmp_path / "source")
        shutil.rmtree(source)
        shutil.rmtree(out)


def test_one_tensor_under_two_wrappers_is_refused(tmp_path):
    source = checkpoints.save_hugging_face(tmp_path / "source", "llama", mx.float32)
    renamed(source, lambda name: name, {"module.model.norm.weight": np.ones(32, "f4")})
    words = "two tensors have one name without prefixes: norm.weight"
    refused(words, checkpoints.convert, source, tmp_path / "out")


@pytest.mark.parametrize("front", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_pictures_the_text_is_kept(tmp_path, capsys, front):
    """Both layouts that transformers has given Gemma 3."""
    source = checkpoints.save_hugging_face(tmp_path / "source", "gemma3_text", mx.float32)
    right, eyes = checkpoints.bits(source), "model." if front.startswith("model.") else ""
    more = {f"{eyes}vision_tower.x.weight": np.ones((2, 2), "f4"),
            f"{eyes}multi_modal_projector.y": np.ones(2, "f4")}  # fmt: skip
    renamed(source, lambda name: front + name.removeprefix("model."), more)
    text = json.loads((source / "config.json").read_text())
    outer = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "eos_token_id": [1]}
    (source / "config.json").write_text(json.dumps(outer))
    out = checkpoints.convert(source, tmp_path / "out")
    assert checkpoints.bits(out) == right
    found = json.loads((out / "config.json").read_text())
    assert (found["model_type"], found["eos_token_id"]) == ("gemma3_text", [1])
    assert {key: found[key] for key in text} == text
    said = capsys.readouterr().err
    assert "dropped vision_tower.{any} (1): it sees pictures" in said
    assert "dropped multi_modal_projector.{any} (1)" in said
    load_anchor(out)
    for text_config in (
        None,
        {"model_type": "llama"},
        {"model_type": "gemma3_text", "head_dim": 0},
    ):
        (source / "config.json").write_text(json.dumps(outer | {"text_config": text_config}))
        words = "head_dim is not a whole number|text_config is not one of gemma3_text"
        refused(words, checkpoints.convert, source, tmp_path / "no")


def test_what_a_text_config_leaves_out_is_what_transformers_takes():
    config = importlib.import_module("transformers.models.gemma3.configuration_gemma3")
    theirs = config.Gemma3TextConfig()
    ours = hugging_face.hugging_face_config.TEXT_MODELS["gemma3"]
    assert {key: getattr(theirs, key) for key in ours} == ours


def save_bin(folder: Path, name: str, more: checkpoints.Weights, tied: bool = True) -> Path:
    """A tiny model as pickles in two shards, under PyTorch's names, with its config."""
    source = checkpoints.save_hugging_face(folder.with_name("mlx"), name, mx.float32)
    theirs = checkpoints.convert(source, folder.with_name("safetensors"), "--to", "pytorch")
    tensors = load_safetensors(theirs / "model.safetensors")
    weights = {key: np.array(array) for key, array in tensors.items()} | more
    folder.mkdir()
    names = list(weights)
    for i in range(2):
        part = [(n, "F32", weights[n].shape, [weights[n]]) for n in names[i::2]]
        write_torch(folder / f"pytorch_model-{i + 1:05}-of-00002.bin", part, under=None)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_pickles_give_what_safetensors_give_and_drop_only_what_is_known(tmp_path, capsys):
    more = {"h.0.attn.bias": np.ones((1, 1, 8, 8), "f4"), "h.0.attn.masked_bias": np.ones(1, "f4")}
    source = save_bin(tmp_path / "source", "gpt2", more)
    out = checkpoints.convert(source, tmp_path / "out")
    assert checkpoints.bits(out) == checkpoints.bits(tmp_path / "mlx")
    said = capsys.readouterr().err
    assert "dropped h.{i}.attn.bias (1): a causal mask" in said
    assert "dropped h.{i}.attn.masked_bias (1)" in said
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    refused("1 of 2 weight files", checkpoints.convert, source, tmp_path / "again")


def test_an_index_says_which_files_count_and_what_lies_beside_is_named(tmp_path, capsys):
    """A stray model.safetensors beside an index was loaded in place of the right weights."""
    source = checkpoints.save_hugging_face(tmp_path / "source", "llama", mx.float32)
    right = checkpoints.bits(source)
    weights = load_safetensors(source / "model.safetensors")
    where = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(weights)}
    for file in set(where.values()):
        save_safetensors(source / file, {n: weights[n] for n in weights if where[n] == file})
    save_safetensors(
        source / "model.safetensors", {n: array + 1 for n, array in weights.items()}
    )  # other weights
    (source / INDEX).write_text(json.dumps({"weight_map": where}))
    assert checkpoints.bits(checkpoints.convert(source, tmp_path / "out")) == right
    said = capsys.readouterr().err
    assert "not read: model.safetensors; the weights are part-0.safetensors and 1 more" in said
    refused(f"model.safetensors: {INDEX} does not name it; move", anchor_hash, source)
    (source / "model.safetensors").unlink()
    refused("reads weights that are called model.*convert the model", anchor_hash, source)
    (source / "part-0.safetensors").unlink()
    missing = "1 of 2 weight files are missing: part-0.safetensors in"
    refused(missing, checkpoints.convert, source, tmp_path / "again")
    refused(missing, needs_of, source)
    (source / INDEX).unlink()
    os.rename(source / "part-1.safetensors", source / "model-00001-of-00002.safetensors")
    for program in (anchor_hash, load_anchor, needs_of, hugging_face.weight_files):
        refused("1 of 2 weight files are there", program, source)


def test_a_head_is_dropped_only_where_it_is_the_embedding(tmp_path, capsys):
    source = save_bin(tmp_path / "source", "llama", {})
    embedding = np.array(
        load_safetensors(tmp_path / "mlx" / "model.safetensors")["model.embed_tokens.weight"]
    )
    file = source / "pytorch_model-00003-of-00003.bin"
    for i in (1, 2):
        os.rename(
            source / f"pytorch_model-{i:05}-of-00002.bin",
            source / f"pytorch_model-{i:05}-of-00003.bin",
        )
    write_torch(file, [("lm_head.weight", "F32", (64, 32), [embedding])], under=None)
    assert checkpoints.bits(checkpoints.convert(source, tmp_path / "out")) == checkpoints.bits(
        tmp_path / "mlx"
    )
    assert "dropped lm_head.weight (1): equal to the embedding" in capsys.readouterr().err
    write_torch(file, [("lm_head.weight", "F32", (64, 32), [embedding + 1])], under=None)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, lm_head\.weight is not"):
        checkpoints.convert(source, tmp_path / "no")
    values = json.loads((source / "config.json").read_text())
    values.pop("tie_word_embeddings")  # then the tensors say it, not mlx-lm's default
    (source / "config.json").write_text(json.dumps(values))
    assert "lm_head.weight" in checkpoints.bits(checkpoints.convert(source, tmp_path / "separate"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"vocab_size": 65},
            "model.embed_tokens.weight is (64, 32), config.json makes it (65, 32)",
        ),
        ({"num_hidden_layers": 4}, "missing: model.layers.3."),
        ({"num_hidden_layers": 2}, "left over: model.layers.2."),
        ({"hidden_act": "gelu"}, "mlx-lm computes llama with silu only: hidden_act gelu"),
        ({"quantization_config": {"bits": 4}}, "the source is quantised"),
        ({"model_type": "mamba"}, "no such architecture is converted: mamba"),
        ({"rope_parameters": {"rope_theta": 3e4}}, "rope_theta is 10000.0 and in rope_parameters"),
        ({"hidden_size": "x"}, "hidden_size is not a whole number from 1 to"),
    ],
)
def test_a_hugging_face_config_that_does_not_fit_is_one_line(tmp_path, change, words):
    source = checkpoints.save_hugging_face(tmp_path / "source", "llama", mx.float32)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | change))
    refused(re.escape(words), checkpoints.convert, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("granite", {"rope_scaling": -1}, "rope_scaling is not a table: -1"),
        ("mixtral", {"rope_parameters": 10**40}, "rope_parameters is not a table"),
        ("mixtral", {"sliding_window": "\ud800"}, "sliding_window is not a whole number"),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts is not a whole number from 1"),
        ("qwen3_moe", {"num_experts": 10**7}, "num_experts is not a whole number from 1 to 4096"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "rope_parameters is no table"),
    ],
)
def test_values_that_no_config_has_are_one_line(tmp_path, name, change, words):
    """They were tracebacks, and ten million experts had no end."""
    source = checkpoints.save_hugging_face(tmp_path / "source", name, mx.float32)
    edit_json(source / "config.json", lambda config: config.update(change))
    refused(words, checkpoints.convert, source, tmp_path / "out")


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        ([], "norm_type is not a text"),
        (False, "norm_type is not a text"),
        ("none", "config.json describes no anchor"),
    ],
)
def test_values_that_openlm_does_not_have_go_back_in_one_line(tmp_path, norm, words):
    source = checkpoints.save_openlm(tmp_path / "s", checkpoints.random_openlm(), None)
    model = checkpoints.convert(source, tmp_path / "model", "--set", "head_dim=8")
    edit_json(model / "config.json", lambda config: config.update(norm_type=norm))
    refused(words, checkpoints.convert, model, tmp_path / "out", "--to", "pytorch")


def test_the_keys_that_mlx_lm_would_miss_are_written_out(tmp_path):
    """transformers 5 keeps RoPE's base where most of mlx-lm's architectures do not look."""
    source = checkpoints.save_hugging_face(tmp_path / "source", "llama", mx.float32)
    values = json.loads((source / "config.json").read_text())
    values.pop("rope_theta")
    values["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    (source / "config.json").write_text(json.dumps(values))
    refused("where mlx-lm does not look", load_anchor, source)
    converted, _ = load_anchor(checkpoints.convert(source, tmp_path / "out"))
    rope = converted.layers[0].self_attn.rope
    assert (rope.base, rope.scale) == (5e5, 0.25)


# PyTorch itself


def run_torch(*arguments: object) -> str:
    done = process("tests/helpers/torch_models.py", *arguments)
    assert done.status == 0, done.err[-2000:]
    return done.out


@pytest.mark.parametrize("name", checkpoints.HF)
def test_transformers_logits_are_kept(torch_models, tmp_path, name):
    source = torch_models / name
    out = checkpoints.convert(source, tmp_path / "out")
    difference = np.abs(
        checkpoints.logits(out, np.load(source / "ids.npy")) - np.load(source / "logits.npy")
    )
    assert difference.max() < 1e-4
    assert checkpoints.bits(
        checkpoints.convert(torch_models / f"{name}-bin", tmp_path / "bin")
    ) == checkpoints.bits(out)


def test_transformers_reads_what_goes_back(torch_models, tmp_path):
    folders = []
    for name in checkpoints.HF:
        middle = checkpoints.convert(torch_models / name, tmp_path / f"{name}-mlx")
        folders.append(checkpoints.convert(middle, tmp_path / name, "--to", "pytorch"))
        for file in ("ids.npy", "logits.npy"):
            (folders[-1] / file).write_bytes((torch_models / name / file).read_bytes())
    for folder, found in json.loads(run_torch("read", *folders).splitlines()[-1]).items():
        assert found.pop("difference") < 1e-5, folder
        assert not found, folder


def test_pytorch_reads_what_openlm_goes_back_to(torch_models, tmp_path):
    weights = checkpoints.random_openlm()
    source = checkpoints.save_openlm(tmp_path / "source", weights, checkpoints.CONFIG)
    middle = checkpoints.convert(source, tmp_path / "mlx", "--dtype", "bfloat16")
    back = checkpoints.convert(middle, tmp_path / "back", "--to", "pytorch")
    found = json.loads(run_torch("hash", back / "model.pt").splitlines()[-1])
    assert found.keys() == weights.keys()
    for name, (dtype, shape, digest) in found.items():
        array = mx.array(weights[name])
        if "inv_freq" not in name:
            assert dtype == "torch.bfloat16"
            array = array.astype(mx.bfloat16)
        assert tuple(shape) == array.shape
        assert digest == hashlib.sha256(bits_of(array).tobytes()).hexdigest(), name


def test_the_table_names_only_architectures_that_memory_can_join():
    assert sorted(checkpoints.HF) == sorted(hugging_face.hugging_face_config.SUPPORTED)
    for name in hugging_face.RULES:
        importlib.import_module(f"mlx_lm.models.{name}")


def test_json_that_goes_along_loses_its_byte_order_mark(tmp_path):
    """mlx-lm and transformers do not read one; what was converted would not load."""
    source = checkpoints.save_hugging_face(tmp_path / "source", "llama", mx.float32)
    text = json.dumps({"eos_token_id": 3, "name": "\u00e9"}, ensure_ascii=False)
    for number, encoding in enumerate(("utf-8-sig", "utf-16")):
        (source / "generation_config.json").write_bytes(text.encode(encoding))
        theirs = checkpoints.convert(source, tmp_path / f"theirs-{number}", "--to", "pytorch")
        assert (theirs / "generation_config.json").read_bytes() == text.encode()
