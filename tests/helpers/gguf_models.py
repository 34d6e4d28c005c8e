"""Tiny models as llama.cpp's converter writes them, with llama.cpp's own package and its names."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.files import load_safetensors
from tests.helpers.anchor_checkpoints import convert

ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "phi3": "phi3", "olmo2": "olmo2",
    "granite": "granite", "smollm3": "smollm3", "starcoder2": "starcoder2", "nemotron": "nemotron",
    "gpt2": "gpt2",
}  # fmt: skip
ROTATED = ("llama", "granite", "smollm3")
PLUS_ONE = ("gemma3", "nemotron")
Quantize = Callable[[str, np.ndarray], tuple[np.ndarray, Any]]


def to_q8(name: str, weight: np.ndarray) -> tuple[np.ndarray, Any]:
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_0
    return gguf.quantize(weight, kind), kind


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The order of llama.cpp's rows: of each head 0, half, 1, half + 1 …"""
    size = len(weight) // heads
    order = np.arange(size).reshape(2, -1).T.reshape(-1)
    return np.concatenate([weight[head * size + order] for head in range(heads)])


def torch_weights(source: Path) -> dict[str, np.ndarray]:
    """The float32 weights of a model directory of mlx-lm under PyTorch's names, experts stacked."""
    theirs = source.with_name(f"{source.name}-torch")
    if not theirs.exists():
        convert(source, theirs, "--to", "pytorch")
    weights, stacks = dict[str, np.ndarray](), dict[str, dict[int, np.ndarray]]()
    for file in sorted(theirs.glob("model*.safetensors")):
        for name, array in load_safetensors(file).items():
            front, experts, rest = name.partition(".experts.")
            if experts:
                number, _, rest = rest.partition(".")
                stacks.setdefault(f"{front}.experts.{rest}", {})[int(number)] = np.array(array)
            else:
                weights[name] = np.array(array)
    stacked = {name: np.stack([found[i] for i in sorted(found)]) for name, found in stacks.items()}
    return weights | stacked


def add_settings(writer: Any, config: dict[str, Any], architecture: str) -> None:
    """The metadata that llama.cpp's converter writes for a config of mlx-lm."""

    def value(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    hidden, heads = value("n_embd", "hidden_size"), value("n_head", "num_attention_heads")
    head_dim = config.get("head_dim") or hidden // heads
    writer.add_context_length(value("n_positions", "max_position_embeddings"))
    writer.add_embedding_length(hidden)
    writer.add_block_count(value("n_layer", "num_hidden_layers"))
    writer.add_feed_forward_length(
        4 * hidden if architecture == "gpt2" else config["intermediate_size"]
    )
    writer.add_head_count(heads)
    if (epsilon := value("norm_eps", "norm_epsilon", "layer_norm_epsilon")) is not None:
        writer.add_layer_norm_eps(epsilon)
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if architecture == "gpt2":
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    if architecture in ("qwen3", "qwen3moe", "gemma3", "llama", "smollm3", "nemotron"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    if architecture in ("llama", "granite", "smollm3", "phi3", "nemotron"):
        writer.add_rope_dimension_count(int(head_dim * config.get("partial_rotary_factor", 1.0)))
    if architecture == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config["max_position_embeddings"])
        writer.add_sliding_window(0)
    if architecture == "gemma3":
        writer.add_sliding_window(512)
    adders = {
        "logits_scaling": writer.add_logit_scale,
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "num_local_experts": writer.add_expert_count,
        "num_experts": writer.add_expert_count,
        "num_experts_per_tok": writer.add_expert_used_count,
        "moe_intermediate_size": writer.add_expert_feed_forward_length,
    }
    for name, add in adders.items():
        if name in config:
            add(config[name])


def gguf_tensors(source: Path, architecture: str) -> dict[str, np.ndarray]:
    """The weights of a model directory as llama.cpp keeps them, under its own package's names."""
    import gguf

    config = json.loads((source / "config.json").read_text())
    number = next(n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = config.get("n_layer") or config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(number, layers)
    result = {}
    for name, weight in torch_weights(source).items():
        if architecture == "gpt2" and weight.ndim == 2 and ".c_" in name:
            weight = weight.T
        if architecture in ROTATED and ".q_proj." in name:
            weight = permuted(weight, config["num_attention_heads"])
        if architecture in ROTATED and ".k_proj." in name:
            weight = permuted(weight, config["num_key_value_heads"])
        if architecture in PLUS_ONE and name.endswith("norm.weight"):
            weight = weight + np.float32(1)
        stem, _, end = name.rpartition(".")
        theirs = names.get_name(stem.replace("block_sparse_moe.experts", "feed_forward.experts"))
        theirs = theirs or names.get_name(stem.replace("model.layers", "layers").replace(
            "block_sparse_moe.experts", "feed_forward.experts"))  # fmt: skip
        assert theirs, name
        result[f"{theirs}.{end}"] = np.ascontiguousarray(weight)
    return result


def write_gguf(
    path: Path,
    source: Path,
    name: str,
    quantize: Quantize | None = None,
    more: Sequence[Callable[[Any], None]] = (),
    **options: Any,
) -> Path:
    """Writes the model directory ``source``; ``more`` add to the file, ``options`` are the
    writer's."""
    import gguf

    architecture = ARCHITECTURES[name]
    writer = gguf.GGUFWriter(path, architecture, **options)
    add_settings(writer, json.loads((source / "config.json").read_text()), architecture)
    for add in more:
        add(writer)
    for tensor, weight in gguf_tensors(source, architecture).items():
        if quantize and weight.ndim > 1:
            data, kind = quantize(tensor, weight)
            writer.add_tensor(tensor, data, raw_dtype=kind)
        else:
            writer.add_tensor(tensor, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
