"""Anchors from PyTorch and back: OpenLM checkpoints and Hugging Face folders."""

import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_hmem  # isort: skip  # noqa: F401  OpenBLAS goes in front before MLX is loaded
import mlx.core as mx
import numpy as np
import pytest

from convert import hugging_face
from convert.__main__ import main
from convert.openlm_config import inverse_frequencies
from convert.tensors import bits_of
from convert.torch_writer import write_torch
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, save_safetensors
from tests.tiny_anchors import LLAMA_LIKE, OTHER_KEYS, make_anchor

SHARED = Path(os.environ.get("HMEM_SHARED", Path(__file__).parents[2] / "shared"))
HF = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "gemma3_text", "phi3"]
HF += ["starcoder2", "nemotron", "gpt2", "qwen3_moe", "mixtral"]
CONFIG = {
    "hidden_dim": 64, "n_layers": 3, "n_heads": 6, "head_dim": 8, "ffn_dim": 160,
    "vocab_size": 101, "seq_len": 2048, "post_embed_norm": False, "weight_tying": False,
    "model_norm": "gain_only_layer_norm", "qk_norm": True, "ffn_type": "swiglu",
    "positional_embedding_type": "rotary", "rope_theta": 100000,
}  # fmt: skip
Weights = dict[str, np.ndarray]


def golden(name: str) -> tuple[Weights, Weights]:
    path = SHARED / "fixtures" / f"openlm_tiny_ln_{name}.npz"
    if not path.exists():
        pytest.skip(f"no golden numbers at {path}; set HMEM_SHARED")
    data = dict(np.load(path))
    return {key[2:]: value for key, value in data.items() if key.startswith("w/")}, data


def random_openlm(seed: int = 0) -> Weights:
    """A separate-headed OpenLM state dict of CONFIG's sizes, with RoPE's buffers."""
    rng = np.random.default_rng(seed)
    shapes = {"tok_embeddings": (101, 64), "norm": (64,), "output": (101, 64)}
    for i in range(3):
        shapes |= {
            f"layers.{i}.attention.in_proj": (144, 64), f"layers.{i}.attention.out_proj": (64, 48),
            f"layers.{i}.attention.q_norm": (48,), f"layers.{i}.attention.k_norm": (48,),
            f"layers.{i}.feed_forward.w12": (320, 64), f"layers.{i}.feed_forward.w3": (64, 160),
            f"layers.{i}.attention_norm": (64,), f"layers.{i}.ffn_norm": (64,),
        }  # fmt: skip
    weights = {f"{k}.weight": rng.normal(0, 0.1, s).astype("f4") for k, s in shapes.items()}
    inv_freq = inverse_frequencies(1e5, 8)
    return weights | {f"layers.{i}.attention.pos_embed.inv_freq": inv_freq for i in range(3)}


def save_openlm(
    folder: Path, weights: Weights, config: dict[str, Any] | None, shards: int = 1, prefix: str = ""
) -> Path:
    folder.mkdir()
    names = list(weights)
    for i in range(shards):
        file = "epoch_3.pt" if shards == 1 else f"epoch_3-{i + 1:05}-of-{shards:05}.pt"
        part = [(prefix + n, "F32", weights[n].shape, [weights[n]]) for n in names[i::shards]]
        write_torch(folder / file, part, {"epoch": 3, "name": "tiny"})
    if config is not None:
        (folder / "tiny.json").write_text(json.dumps(config))
    return folder


def convert(source: Path, out: Path, *more: str) -> Path:
    main([str(source), str(out), *more])
    return out


def logits(folder: Path, ids: Any) -> np.ndarray:
    anchor, _ = load_anchor(folder)
    return np.array(anchor(mx.array(ids)))


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    result = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, array in load_safetensors(file).items():
            result[name] = (str(array.dtype), array.shape, bits_of(array).tobytes())
    return result


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
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "out")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
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
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "out")
    assert words in str(error.value)


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


def test_one_checkpoint_is_chosen_from_a_folder_of_several(tmp_path):
    source = save_openlm(tmp_path / "source", random_openlm(), CONFIG)
    os.rename(source / "epoch_3.pt", source / "epoch3.pt")
    second = save_openlm(tmp_path / "second", random_openlm(1), None)
    os.rename(second / "epoch_3.pt", source / "last.pt")
    with pytest.raises(UserError, match=r"2 checkpoints in .*epoch3\.pt, last\.pt"):
        convert(source, tmp_path / "out")
    first = convert(source / "epoch3.pt", tmp_path / "first")
    last = convert(source / "last.pt", tmp_path / "last")
    assert bits(first) != bits(last)
    shards = save_openlm(tmp_path / "shards", random_openlm(), CONFIG, shards=3)
    one = convert(shards / "epoch_3-00002-of-00003.pt", tmp_path / "one")
    assert bits(one) == bits(first)
    (shards / "epoch_3-00002-of-00003.pt").unlink()
    with pytest.raises(UserError, match="2 of 3 shards"):
        convert(shards, tmp_path / "none")


# Hugging Face


def save_hugging_face(folder: Path, name: str, dtype: mx.Dtype) -> Path:
    """A tiny model of mlx-lm as a model directory."""
    folder.mkdir()
    anchor = make_anchor(name)
    anchor.set_dtype(dtype)
    weights = named_parameters(anchor)
    if name == "gemma3_text":  # only the weights tell it that it has no head of its own
        weights.pop("lm_head.weight")
    save_safetensors(folder / "model.safetensors", weights)
    config = dict(LLAMA_LIKE, model_type=name, **OTHER_KEYS.get(name, {}))
    if name == "gpt2":
        config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", HF)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_hugging_face_and_back_is_bit_equal_and_what_mlx_lm_makes(tmp_path, name, dtype):
    source = save_hugging_face(tmp_path / "source", name, dtype)
    theirs = convert(source, tmp_path / "theirs", "--to", "pytorch")
    out = convert(theirs, tmp_path / "out")
    assert bits(out) == bits(source)
    # Another way: mlx-lm's own sanitize of the PyTorch names.
    anchor = make_anchor(name)
    own = anchor.sanitize if hasattr(anchor, "sanitize") else dict
    sanitised = own(load_safetensors(theirs / "model.safetensors"))
    ours = load_safetensors(out / "model.safetensors")
    assert sanitised.keys() == ours.keys()
    assert all(mx.array_equal(array, ours[key]) for key, array in sanitised.items())


def save_bin(folder: Path, name: str, more: Weights, tied: bool = True) -> Path:
    """A tiny model as pickles in two shards, under PyTorch's names, with its config."""
    source = save_hugging_face(folder.with_name("mlx"), name, mx.float32)
    theirs = convert(source, folder.with_name("safetensors"), "--to", "pytorch")
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
    out = convert(source, tmp_path / "out")
    assert bits(out) == bits(tmp_path / "mlx")
    said = capsys.readouterr().err
    assert "dropped h.{i}.attn.bias (1): a causal mask" in said
    assert "dropped h.{i}.attn.masked_bias (1)" in said
    (source / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(UserError, match="1 of 2 weight files"):
        convert(source, tmp_path / "again")


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
    assert bits(convert(source, tmp_path / "out")) == bits(tmp_path / "mlx")
    assert "dropped lm_head.weight (1): equal to the embedding" in capsys.readouterr().err
    write_torch(file, [("lm_head.weight", "F32", (64, 32), [embedding + 1])], under=None)
    with pytest.raises(UserError, match=r"tie_word_embeddings is true, lm_head\.weight is not"):
        convert(source, tmp_path / "no")
    values = json.loads((source / "config.json").read_text())
    values.pop("tie_word_embeddings")  # then the tensors say it, not mlx-lm's default
    (source / "config.json").write_text(json.dumps(values))
    assert "lm_head.weight" in bits(convert(source, tmp_path / "separate"))


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
        ({"hidden_size": "x"}, "config.json describes no anchor"),
    ],
)
def test_a_hugging_face_config_that_does_not_fit_is_one_line(tmp_path, change, words):
    source = save_hugging_face(tmp_path / "source", "llama", mx.float32)
    values = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError) as error:
        convert(source, tmp_path / "out")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_keys_that_mlx_lm_would_miss_are_written_out(tmp_path):
    """transformers 5 keeps RoPE's base where most of mlx-lm's architectures do not look."""
    source = save_hugging_face(tmp_path / "source", "llama", mx.float32)
    values = json.loads((source / "config.json").read_text())
    values.pop("rope_theta")
    values["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}
    (source / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="where mlx-lm does not look"):
        load_anchor(source)
    converted, _ = load_anchor(convert(source, tmp_path / "out"))
    rope = converted.layers[0].self_attn.rope
    assert (rope.base, rope.scale) == (5e5, 0.25)


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
    with pytest.raises(UserError, match=words):
        convert(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_options_that_would_do_nothing_are_refused(tmp_path):
    source = save_hugging_face(tmp_path / "source", "llama", mx.float32)
    upload = ["--to", "pytorch", "--upload", "a/b"]
    for more in (["--set", "x=1"], ["--config", "f"], upload, ["--upload", "nonsense"]):
        with pytest.raises(UserError):
            convert(source, tmp_path / "out", *more)
    checkpoint = save_openlm(tmp_path / "openlm", random_openlm(), CONFIG)
    for more in (["--to", "pytorch"], ["--set", "x"], ["--tokenizer", str(tmp_path / "no")]):
        with pytest.raises(UserError):
            convert(checkpoint, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_the_program_ends_a_wrong_input_in_one_line_and_status_2(tmp_path):
    source = save_openlm(tmp_path / "source", random_openlm(), CONFIG)
    command = [sys.executable, "-m", "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "142,688 parameters in 36 tensors" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert again.stderr.splitlines()[-1].startswith("error: the destination exists")


# PyTorch itself


@pytest.fixture(scope="module")
def torch_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install torch")
    folder = tmp_path_factory.mktemp("torch")
    run_torch("make", folder, *HF)
    return folder


def run_torch(*arguments: object) -> str:
    command = [sys.executable, "-m", "tests.torch_models", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("name", HF)
def test_transformers_logits_are_kept(torch_models, tmp_path, name):
    source = torch_models / name
    out = convert(source, tmp_path / "out")
    difference = np.abs(logits(out, np.load(source / "ids.npy")) - np.load(source / "logits.npy"))
    assert difference.max() < 1e-4
    assert bits(convert(torch_models / f"{name}-bin", tmp_path / "bin")) == bits(out)


def test_transformers_reads_what_goes_back(torch_models, tmp_path):
    folders = []
    for name in HF:
        middle = convert(torch_models / name, tmp_path / f"{name}-mlx")
        folders.append(convert(middle, tmp_path / name, "--to", "pytorch"))
        for file in ("ids.npy", "logits.npy"):
            (folders[-1] / file).write_bytes((torch_models / name / file).read_bytes())
    for folder, found in json.loads(run_torch("read", *folders).splitlines()[-1]).items():
        assert found.pop("difference") < 1e-5, folder
        assert not found, folder


def test_pytorch_reads_what_openlm_goes_back_to(torch_models, tmp_path):
    weights = random_openlm()
    source = save_openlm(tmp_path / "source", weights, CONFIG)
    middle = convert(source, tmp_path / "mlx", "--dtype", "bfloat16")
    back = convert(middle, tmp_path / "back", "--to", "pytorch")
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
    assert sorted(HF) == sorted(hugging_face.hugging_face_config.SUPPORTED)
    for name in hugging_face.RULES:
        importlib.import_module(f"mlx_lm.models.{name}")
