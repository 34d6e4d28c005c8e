"""The LoRA memory of a path as an adapter: PEFT and mlx-lm compute what attached memory does."""

import importlib.util
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from convert.adapters.command import main as adapters
from convert.adapters.fuse import main
from convert.adapters.out import CONFIG, FILE
from convert.anchors.keys import rule_of
from convert.gguf.header import read_gguf
from convert.gguf.names import NAMES, to_ours
from convert.gguf.tensors import open_tensors
from mlx_hmem.anchors.load import read_config
from mlx_hmem.bank import Bank
from mlx_hmem.files import load_safetensors
from tests.convert import test_gguf_out as gguf_models
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.memory_models import PATH, add_memory, attached_logits
from tests.helpers.programs import assert_refused, process, run
from tests.helpers.references import make_ids
from tests.helpers.tiny_tokenizers import save_byte_level

PATH_OPTION = ["--path", ",".join(map(str, PATH))]
LORA = ["lora_ffn", "lora_qk", "lora_vo"]
SOME = {"kind": "lora", "targets": ("query", "output", "down"), "layers": (0, 2)}


def write(model: Path, out: Path, form: str) -> Path:
    main([str(model), str(out), *PATH_OPTION, "--as", form])
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("kind", [*LORA, "lora"])
def test_mlx_lm_computes_what_is_attached(tmp_path, model_folder, name, kind):
    if (name, kind) in [("qwen3_moe", "lora_ffn"), ("qwen3_moe", "lora"), ("gpt2", "lora")]:
        pytest.skip("a mixture of experts has no FFN for memory; gpt2 has one name for two outputs")
    model = checkpoints.save_hugging_face(tmp_path / "model", name, mx.float32)
    add_memory(model, model_folder, **(SOME if kind == "lora" else {"kind": kind}))
    out = write(model, tmp_path / "out", "mlx-lm")
    anchor, _ = load_model(model)
    alone = np.array(anchor(make_ids()))
    found = np.array(load_adapters(anchor, str(out))(make_ids()))
    expected = attached_logits(model, make_ids())
    assert np.abs(alone - expected).max() > 1e-2
    assert np.abs(found - expected).max() < 2e-5


@pytest.mark.parametrize("kind", [*LORA, "lora"])
def test_the_numbers_of_the_bank_are_those_of_the_adapter(tmp_path, model_folder, kind):
    """Bit for bit, in the dtype of the bank: α is 2, and PEFT's and mlx-lm's scale too."""
    model = checkpoints.save_hugging_face(tmp_path / "model", "llama", mx.bfloat16)
    options = SOME if kind == "lora" else {"kind": kind}
    add_memory(model, model_folder, **options, dtype="float16")
    with Bank.open(model / "bank") as bank:
        memory, names = bank.fetch(PATH), bank.config.matrices
    rows = {name: group[:, i] for group, each in zip(memory.rows, names.values(), strict=True)
            for i, name in enumerate(each)}  # fmt: skip
    peft = load_safetensors(write(model, tmp_path / "peft", "peft") / "adapter_model.safetensors")
    mlx = load_safetensors(write(model, tmp_path / "mlx", "mlx-lm") / "adapters.safetensors")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["r"]) == (14, 7)
    modules = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj",
               "output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
               "down": "mlp.down_proj"}  # fmt: skip
    count = 0
    for place, layer in enumerate(memory.config.memory_layers):
        for name in memory.config.patched:
            module = f"model.layers.{layer}.{modules[name]}"
            a, b = rows[f"{name}_a"][place], rows[f"{name}_b"][place]
            assert a.dtype == mx.float16
            assert mx.array_equal(peft[f"base_model.model.{module}.lora_A.weight"], a)
            assert mx.array_equal(peft[f"base_model.model.{module}.lora_B.weight"], b.T)
            assert mx.array_equal(mlx[f"{module}.lora_a"], a.T)
            assert mx.array_equal(mlx[f"{module}.lora_b"], b)
            count += 2
    assert count == len(peft) == len(mlx)


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gpt2"])
def test_peft_computes_what_is_attached_merged_and_not(torch_models, tmp_path, model_folder, name):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("PEFT is not installed: pip install peft")
    model = checkpoints.convert(torch_models / name, tmp_path / "model")
    kind = {"phi3": "lora_qk", "gpt2": "lora_vo"}.get(name, "lora")
    add_memory(model, model_folder, **(SOME if kind == "lora" else {"kind": kind}), size=0.15)
    out = write(model, tmp_path / "out", "peft")
    ids = np.load(torch_models / name / "ids.npy")
    np.save(out / "ids.npy", ids)
    np.save(out / "logits.npy", attached_logits(model, mx.array(ids)))
    said = process("tests/helpers/peft_logits.py", torch_models / name, out)
    assert said.status == 0, said.err[-2000:]
    assert max(json.loads(said.out.splitlines()[-1])) < 1e-5


def test_what_is_no_adapter_is_one_line(tmp_path, model_folder):
    words = (main, model_folder, tmp_path / "out", "--path", "1,2,4", "--as")
    assert_refused(run(*words, "peft"), "kind ffn is no LoRA adapter", "--as model")
    assert_refused(run(*words, "lora"), "no such --as", "'lora'")
    model = checkpoints.save_hugging_face(tmp_path / "kv", "llama", mx.float32)
    add_memory(model, model_folder, "kv")
    kv = run(main, model, tmp_path / "out", *PATH_OPTION, "--as", "mlx-lm")
    assert_refused(kv, "kind kv is no LoRA adapter", "mlx_hmem.generate")
    lora = checkpoints.save_hugging_face(tmp_path / "lora", "llama", mx.float32)
    add_memory(lora, model_folder, "lora_vo")
    words = (main, lora, tmp_path / "out", *PATH_OPTION, "--as", "peft")
    assert_refused(run(*words, "--dtype", "float16"), "an adapter keeps its numbers")
    assert not (tmp_path / "out").exists()
    assert run(*words).status == 0
    assert_refused(run(*words), "the destination exists")
    assert run(*words, "--overwrite").status == 0


def test_numbers_that_are_not_finite_become_no_adapter(tmp_path, model_folder, monkeypatch):
    model = checkpoints.save_hugging_face(tmp_path / "model", "llama", mx.float32)
    with monkeypatch.context() as patch:  # as an earlier version wrote them
        patch.setattr("mlx_hmem.bank.writer.all_finite", lambda array: True)
        add_memory(model, model_folder, "lora_vo", size=float("nan"))
    said = run(main, model, tmp_path / "out", *PATH_OPTION, "--as", "peft")
    assert_refused(said, "not finite", "verify")


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "lora_qk"), ("qwen3", "lora"), ("phi3", "lora_ffn")]
)
def test_llama_cpp_gets_the_same_pairs_under_its_names(tmp_path, model_folder, name, kind):
    """Of an architecture whose query and key it interleaves, the rows of B too."""
    model = checkpoints.save_hugging_face(tmp_path / "model", name, mx.float32)
    add_memory(model, model_folder, **(SOME if kind == "lora" else {"kind": kind}), dtype="float16")
    header = read_gguf(write(model, tmp_path / "lora.gguf", "gguf"))
    mlx = load_safetensors(write(model, tmp_path / "mlx", "mlx-lm") / "adapters.safetensors")
    values = header.values
    assert values["general.type"] == "adapter"
    assert values["adapter.type"] == "lora"
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())["lora_parameters"]
    assert values["adapter.lora.alpha"] / config["rank"] == config["scale"]
    tensors = open_tensors(header)
    assert len(tensors) == len(mlx)
    b = {n.removesuffix(".lora_b"): t for n, t in tensors.items() if n.endswith(".lora_b")}
    b = to_ours(b, NAMES[name], read_config(model))
    for each, array in mlx.items():
        module, _, end = each.rpartition(".")
        rule, _, values = rule_of(f"{module}.weight", NAMES[name].rules)
        weight = rule.torch.format(**values)
        found = tensors[f"{weight}.lora_a"] if end == "lora_a" else b[weight]
        assert found.dtype == "F16"
        np.testing.assert_array_equal(found.numbers(), np.array(array).T)


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text", "phi3", "gpt2", "starcoder2"])
def test_what_llama_cpp_asks_of_a_lora_file_holds(tmp_path, model_folder, name):
    """Its loader's checks (llama-adapter.cpp), with its own package as the reader: the values, and
    that each pair fits the matrix of its name in the anchor's own file."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    model = gguf_models.save(tmp_path / "model", name)
    anchor = gguf.GGUFReader(gguf_models.out(model, tmp_path / "anchor.gguf"))
    add_memory(model, model_folder, "lora_vo")
    lora = gguf.GGUFReader(write(model, tmp_path / "lora.gguf", "gguf"))
    values, whole = ({n: f.contents() for n, f in r.fields.items()} for r in (lora, anchor))
    assert (values["general.type"], values["adapter.type"]) == ("adapter", "lora")
    assert values["general.architecture"] == whole["general.architecture"]
    shapes = {tensor.name: list(tensor.shape) for tensor in anchor.tensors}
    pairs = {tensor.name: list(tensor.shape) for tensor in lora.tensors}
    matrices = {each.rpartition(".lora_")[0] for each in pairs}
    assert len(pairs) == 2 * len(matrices) > 0
    for matrix in matrices:
        (inputs, outputs), rank = shapes[matrix], pairs[f"{matrix}.lora_b"][0]
        assert pairs[f"{matrix}.lora_a"] == [inputs, rank]
        assert pairs[f"{matrix}.lora_b"] == [rank, outputs]
        assert values["adapter.lora.alpha"] / rank == 2  # what a bank adds: 2 · B A


@pytest.mark.parametrize("form", ["peft", "mlx-lm"])
def test_out_and_in_and_out_again_are_the_same_bits(tmp_path, model_folder, form):
    model = checkpoints.save_hugging_face(tmp_path / "model", "llama", mx.float32)
    add_memory(save_byte_level(model), model_folder, **(SOME | {"layers": None}))
    first = write(model, tmp_path / "law", form)
    anchor = tmp_path / "anchor"
    shutil.copytree(model, anchor, ignore=shutil.ignore_patterns("hmem.json", "bank", "retriever"))
    adapters([str(first), "--anchor", str(anchor), str(tmp_path / "back")])
    words = (tmp_path / "back", tmp_path / "again", "--memory-name", "law", "--as", form)
    main([str(word) for word in words])
    one, two = (load_safetensors(f / FILE[form]) for f in (first, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(mx.array_equal(array, two[each]) for each, array in one.items())
    configs = (json.loads((f / CONFIG).read_text()) for f in (first, tmp_path / "again"))
    one, two = ({k: v for k, v in config.items() if "model" not in k} for config in configs)
    assert one == two
    said = run(main, tmp_path / "back", tmp_path / "x", "--memory-name", "low")
    assert_refused(said, "no memory of this name", "low", "law")
    assert_refused(run(main, tmp_path / "back", tmp_path / "x", "--text", "a"), "by name: law")
    ordinary = write_model(tmp_path / "back", tmp_path / "fused")
    ids = make_ids()
    assert np.abs(checkpoints.logits(ordinary, ids) - attached_logits(model, ids)).max() < 2e-5


def write_model(model: Path, out: Path) -> Path:
    main([str(model), str(out), "--memory-name", "law"])
    return out
