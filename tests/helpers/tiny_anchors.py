"""One tiny random anchor of each architecture in the table, made by mlx-lm's own classes."""

import importlib
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.anchors.openlm import Model, ModelArgs

HIDDEN, LAYERS, INNER, VOCAB, CONTEXT = 32, 3, 64, 64, 128
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SIZES: dict[str, Any] = dict(
    hidden_size=HIDDEN, num_hidden_layers=LAYERS, intermediate_size=INNER, vocab_size=VOCAB,
    num_attention_heads=HEADS, head_dim=HEAD_DIM, max_position_embeddings=CONTEXT,
)  # fmt: skip
LLAMA_LIKE = dict(
    SIZES, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=True
)
GATED = ["openlm", "llama", "mistral", "qwen2", "qwen3", "olmo2", "smollm3", "granite"]
GATED += ["gemma3_text", "phi3"]
UNGATED = ["starcoder2", "nemotron", "gpt2"]
EXPERTS = ["qwen3_moe", "mixtral"]
OTHER_KEYS: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window_pattern": 3},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                "residual_multiplier": 0.7, "attention_bias": False, "mlp_bias": False},
    "phi3": {"rope_scaling": None},
    "nemotron": {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5},
    "starcoder2": {"norm_epsilon": 1e-5},
    "gpt2": {"n_ctx": CONTEXT, "n_embd": HIDDEN, "n_head": HEADS, "n_layer": LAYERS,
             "n_positions": CONTEXT, "layer_norm_epsilon": 1e-5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
                  "mlp_only_layers": [0], "moe_intermediate_size": 16, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def module_of(name: str) -> Any:
    """The module whose code the architecture runs: mistral and smollm3 share llama's."""
    if name == "openlm":
        return importlib.import_module("mlx_hmem.anchors.openlm")
    shared = {"mistral": "llama", "smollm3": "llama"}
    return importlib.import_module(f"mlx_lm.models.{shared.get(name, name)}")


def make_anchor(name: str, seed: int = 1) -> nn.Module:
    mx.random.seed(seed)
    if name == "openlm":
        anchor: nn.Module = Model(ModelArgs(model_type="openlm", **SIZES))
    else:
        code = importlib.import_module("mlx_lm.models." + ("llama" if name == "mistral" else name))
        values = dict(LLAMA_LIKE, model_type=name, **OTHER_KEYS.get(name, {}))
        anchor = code.Model(code.ModelArgs.from_dict(values))
    mx.eval(anchor.parameters())
    return anchor
