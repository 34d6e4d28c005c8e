"""Hostile and garbled files of a model directory are refused in one line before MLX sees them."""

import contextlib
import importlib
import json
import shutil
from codecs import BOM_UTF8
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem import load
from mlx_hmem.anchors.load import anchor_hash, load_anchor, named_parameters, text_hashes
from mlx_hmem.bank.views import write_views
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, save_safetensors
from tests.conftest import edit_json
from tests.helpers.programs import refused as refusal
from tests.helpers.tiny_anchors import LLAMA_LIKE, OTHER_KEYS, make_anchor
from tests.model.test_model_directory import refused

# `mlx_hmem.model.load` by its dots is the function.
anchors_load, model_load = map(
    importlib.import_module, ("mlx_hmem.anchors.load", "mlx_hmem.model.load")
)
TENSOR_FILES = [
    "model.safetensors", "retriever/tree.safetensors", "bank/level-1.00000.safetensors",
    "bank/generic.safetensors",
]  # fmt: skip


def rewrite_header(path: Path, change) -> None:
    """Rewrites a safetensors header in as many bytes as it had, if it fits, data untouched."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    change(header, header[first])
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def tie_together(folder: Path) -> None:
    """Makes hmem.json and bank.json name the files that are there, so that hashes hide nothing."""
    anchor = anchor_hash(folder)
    tree = fingerprint(folder / "retriever" / "tree.safetensors")
    edit_json(folder / "bank" / "bank.json", lambda b: b.update(anchor_hash=anchor, tree_hash=tree))
    edit_json(
        folder / "hmem.json",
        lambda h: (
            h.update(anchor_hash=anchor, **text_hashes(folder)),
            h["retriever"].update(tree_hash=tree),
        ),
    )


HOSTILE_HEADERS = {
    "a shape that overflows": lambda h, t: t.update(shape=[1 << 40, 1 << 40]),
    "a shape whose bytes wrap to none": lambda h, t: t.update(shape=[65536] * 4),
    "a negative dimension": lambda h, t: t.update(shape=[-1, 16]),
    "overlapping tensors": lambda h, t: h.update(another=dict(t)),
    "a tensor beyond the file": lambda h, t: t.update(data_offsets=[0, 1 << 50]),
    "offsets the wrong way round": lambda h, t: t.update(data_offsets=t["data_offsets"][::-1]),
    "an unknown type": lambda h, t: t.update(dtype="F1"),
    "a type that is a list": lambda h, t: t.update(dtype=["F32"]),
    "no offsets": lambda h, t: t.pop("data_offsets"),
    "no tensors": lambda h, t: h.clear(),
}


@pytest.mark.parametrize("case", HOSTILE_HEADERS)
@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_hostile_header_is_refused(broken, name, case):
    rewrite_header(broken / name, HOSTILE_HEADERS[case])
    refused(broken, str(broken / name))


@pytest.mark.parametrize("name", TENSOR_FILES)
@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_header_length_that_lies_is_refused(broken, name, length):
    with open(broken / name, "rb+") as file:
        file.write(length.to_bytes(8, "little"))
    refused(broken, str(broken / name))


@pytest.mark.parametrize("name", TENSOR_FILES)
@pytest.mark.parametrize("size", [0, 5, 8, 60])
def test_a_file_cut_within_its_header_is_refused(broken, name, size):
    with open(broken / name, "rb+") as file:
        file.truncate(size)
    refused(broken, str(broken / name))


@pytest.mark.parametrize("name", TENSOR_FILES)
def test_a_folder_in_place_of_a_file_is_refused(broken, name):
    (broken / name).unlink()
    (broken / name).mkdir()
    refused(broken, name.split("/")[-1])


GARBAGE = [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b'{"a": 1}', b"[" * 100_000, b"\x00" * 64]


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
@pytest.mark.parametrize("name", ["hmem.json", "config.json", "bank/bank.json", "tokenizer.json"])
def test_garbage_in_place_of_json_is_refused(broken, name, data):
    (broken / name).write_bytes(data)
    refused(broken, str(broken))


WRONG_CONFIGS = {
    "another hidden size": {"hidden_size": 24},
    "a hidden size of none": {"hidden_size": 0},
    "a hidden size of text": {"hidden_size": "16"},
    "a hidden size beyond 32 bits": {"hidden_size": 1 << 40},
    "more layers": {"num_hidden_layers": 3},
    "fewer layers": {"num_hidden_layers": 1},
    "another vocabulary": {"vocab_size": 401},
    "no heads": {"num_attention_heads": 0},
    "no head width": {"head_dim": 0},
    "norms without gains for q and k": {"qk_norm": False},
    "an unknown norm": {"norm_type": "batch_norm"},
    "an unknown architecture": {"model_type": "no_such_model"},
    "an architecture that is a list": {"model_type": ["openlm"]},
    "another architecture": {"model_type": "llama"},
    "code to run": {"model_file": "model.py"},
    "quantisation it lacks": {"quantization": {"bits": 4}},
    "quantisation that is a text": {"quantization": "4 bits"},
    "a context of text": {"max_position_embeddings": "96"},
    "a context of none": {"max_position_embeddings": 0},
    "ten million layers": {"num_hidden_layers": 10**7},
    "a theta of text": {"rope_theta": "x"},
    "no theta": {"rope_theta": None},
    "a theta of 0": {"rope_theta": 0},
    "a theta below 0": {"rope_theta": -1},
    "an infinite theta": {"rope_theta": float("inf")},
    "a norm's epsilon that is none": {"norm_eps": float("nan")},
    "a flag of text": {"tie_word_embeddings": "false"},
    "a type of norm that is a number": {"norm_type": 3},
}


@pytest.mark.parametrize("case", WRONG_CONFIGS)
def test_a_config_that_contradicts_the_weights_is_refused(broken, case):
    (broken / "model.py").write_text("raise SystemExit('code of the model was run')\n")
    edit_json(broken / "config.json", lambda c: c.update(WRONG_CONFIGS[case]))
    refused(broken, str(broken), "restore" if "context" not in case else "correct")


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("rope_traditional", "true or false"),
        ("qk_norm", "true or false"),
        ("intermediate_size", "a number"),
        ("max_position_embeddings", "a number"),
        ("norm_type", "a text"),
    ],
)
def test_null_is_named_with_its_key_unless_the_architecture_takes_it(broken, key, what):
    """It was named in the words of MLX or Python, or not at all: "'NoneType' object …"."""
    config = broken / "config.json"
    edit_json(config, lambda c: c.update({key: None}))
    assert refused(broken) == f"{key} is not {what}: null; restore or correct {config}"


def test_null_stands_for_a_default_that_is_none(tmp_path):
    config = LLAMA_LIKE | {"model_type": "llama"}
    save_safetensors(tmp_path / "model.safetensors", named_parameters(make_anchor("llama")))
    (tmp_path / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    load_anchor(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ends", [400, [0, 1 << 40], -1, "0", [True]])
def test_an_end_that_is_no_token_of_the_anchor_is_named(broken, name, ends):
    """Beyond the vocabulary it passed in silence, and no text ever ended by it."""
    (broken / "generation_config.json").write_text("{}")
    edit_json(broken / name, lambda c: c.update(eos_token_id=ends))
    refused(broken, "eos_token_id is none of the anchor's 400 tokens", name)


@pytest.mark.parametrize("name", ["hmem.json", "bank/bank.json", "bank/views.json"])
def test_a_byte_order_mark_before_json_that_we_alone_read_is_none_of_it(broken, name):
    if name == "bank/views.json":
        write_views(broken / "bank", {"guest": []})
    (broken / name).write_bytes(BOM_UTF8 + (broken / name).read_bytes())
    assert load(broken).context == 96


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_byte_order_mark_before_json_that_mlx_lm_reads_is_named(broken, name, encoding):
    """It ended in "Unexpected UTF-8 BOM", or the tokenizer's "expected value at line 1"."""
    (broken / "generation_config.json").write_text("{}")
    (broken / name).write_text((broken / name).read_text(), encoding=encoding)
    refused(broken, f"{broken / name} begins with a byte order mark", "save it as UTF-8 without")


def test_config_json_is_read_and_checked_once(broken, monkeypatch):
    """It was three times; mlx-lm reads it once more by itself."""
    calls = []
    real = anchors_load.read_config
    monkeypatch.setattr(anchors_load, "read_config", lambda f: calls.append(f) or real(f))
    monkeypatch.setattr(model_load, "read_config", anchors_load.read_config)
    load(broken)
    assert calls == [broken]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("nemotron", {"partial_rotary_factor": 1.5}),
        ("gemma3_text", {"sliding_window_pattern": 4096}),
        ("qwen3_moe", {"num_experts_per_tok": 99}),
    ],
)
def test_what_an_architecture_finds_wrong_at_its_first_call_is_one_line(tmp_path, name, change):
    """mlx-lm's architectures look at no value: these were tracebacks once a text was begun."""
    config = LLAMA_LIKE | OTHER_KEYS[name] | {"model_type": name}
    save_safetensors(tmp_path / "model.safetensors", named_parameters(make_anchor(name)))
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_anchor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    refusal("do not go together", load_anchor, tmp_path)


@pytest.mark.parametrize(
    "key", ["model_type", "hidden_size", "num_attention_heads", "head_dim", "vocab_size"]
)
def test_a_config_that_lacks_a_key_is_refused(broken, key):
    edit_json(broken / "config.json", lambda c: c.pop(key))
    refused(broken, key, str(broken))


WRONG_HMEM = {
    "r is a number": lambda h: h["memory"].update(r=5),
    "r is a text": lambda h: h["memory"].update(r="4"),
    "r is nothing": lambda h: h["memory"].update(r=None),
    "r holds a fraction": lambda h: h["memory"].update(r=[4, 0.5, 2]),
    "r holds a truth": lambda h: h["memory"].update(r=[4, False, 2]),
    "r holds a list": lambda h: h["memory"].update(r=[4, [0], 2]),
    "r is negative": lambda h: h["memory"].update(r=[4, -1, 2]),
    "no level has memory": lambda h: h["memory"].update(r=[0, 0, 0]),
    "branching is a number": lambda h: h["memory"].update(branching=3),
    "branching has another length": lambda h: h["memory"].update(branching=[3, 2]),
    "branching is huge": lambda h: h["memory"].update(branching=[1 << 60] * 3),
    "an unknown kind": lambda h: h["memory"].update(kind="moe"),
    "a kind that is a list": lambda h: h["memory"].update(kind=["ffn"]),
    "a kind that is a list of objects": lambda h: h["memory"].update(kind=[{}]),
    "a number of layers without end": lambda h: h["memory"].update(num_hidden_layers=10**15),
    "an encoder that is half a character": lambda h: h["retriever"].update(encoder="a\ud800"),
    "an encoder with a null": lambda h: h["retriever"].update(encoder="a\0b"),
    "an unknown key": lambda h: h["memory"].update(rank=4),
    "a missing key": lambda h: h["memory"].pop("hidden_size"),
    "memory is nothing": lambda h: h.update(memory=None),
    "no memory": lambda h: h.pop("memory"),
    "no retriever": lambda h: h.pop("retriever"),
    "an encoder that is a number": lambda h: h["retriever"].update(encoder=5),
    "an encoder that is a list": lambda h: h["retriever"].update(encoder=["static"]),
    "an encoder elsewhere": lambda h: h["retriever"].update(encoder="../../elsewhere"),
    "a hash that is a number": lambda h: h["retriever"].update(tree_hash=0),
    "an anchor hash that is a number": lambda h: h.update(anchor_hash=0),
}


@pytest.mark.parametrize("case", WRONG_HMEM)
def test_a_wrong_hmem_json_is_refused(broken, case):
    edit_json(broken / "hmem.json", WRONG_HMEM[case])
    refused(broken)


def test_a_repeated_key_in_hmem_json_is_refused(broken):
    text = (broken / "hmem.json").read_text()
    (broken / "hmem.json").write_text(text.replace("{", '{"format_version": 1,', 1))
    refused(broken, "hmem.json", "twice")


def test_a_config_with_infinity_as_other_programs_write_it_is_read(broken):
    edit_json(broken / "config.json", lambda c: c.update(time_step_limit=[0.0, float("inf")]))
    tie_together(broken)
    assert "Infinity" in (broken / "config.json").read_text()
    assert load(broken).context == 96


def test_a_tree_with_a_centroid_that_is_no_number_is_refused(broken):
    file = broken / "retriever" / "tree.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-4:] = np.float32("nan").tobytes()
    raw[-2000:-1996] = np.float32("nan").tobytes()
    file.write_bytes(raw)
    tie_together(broken)
    refused(broken, str(file))


def test_any_flipped_byte_is_refused_or_harmless_but_never_a_crash(model_folder, tmp_path, texts):
    rng = np.random.default_rng(0)
    names = ["hmem.json", "config.json", "bank/bank.json", *TENSOR_FILES]
    harmless, rounds = 0, 70
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    for round_ in range(rounds):
        name = names[round_ % len(names)]
        raw = (model_folder / name).read_bytes()
        damaged = bytearray(raw)
        damaged[rng.integers(min(len(raw), 700))] ^= 1 << rng.integers(8)
        (folder / name).write_bytes(damaged)
        with contextlib.suppress(UserError):
            if name in TENSOR_FILES[:2]:
                tie_together(folder)
            harmless += len(load(folder).fetch(texts[0]).path) == 3
        for whole in (name, "hmem.json", "bank/bank.json"):
            shutil.copyfile(model_folder / whole, folder / whole)
    assert harmless < rounds // 2
