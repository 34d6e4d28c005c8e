"""Adapters that are damaged, or more than LoRA of this anchor: one line each."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_hmem import load
from mlx_hmem.files import save_safetensors
from mlx_hmem.memory import split_block
from tests.conftest import edit_json
from tests.helpers.mlx_adapters import adapters
from tests.helpers.programs import refused


def test_damaged_files_of_an_adapter_are_one_line(anchor, saved, tmp_path):
    whole = (saved[0] / "adapters.safetensors").read_bytes()
    header = b'{"a.lora_a":{"dtype":"F32","shape":[1152921504606846976,16],"data_offsets":[0,4]}}'
    huge = len(header).to_bytes(8, "little") + header + bytes(4)
    for number, data in enumerate((b"", whole[:-1], whole + b"0", huge, b"\x80\x02" + whole)):
        wrong = Path(shutil.copytree(saved[0], tmp_path / f"wrong-{number}"))
        (wrong / "adapters.safetensors").write_bytes(data)
        refused("", adapters, wrong, anchor=anchor, out=tmp_path / "out")
    for number, text in enumerate(("", "[1]", "[" * 9000, '{"peft_type":1}', '{"a":1,"a":2}')):
        wrong = Path(shutil.copytree(saved[0], tmp_path / f"wrong-json-{number}"))
        (wrong / "adapter_config.json").write_text(text)
        refused("", adapters, wrong, anchor=anchor, out=tmp_path / "out")


@pytest.mark.parametrize(
    "names", [{}, [], {"a": [0, 1]}, {"a": [9]}, {"a": ["0"]}, {"a": 0}, {"": [0]}, None], ids=repr
)
def test_wrong_names_in_hmem_json_are_refused(named, tmp_path, names):
    copy = Path(shutil.copytree(named, tmp_path / "model"))
    edit_json(copy / "hmem.json", lambda values: values.update(names=names))
    refused("", load, copy)


def changed(folder: Path, place: Path, **keys) -> Path:
    """A copy of an adapter whose config has other values."""
    copy = Path(shutil.copytree(folder, place))
    edit_json(copy / "adapter_config.json", lambda values: values.update(keys))
    return copy


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type 'dora'; merge it"),
        ({"fine_tune_type": "full"}, "fine_tune_type 'full'"),
        ({"lora_parameters": {"rank": 3}}, "scale of lora_parameters is not a number"),
        ({"lora_parameters": {"rank": 3, "scale": True}}, "scale"),
        ({"lora_parameters": {"rank": 3, "scale": 1e300}}, "scale"),
        ({"lora_parameters": {"rank": 5, "scale": 1.0}}, "another rank than its weights: 5"),
        ({"lora_parameters": [1]}, "scale"),
        ({"peft_type": "LORA"}, "it needs adapter_model.safetensors or adapter_model.bin"),
    ],
    ids=repr,
)
def test_what_mlx_lms_config_says_otherwise_is_refused(anchor, saved, tmp_path, keys, words):
    wrong = changed(saved[0], tmp_path / "wrong", **keys)
    refused(words, adapters, wrong, anchor=anchor, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


PEFT = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", "bias": "none"}
Q = "base_model.model.model.layers.1.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.default.weight": (2, 32), f"{Q}.lora_B.default.weight": (32, 2)}


def save_peft(folder: Path, shapes=PAIR, **keys) -> Path:
    folder.mkdir()
    tensors = {name: mx.ones(shape) for name, shape in shapes.items()}
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | keys))
    return folder


@pytest.mark.parametrize(
    ("dtype", "alpha", "stored"),
    [("bfloat16", 4, "bfloat16"), ("bfloat16", 8, "bfloat16"), ("bfloat16", 6, "float32"),
     ("float16", 4, "float16"), ("float16", 2, "float32"), ("float32", 6, "float32")],
)  # fmt: skip
def test_the_bank_has_a_dtype_in_which_the_adapter_is_exact(anchor, tmp_path, dtype, alpha, stored):
    folder = save_peft(tmp_path / "one", lora_alpha=alpha)  # of rank 2
    mx.random.seed(0)
    a, b = (mx.random.normal(shape).astype(getattr(mx, dtype)) for shape in PAIR.values())
    tensors = dict(zip(PAIR, (a, b), strict=True))
    save_safetensors(folder / "adapter_model.safetensors", tensors)
    with load(adapters(folder, anchor=anchor, out=tmp_path / "out")).bank as opened:
        assert opened.dtype == stored
        groups = split_block(opened.blocks([(1, 0)])[0].astype(mx.float32), opened.config)
        assert mx.array_equal(groups[0][0, 0], a.astype(mx.float32))
        assert mx.array_equal(groups[1][0, 0], b.astype(mx.float32).T * (alpha / 4))


def renamed(old: str, new: str) -> dict:
    return {name.replace(old, new): shape for name, shape in PAIR.items()}


@pytest.mark.parametrize(
    ("shapes", "keys", "words"),
    [
        (PAIR, {"peft_type": "IA3"}, "peft_type 'IA3'"),
        (PAIR, {"use_dora": True}, "use_dora True; merge it into the model"),
        (PAIR, {"modules_to_save": ["lm_head"]}, "modules_to_save .*merge_and_unload"),
        (PAIR, {"bias": "all"}, "bias 'all'"),
        # PEFT subtracts it from the anchor's weights, in training and whenever it loads.
        (PAIR, {"init_lora_weights": "pissa_niter_4"}, "changing the anchor's .*merge it into"),
        (PAIR, {"target_modules": ["q_proj"]}, "missing: layers.0.self_attn.q_proj"),
        (PAIR, {"layer_replication": [[0, 2]]}, "layer_replication"),
        (PAIR, {"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS'"),
        (PAIR, {"rank_pattern": {"(a+)+$": 3}}, "rank_pattern names no modules"),
        (PAIR, {"rank_pattern": {"q_proj": 3}}, "another rank than its weights: 3"),
        (PAIR, {"alpha_pattern": {"q_proj": "much"}}, "lora_alpha is not a number"),
        (PAIR, {"lora_alpha": 1e400}, "is not valid JSON"),
        (PAIR, {"r": 0}, "another rank"),
        (renamed("model.layers.1.self_attn.q_proj", "lm_head"), {}, "no projection .*lm_head"),
        (renamed("layers.1", "layers.7"), {}, "no projection of a layer: .*layers.7"),
        (renamed("lora_A", "lora_embedding_A"), {}, "left over: .*lora_embedding_A"),
        ({n: s for n, s in PAIR.items() if "_A" in n}, {}, "missing: .*lora_B"),
        (PAIR | {f"{Q}.lora_B.default.weight": (48, 2)}, {}, "32 to 48 .*the anchor's 32 to 32"),
        (PAIR | {f"{Q}.lora_A.default.weight": (3, 32)}, {}, "rank 3 and 2"),
        (PAIR | {f"{Q}.lora_magnitude_vector": (32,)}, {}, "left over: .*magnitude"),
        ({}, {}, "without tensors"),
    ],
    ids=str,
)  # fmt: skip
def test_what_pefts_adapter_has_beyond_lora_is_refused_by_name(
    anchor, tmp_path, shapes, keys, words
):
    wrong = save_peft(tmp_path / "wrong", shapes, **keys)
    refused(words, adapters, wrong, anchor=anchor, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_words_of_the_command_are_refused(anchor, saved, tmp_path):
    def run(words, *given, texts=()):
        out = tmp_path / "out"
        refused(words, adapters, *given, anchor=anchor, out=out, texts=texts)

    run("two adapters of one name", saved[0], f"sql={saved[1]}")
    run("wrong name of a memory", f"1 2={saved[0]}")
    run("no such folder", tmp_path / "none")
    run("no adapter_config.json", anchor)
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "empty.txt").write_text("\n")
    run("--texts names no adapter", saved[0], texts=[f"law={tmp_path / 'a.txt'}"])
    run("cannot be routed to: law", *saved[:2], texts=[f"sql={tmp_path / 'a.txt'}"])
    run("no texts to route by", saved[0], texts=[f"sql={tmp_path / 'empty.txt'}"])
    run("nothing to convert")
