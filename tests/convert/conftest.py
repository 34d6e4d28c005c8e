"""Adapters of one small anchor, for the tests of several files; for reading only."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.files import save_safetensors
from tests.helpers.mlx_adapters import ADAPTERS, adapters, save_adapter
from tests.helpers.tiny_anchors import LLAMA_LIKE, make_anchor

LLAMA = LLAMA_LIKE | {"model_type": "llama", "vocab_size": 400, "eos_token_id": 0, "head_dim": 8}


@pytest.fixture(scope="module")
def anchor(model_folder, tmp_path_factory) -> Path:
    """A tiny llama with a tokenizer; for reading only."""
    folder = tmp_path_factory.mktemp("anchor") / "llama"
    folder.mkdir()
    for file in model_folder.glob("tokenizer*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    weights = named_parameters(make_anchor("llama"))
    mx.random.seed(3)
    weights["model.embed_tokens.weight"] = mx.random.normal((400, 32)) * 0.1
    save_safetensors(folder / "model.safetensors", {n: w * 2 for n, w in weights.items()})
    return folder


@pytest.fixture(scope="module")
def saved(anchor, tmp_path_factory) -> list[Path]:
    place = tmp_path_factory.mktemp("adapters")
    keys = {"sql": {}, "law": {"keys": ["self_attn.q_proj"]}, "verse": {"scale": 2.5}}
    return [save_adapter(anchor, place / n, i, **keys[n]) for i, n in enumerate(ADAPTERS)]


@pytest.fixture(scope="module")
def named(anchor, saved, tmp_path_factory) -> Path:
    """The three beside one anchor, chosen by name; for reading only."""
    return adapters(*saved, anchor=anchor, out=tmp_path_factory.mktemp("named") / "model")
