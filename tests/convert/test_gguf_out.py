"""Anchors as GGUF files: read back to the same bits and tokens, and by transformers."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from convert.command import main
from convert.gguf.header import read_gguf
from convert.gguf.names import NAMES
from convert.gguf.out.write import stored, write_gguf
from convert.gguf.tensors import open_tensors
from mlx_hmem.anchors.load import read_config
from mlx_hmem.files import load_safetensors, save_safetensors
from tests.conftest import edit_json
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.programs import assert_refused, process, run
from tests.helpers.tiny_tokenizers import CUTS, END, TURN, save_byte_level

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
IDS = mx.array([[3, 1, 41, 5, 9, 26]])
TEXTS = [
    "the atomic number of iron is 26", "  two  spaces\n\n\nand 1234 lines ", "don't DON'T we'll",
    "naïve Åström é", "日本語 and العربية", "🙂👩‍👩‍👧 emoji", f"{END} a {TURN}[added]b", "",
]  # fmt: skip


def save(folder: Path, name: str, dtype: mx.Dtype = mx.float32) -> Path:
    save_byte_level(checkpoints.save_hugging_face(folder, name, dtype))
    if name == "phi3":  # transformers pads with a token that it has not, where no file says
        edit_json(folder / "config.json", lambda config: config.update(pad_token_id=0))
    if name == "gemma3_text":  # llama.cpp scales queries by the width of a head
        edit_json(folder / "config.json", lambda config: config.update(query_pre_attn_scalar=8))
    if name == "qwen3_moe":  # llama.cpp knows such a model with experts in all layers alone
        edit_json(folder / "config.json", lambda config: config.update(mlp_only_layers=[]))
        weights = load_safetensors(folder / "model.safetensors")
        weights = {k: v for k, v in weights.items() if not k.startswith("model.layers.0.mlp")}
        one = {k: v for k, v in weights.items() if k.startswith("model.layers.1.mlp")}
        weights |= {k.replace("layers.1", "layers.0"): v for k, v in one.items()}
        save_safetensors(folder / "model.safetensors", weights)
    return folder


def out(folder: Path, file: Path, *more: str) -> Path:
    main([str(folder), str(file), "--to", "gguf", *more])
    return file


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_comes_back_with_its_bits(tmp_path, name, dtype):
    model = save(tmp_path / "model", name, DTYPES[dtype])
    file = out(model, tmp_path / "model.gguf", "--dtype", dtype)
    back = checkpoints.convert(file, tmp_path / "back", "--dtype", dtype)
    assert checkpoints.bits(back) == checkpoints.bits(model)
    if dtype == "float32":  # all that experts know
        one, two = (checkpoints.logits(folder, IDS) for folder in (model, back))
        assert np.array_equal(one, two)


@pytest.mark.parametrize("name", CUTS)
def test_tokens_come_back(tmp_path, name):
    model = checkpoints.save_hugging_face(tmp_path / "model", "llama", mx.float32)
    edit_json(model / "config.json", lambda config: config.update(vocab_size=400))
    weights = load_safetensors(model / "model.safetensors")
    weights["model.embed_tokens.weight"] = mx.random.normal((400, 32))
    save_safetensors(model / "model.safetensors", weights)
    save_byte_level(model, name, 390, whole=True)
    number = Tokenizer.from_file(str(model / "tokenizer.json")).token_to_id(TURN)
    end = {"eos_token_id": [0, number]}
    edit_json(model / "config.json", lambda config: config.update(end))
    file = out(model, tmp_path / "model.gguf")
    assert read_gguf(file).values["tokenizer.ggml.pre"] == name
    back = checkpoints.convert(file, tmp_path / "back")
    before, after = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (model, back))
    for text in TEXTS:
        assert before.encode(text).ids == after.encode(text).ids, text
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    assert read_config(back)["eos_token_id"] == [0, number]


def test_pieces_of_sentencepiece_come_back(tmp_path):
    """Out again, a file has the tokens, scores in the same order and types that it had."""
    model = checkpoints.save_hugging_face(tmp_path / "model", "llama", mx.float32)
    edit_json(model / "config.json", lambda config: config.update(vocab_size=300))
    weights = load_safetensors(model / "model.safetensors")
    weights["model.embed_tokens.weight"] = mx.random.normal((300, 32))
    save_safetensors(model / "model.safetensors", weights)
    save_byte_level(model)
    file = out(model, tmp_path / "bytes.gguf")
    pieces = ["▁t", "he", "▁the", "in", "ro", "▁i", "▁iro", "▁iron", "an"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    tokens += [*"▁abcdehinort", "<turn>", "  ", "never"]
    types = [2, 3, 3] + [6] * 256 + [1] * (len(pieces) + 12) + [3, 4, 1]
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))] + [-1000.0] * 15
    header = read_gguf(file)
    values = {k: v for k, v in header.values.items() if not k.startswith("tokenizer.")}
    own = {"model": "llama", "tokens": tokens, "token_type": types, "scores": scores,
           "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
           "add_space_prefix": True}  # fmt: skip
    values |= {f"tokenizer.ggml.{key}": value for key, value in own.items()}
    tensors = [stored(n, tensor, "float32") for n, tensor in open_tensors(header).items()]
    write_gguf(tmp_path / "pieces.gguf", values, tensors)
    first = checkpoints.convert(tmp_path / "pieces.gguf", tmp_path / "first")
    second = checkpoints.convert(out(first, tmp_path / "again.gguf"), tmp_path / "second")
    one, two = (Tokenizer.from_file(str(f / "tokenizer.json")) for f in (first, second))
    ids = one.encode("the iron and  there<turn> in é").ids
    assert tokens.index("▁iron") in ids
    for text in ("the iron and  there<turn> in é", *TEXTS):
        assert one.encode(text).ids == two.encode(text).ids, text
    found = read_gguf(tmp_path / "again.gguf").values
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.ggml.add_bos_token"] is True
    kinds = found["tokenizer.ggml.token_type"].tolist()
    assert kinds[: len(tokens)] == [
        k if t != "  " else 1 for t, k in zip(tokens, types, strict=True)
    ]
    assert set(kinds[len(tokens) :]) == {5}
    order = np.argsort(-found["tokenizer.ggml.scores"][259 : 259 + len(pieces)], kind="stable")
    assert order.tolist() == list(range(len(pieces)))


def test_q8_0_is_what_llama_cpps_own_package_makes(tmp_path):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    model = save(tmp_path / "model", "llama")
    file = out(model, tmp_path / "model.gguf", "--dtype", "q8_0")
    header = read_gguf(file)
    kinds = {name: tensor.type.name for name, tensor in header.tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    weights = load_safetensors(model / "model.safetensors")
    own = np.array(weights["model.layers.1.mlp.up_proj.weight"])
    number = gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.dequantize(gguf.quants.quantize(own, number), number)
    found = open_tensors(header)["blk.1.ffn_up.weight"].numbers()
    np.testing.assert_array_equal(found, expected)
    assert np.abs(found - own).max() < np.abs(own).max() / 127
    assert header.values["general.file_type"] == 7


def test_rows_that_are_no_whole_blocks_are_stored_as_float16(tmp_path, model_folder, capsys):
    from convert.adapters.fuse import main as fuse
    from tests.helpers.memory_models import add_memory

    model = add_memory(save(tmp_path / "model", "qwen3"), model_folder, "ffn")
    fuse([str(model), str(tmp_path / "fused"), "--path", "2,5,11"])
    header = read_gguf(out(tmp_path / "fused", tmp_path / "f.gguf", "--dtype", "q8_0"))
    assert header.values["qwen3.feed_forward_length"] == 71
    assert header.tensors["blk.0.ffn_down.weight"].type.name == "F16"
    assert "3 matrices are stored as float16" in capsys.readouterr().err
    out(model, tmp_path / "anchor.gguf")
    assert "the memory is left out: mlx_hmem.convert fuse" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_a_folder_of_transformers_gives_the_same_file(tmp_path, name):
    model = save(tmp_path / "model", name)
    theirs = checkpoints.convert(model, tmp_path / "theirs", "--to", "pytorch")
    files = [out(f, tmp_path / "x" / f"{f.name}.gguf") for f in (model, theirs)]
    one, two = (open_tensors(read_gguf(file)) for file in files)
    assert one.keys() == two.keys()
    for each, tensor in one.items():
        np.testing.assert_array_equal(tensor.read(), two[each].read())


def test_a_quantised_anchor_is_dequantised(tmp_path):
    from convert.quantize.command import main as quantize

    model = save(tmp_path / "model", "llama")
    words = ["--anchor-bits", "4", "--anchor-group-size", "32"]
    quantize([str(model), str(tmp_path / "small"), *words])
    file = out(tmp_path / "small", tmp_path / "small.gguf", "--dtype", "float32")
    back = checkpoints.convert(file, tmp_path / "back")
    expected = checkpoints.logits(tmp_path / "small", IDS)
    assert np.abs(checkpoints.logits(model, IDS) - expected).max() > 0.01
    assert np.abs(checkpoints.logits(back, IDS) - expected).max() < 1e-5


def test_transformers_reads_the_file_to_the_same_logits(tmp_path):
    """Of those whose settings it reads from such a file: of qwen3 it takes no width of heads."""
    for package in ("torch", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install {package}")
    models = [save(tmp_path / name, name) for name in ("llama", "qwen2", "phi3")]
    folders = [tmp_path / f"{model.name}-gguf" for model in models]
    for model, folder in zip(models, folders, strict=True):
        out(model, folder / "model.gguf", "--dtype", "float32")
        np.save(folder / "ids.npy", np.array(IDS, np.int64))
    said = process("tests/helpers/torch_models.py", "gguf", *folders)
    assert said.status == 0, said.err[-2000:]
    for model, folder in zip(models, folders, strict=True):
        difference = np.load(folder / "logits.npy") - checkpoints.logits(model, IDS)
        assert np.abs(difference).max() < 1e-5, folder.name


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("scale RoPE", "dynamic")),
        ("gemma3_text", {"query_pre_attn_scalar": 9}, ("scales", "9, not 8")),
        ("qwen3", {"attention_bias": True}, ("does not compute qwen3 so", "attention_bias True")),
        ("llama", {"vocab_size": 50}, ("do not fit", "vocab", "embed_tokens")),
        ("llama", {"model_type": "mamba"}, ("llama.cpp has no such architecture", "mamba")),
        ("llama", {"quantization_config": {"bits": 4}, "hidden_size": 16}, ("do not fit",)),
    ],
)
def test_what_llama_cpp_does_not_compute_is_one_line(tmp_path, name, change, words):
    model = save(tmp_path / "model", name)
    edit_json(model / "config.json", lambda config: config.update(change))
    words = [word for word in words if word != "vocab"]
    assert_refused(run(main, model, tmp_path / "out.gguf", "--to", "gguf"), *words)
    assert os.listdir(tmp_path) == ["model"]


def test_a_tokenizer_that_llama_cpp_does_not_have_is_one_line(tmp_path):
    def said(change):
        model = save(tmp_path / "model", "llama")
        edit_json(model / "tokenizer.json", change)
        found = run(main, model, tmp_path / "out.gguf", "--to", "gguf")
        shutil.rmtree(model)
        return found

    cut = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    assert_refused(said(lambda v: v.update(pre_tokenizer=cut)), "no name for this way to cut text")
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["a", -1.0]], "byte_fallback": False}
    assert_refused(said(lambda v: v.update(model=unigram, added_tokens=[])), "no such tokenizer")
    assert_refused(said(lambda v: v.update(model=3)), "is no tokenizer")
    model = save(tmp_path / "model", "llama")
    (model / "tokenizer.json").unlink()
    assert_refused(run(main, model, tmp_path / "o.gguf", "--to", "gguf"), "no tokenizer.json")


def test_options_and_places_that_do_not_go_together_are_one_line(tmp_path, model_folder):
    model = save(tmp_path / "model", "llama")
    file = tmp_path / "out.gguf"
    assert_refused(run(main, model_folder, file, "--to", "gguf"), "no such architecture", "openlm")
    assert_refused(run(main, model, file, "--dtype", "q8_0"), "q8_0 is for --to gguf")
    assert_refused(run(main, model, file, "--to", "gguf", "-q"), "--quantize")
    assert run(main, model, file, "--to", "gguf").status == 0
    before = file.read_bytes()
    assert_refused(run(main, model, file, "--to", "gguf"), "the destination exists", "--overwrite")
    assert run(main, model, file, "--to", "gguf", "--overwrite").status == 0
    assert file.read_bytes() == before
    file.write_text("mine")
    words = ("the destination exists", "choose another")
    assert_refused(run(main, model, file, "--to", "gguf", "--overwrite"), *words)
    assert file.read_text() == "mine"
    assert_refused(run(main, file, tmp_path / "x.gguf", "--to", "gguf"))


def test_numbers_that_are_too_large_or_not_finite_leave_nothing(tmp_path):
    model = save(tmp_path / "model", "llama", mx.bfloat16)
    weights = load_safetensors(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for value, words in ((1e9, ("too large", "bfloat16")), (np.nan, ("not finite",))):
        weights[name] = mx.full(weights[name].shape, value, mx.bfloat16)
        save_safetensors(model / "model.safetensors", weights)
        assert_refused(run(main, model, tmp_path / "o.gguf", "--to", "gguf"), *words)
        assert os.listdir(tmp_path) == ["model"]
    weights[name] = mx.full(weights[name].shape, 1e9, mx.bfloat16)
    save_safetensors(model / "model.safetensors", weights)
    out(model, tmp_path / "o.gguf", "--dtype", "bfloat16")
    assert json.loads((model / "config.json").read_text())["model_type"] == "llama"
