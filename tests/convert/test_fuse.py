"""The memory of a text inside an ordinary model says what the attached memory says."""

import json
import re
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.adapters.fuse import main
from convert.adapters.matrices import floats
from mlx_hmem import load
from mlx_hmem.anchors.load import load_anchor, read_config
from mlx_hmem.bank import Bank
from mlx_hmem.bank.views import write_views
from mlx_hmem.bank_tools.command import main as bank_main
from mlx_hmem.files import load_safetensors
from tests.conftest import edit_json
from tests.helpers import anchor_checkpoints as checkpoints
from tests.helpers.memory_models import (
    PATH,
    add_memory,
    attached_logits,
    attached_tokens,
    tokens_of_mlx_lm,
)
from tests.helpers.programs import assert_refused, process, run
from tests.helpers.references import make_ids
from tests.helpers.tiny_anchors import INNER

PATH_OPTION = ["--path", ",".join(map(str, PATH))]
LORA = ["lora_ffn", "lora_qk", "lora_vo"]
WIDE = [name for name in checkpoints.HF if name not in ("gpt2", "qwen3_moe", "mixtral")]
PAIRS = [(name, "ffn") for name in WIDE]
PAIRS += [(name, kind) for name in ("llama", "gemma3_text", "phi3", "gpt2") for kind in LORA]
PAIRS += [("starcoder2", "lora_ffn"), ("qwen3_moe", "lora_qk"), ("mixtral", "lora_vo")]


def make(tmp_path: Path, trained: Path, name: str, kind: str, dtype=mx.float32, **options) -> Path:
    folder = checkpoints.save_hugging_face(tmp_path / "model", name, dtype)
    return add_memory(folder, trained, kind, **options)


def fuse(folder: Path, out: Path, *more: object) -> Path:
    main([str(word) for word in (folder, out, *(more or PATH_OPTION))])
    return out


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_mlx_lm_runs_a_fused_model_as_the_attached_one(tmp_path, model_folder, name, kind):
    model = make(tmp_path, model_folder, name, kind)
    out = fuse(model, tmp_path / "out")
    expected, ids = attached_logits(model, make_ids()), make_ids()
    assert np.abs(expected - checkpoints.logits(model, ids)).max() > 1e-2
    assert np.abs(expected - checkpoints.logits(out, ids)).max() < 2e-5
    assert tokens_of_mlx_lm(out) == attached_tokens(model)


def test_transformers_gives_the_tokens_of_the_attached_model(torch_models, tmp_path, model_folder):
    folders = []
    for name in ("llama", "qwen2", "qwen3", "gemma3_text", "phi3", "starcoder2", "gpt2"):
        model = checkpoints.convert(torch_models / name, tmp_path / f"{name}-mlx")
        add_memory(model, model_folder, "lora_ffn" if name == "gpt2" else "ffn", size=0.15)
        folders.append(fuse(model, tmp_path / name))
        ids = np.load(torch_models / name / "ids.npy")
        np.save(folders[-1] / "ids.npy", ids)
        np.save(folders[-1] / "logits.npy", attached_logits(model, mx.array(ids)))
    said = process("tests/helpers/torch_models.py", "read", *folders)
    for folder, found in json.loads(said.out.splitlines()[-1]).items():
        # mlx-lm rounds the factor of gemma's embeddings to bfloat16, whatever their dtype.
        close = 2e-4 if folder.endswith("gemma3_text") else 1e-5
        assert found.pop("difference") < close, folder
        assert not found, folder  # other tokens, missing tensors


def test_a_text_is_routed_and_the_result_is_a_model_of_its_own(
    model_folder, model, tmp_path, texts
):
    out = fuse(model_folder, tmp_path / "out", "--text", texts[0])
    fused = load(out)
    assert fused.bank is None
    path = model.retriever.route(texts[0])
    ids = mx.array([model.tokenizer.encode(texts[0])[:40]])
    expected = model(ids, paths=[path])
    assert mx.abs(expected - model(ids, memory="none")).max().item() > 0.1
    assert mx.abs(fused(ids, memory="none") - expected).max().item() < 2e-5
    prompt = texts[0][:80]
    said = "".join(p.text for p in model.stream(prompt, route_text=texts[0], max_tokens=8))
    assert said == "".join(p.text for p in fused.stream(prompt, memory="none", max_tokens=8))
    generic = load(fuse(model_folder, tmp_path / "generic", "--generic"))
    expected = model(ids, memory="generic")
    assert mx.abs(generic(ids, memory="none") - expected).max().item() < 2e-5


def test_layers_without_memory_and_levels_that_a_view_bars_get_units_of_zeros(
    tmp_path, model_folder
):
    model = make(tmp_path, model_folder, "llama", "ffn", layers=(1,))
    bank_main(["block", str(model), "2,5", "--view", "default"])
    out = fuse(model, tmp_path / "out")
    weights = load_safetensors(out / "model.safetensors")
    with Bank.open(model / "bank") as bank:
        block = np.array(bank.fetch(PATH).blocks[0])
    for layer in range(3):
        for row, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            units = np.array(weights[f"model.layers.{layer}.mlp.{name}.weight"])
            units = units[:, INNER:].T if name == "down_proj" else units[INNER:]
            wanted = np.zeros_like(units)
            if layer == 1:
                wanted[:4] = block[0, row]
            np.testing.assert_array_equal(units, wanted)
    assert read_config(out)["intermediate_size"] == INNER + 7


@pytest.mark.parametrize("kind", ["ffn", "lora_vo"])
def test_what_memory_does_not_touch_keeps_its_bits_and_sums_are_rounded_once(
    tmp_path, model_folder, kind
):
    model = make(tmp_path, model_folder, "phi3", kind, mx.bfloat16)
    before, after = checkpoints.bits(model), checkpoints.bits(fuse(model, tmp_path / "out"))
    changed = {name for name in before if before[name] != after[name]}
    ffn, vo = ("mlp.gate_up_proj", "mlp.down_proj"), ("self_attn.qkv_proj", "self_attn.o_proj")
    wanted = {
        f"model.layers.{i}.{n}.weight" for i in range(3) for n in (ffn if kind == "ffn" else vo)
    }
    assert changed == wanted
    old = load_safetensors(model / "model.safetensors")["model.layers.1.self_attn.o_proj.weight"]
    new = load_safetensors(tmp_path / "out" / "model.safetensors")
    if kind == "lora_vo":
        with Bank.open(model / "bank") as bank:
            rows = [floats(group[1]) for group in bank.fetch(PATH).rows]
        wide = floats(old) + 2 * rows[0][1].T @ rows[1][0]
        exact = fuse(model, tmp_path / "exact", *PATH_OPTION, "--dtype", "float32")
        name = "model.layers.1.self_attn.o_proj.weight"
        exact = load_safetensors(exact / "model.safetensors")[name]
        np.testing.assert_array_equal(np.array(exact), wide)
        assert mx.array_equal(new[name], exact.astype(mx.bfloat16))
    else:
        wide = new["model.layers.0.mlp.gate_up_proj.weight"]
        own = load_safetensors(model / "model.safetensors")[
            "model.layers.0.mlp.gate_up_proj.weight"
        ]
        assert mx.array_equal(wide[:INNER], own[:INNER])
        assert mx.array_equal(wide[INNER + 7 : 2 * INNER + 7], own[INNER:])


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_quantised_anchor_is_dequantised(tmp_path, wide, mode, capsys):
    from convert.quantize.command import main as quantize

    model = tmp_path / "model"
    quantize([str(wide), str(model), "--anchor-mode", mode, "--anchor-group-size", "32"])
    out = fuse(model, tmp_path / "out", "--path", "1,2,4")
    assert "its matrices are dequantised" in capsys.readouterr().err
    ids = mx.array([[5, 9, 300, 17, 80, 6]])
    expected = attached_logits(model, ids, (1, 2, 4))
    assert np.abs(checkpoints.logits(out, ids) - expected).max() < 1e-3
    assert "quantization" not in read_config(out)


@pytest.mark.parametrize(("name", "kind"), [("gpt2", "lora_ffn"), ("qwen3_moe", "lora_qk")])
def test_a_folder_with_the_names_of_pytorch_keeps_them(tmp_path, model_folder, name, kind):
    source = checkpoints.save_hugging_face(tmp_path / "source", name, mx.float32)
    theirs = checkpoints.convert(source, tmp_path / "theirs", "--to", "pytorch")
    out = fuse(add_memory(theirs, model_folder, kind), tmp_path / "out")
    ours = fuse(add_memory(source, model_folder, kind), tmp_path / "ours")
    assert checkpoints.bits(out) == checkpoints.bits(ours)
    assert checkpoints.bits(out).keys() == checkpoints.bits(theirs).keys()


def test_a_bank_that_was_added_has_its_name(tmp_path, broken):
    other = Path(shutil.copytree(broken, tmp_path / "other"))
    both = tmp_path / "both"
    bank_main(["add", str(broken), str(other), "--name", "handbook", "--out", str(both)])
    fused = [fuse(both, tmp_path / name, "--path", f"{bank}1,2,4")
             for name, bank in (("a", ""), ("b", "handbook:"))]  # fmt: skip
    assert checkpoints.bits(fused[0]) == checkpoints.bits(fused[1])
    assert_refused(run(main, both, tmp_path / "c", "--path", "guide:1"), "no such bank", "handbook")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], ("one memory is fused", "none is named", "--memory-name or --generic")),
        (["--text", "a", "--path", "1,2,4"], ("one memory is fused", "--text and --path")),
        (["--path", "1"], ("a cluster path needs 3 levels", "(1,)")),
        (["--path", "9,2,4"], ("no such cluster on level 1", "9")),
        (["--path", "1,x"], ("not a cluster path", "'1,x'")),
        (["--path", "a"], ("not a cluster path", "'a'", "3,51")),  # the name of a bank alone
        (["--path", "0,5,11"], ("not a cluster path",)),
        (["--generic", "--dtype", "int8"], ("no such --dtype",)),
    ],
)
def test_what_names_no_memory_is_one_line(tmp_path, model_folder, words, said):
    assert_refused(run(main, model_folder, tmp_path / "out", *words), *said)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_fused_is_refused_by_name(tmp_path, model_folder):
    def said(name, kind):
        model = make(tmp_path / f"{name}-{kind}", model_folder, name, kind)
        return run(main, model, tmp_path / "out", *PATH_OPTION)

    (tmp_path / "llama-kv").mkdir()
    assert_refused(said("llama", "kv"), "memory of kind kv", "mlx_hmem.generate")
    (tmp_path / "gpt2-ffn").mkdir()
    assert_refused(said("gpt2", "ffn"), "mlx-lm's gpt2 takes no other width", "c_fc")
    anchor = tmp_path / "llama-kv" / "model"
    shutil.rmtree(anchor / "bank")
    (anchor / "hmem.json").unlink()
    assert_refused(run(main, anchor, tmp_path / "out", *PATH_OPTION), "no hmem.json")
    assert not (tmp_path / "out").exists()


def test_all_that_a_view_bars_is_not_fused(tmp_path, broken):
    write_views(broken / "bank", {"default": [(1,)]})
    assert_refused(run(main, broken, tmp_path / "out", "--path", "1,2,4"), "may be fetched")
    fuse(broken, tmp_path / "out", "--path", "0,1,2")


def test_an_anchor_or_a_bank_that_is_another_is_refused(tmp_path, broken):
    edit_json(broken / "config.json", lambda config: config.update(norm_eps=1e-4))
    assert_refused(run(main, broken, tmp_path / "out", "--path", "1,2,4"), "the config is not")


def test_a_stopped_fusion_goes_on_and_another_one_begins_anew(tmp_path, model_folder, monkeypatch):
    from convert.anchors import weights

    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    whole = fuse(model_folder, tmp_path / "whole", "--path", "1,2,4")
    out, write, written = tmp_path / "out", weights.write_safetensors, []

    def stop(path, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write_safetensors", stop)
        with pytest.raises(KeyboardInterrupt):
            fuse(model_folder, out, "--path", "1,2,4")
    assert not out.exists()
    part = tmp_path / "out.part"
    times = {f.name: f.stat().st_mtime_ns for f in part.glob("model-*")}
    assert len(times) == 2
    fuse(model_folder, out, "--path", "1,2,4")
    assert times.items() <= {f.name: f.stat().st_mtime_ns for f in out.iterdir()}.items()
    assert checkpoints.bits(out) == checkpoints.bits(whole)
    assert re.search("already exists|exists", run(main, model_folder, out, "--generic").err)
    fuse(model_folder, out, "--generic", "--overwrite")
    assert checkpoints.bits(out) != checkpoints.bits(whole)
    load_anchor(out)
