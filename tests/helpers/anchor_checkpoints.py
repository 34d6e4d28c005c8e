"""Tiny checkpoints of OpenLM and transformers, and what is asked of their conversions."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.anchors.openlm_config import inverse_frequencies
from convert.command import main
from convert.torch_files.tensors import bits_of
from convert.torch_files.writer import write_torch
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.files import load_safetensors, save_safetensors
from tests.helpers.tiny_anchors import LLAMA_LIKE, OTHER_KEYS, make_anchor

HF = ["llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite", "gemma3_text", "phi3"]
HF += ["starcoder2", "nemotron", "gpt2", "qwen3_moe", "mixtral"]
CONFIG = {
    "hidden_dim": 64, "n_layers": 3, "n_heads": 6, "head_dim": 8, "ffn_dim": 160,
    "vocab_size": 101, "seq_len": 2048, "post_embed_norm": False, "weight_tying": False,
    "model_norm": "gain_only_layer_norm", "qk_norm": True, "ffn_type": "swiglu",
    "positional_embedding_type": "rotary", "rope_theta": 100000,
}  # fmt: skip
Weights = dict[str, np.ndarray]


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
