"""The settings of a model as llama.cpp keeps them: the inverse of ``config`` and ``rope`` here."""

from collections.abc import Mapping
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_hmem.errors import UserError

from ..config import CONSTANT, GEMMA_27B, KEYS, PARTIAL
from ..names import NAMES
from ..rope import FREQS, LONG, SHORT, llama3_factors

LLAMA_CPP = "run it with mlx-lm"
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}
# Of CONSTANT: what changes no number, and what is checked for mlx-lm already.
TOLD = (
    "architectures", "use_sliding_window", "hidden_act", "hidden_activation", "activation_function",
)  # fmt: skip


def values_of(config: dict[str, Any], anchor: nn.Module) -> dict[str, Any]:
    """The values of a file that are of the model's architecture.

    Raises UserError for a setting that llama.cpp does not compute, by its name.
    """
    name = config["model_type"]
    name = "llama" if name == "mistral" else name  # llama.cpp has one architecture for both
    for key, value in CONSTANT[name].items():
        if key not in TOLD and config.get(key, value) != value:
            what = f"{key} {config[key]}, not {value}"
            raise UserError(f"llama.cpp does not compute {name} so", what, LLAMA_CPP)
    turning = [int((i + 1) % 4 != 0) for i in range(config.get("num_hidden_layers", 0))]
    if name == "smollm3" and (config.get("no_rope_layers") or turning) != turning:
        what = f"no_rope_layers {config['no_rope_layers']}"
        raise UserError("llama.cpp leaves RoPE out of every fourth layer", what, LLAMA_CPP)
    found = {
        where.name: where.kind(_setting(config, anchor, key, where.default))
        for key, where in KEYS[name].items()
    }
    found["vocab_size"] = config["vocab_size"]
    if name == "gpt2":
        return found
    heads = config["num_attention_heads"]
    head_dim = _setting(config, anchor, "head_dim", config["hidden_size"] // heads)
    if name == "gemma3_text":
        width = config["hidden_size"] // heads if found["block_count"] == GEMMA_27B else head_dim
        own = _setting(config, anchor, "query_pre_attn_scalar", width)
        if own != width:
            what = f"query_pre_attn_scalar {own}, not {width}"
            raise UserError("llama.cpp scales the queries otherwise", what, LLAMA_CPP)
    turned = config.get("partial_rotary_factor", 1.0) if name in PARTIAL else 1.0
    return (
        found
        | {
            "attention.head_count_kv": config.get("num_key_value_heads") or heads,
            "attention.key_length": head_dim,
            "attention.value_length": head_dim,
            "rope.dimension_count": int(head_dim * turned),
            "rope.freq_base": float(_setting(config, anchor, "rope_theta", 1e4)),
        }
        | _scaling(config)
    )


def _setting(config: Mapping[str, Any], anchor: Any, key: str, default: Any) -> Any:
    """As the config has it, or as mlx-lm takes it where the config does not say."""
    for value in (config.get(key), getattr(anchor.args, key, None), default):
        if value is not None:
            return value
    if key == "n_inner":
        return 4 * config["n_embd"]
    if key == "original_max_position_embeddings":
        return config["max_position_embeddings"]
    raise UserError("config.json does not say", key, "restore the config")


def _kind_of_scaling(config: Mapping[str, Any]) -> str:
    scaling = config.get("rope_scaling") or {}
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _scaling(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are stretched, but for the factors that are tensors."""
    scaling, kind = config.get("rope_scaling") or {}, _kind_of_scaling(config)
    if kind in ("default", "llama3"):
        return {}
    if kind in ("longrope", "su"):
        attention = scaling.get("attention_factor")
        return {} if attention is None else {"rope.scaling.attn_factor": float(attention)}
    if kind not in ("linear", "yarn"):
        raise UserError("llama.cpp does not scale RoPE so", kind, LLAMA_CPP)
    found = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        original = scaling.get("original_max_position_embeddings")
        original = original or config["max_position_embeddings"]
        found["rope.scaling.original_context_length"] = int(original)
        for key, usual in YARN.items():
            found[f"rope.scaling.yarn_{key}"] = float(scaling.get(key, usual))
    return found


def rope_factors(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of RoPE's factors, float32."""
    scaling, kind = config.get("rope_scaling") or {}, _kind_of_scaling(config)
    if kind == "llama3":
        dims = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        settings = [float(scaling[key]) for key in keys]
        factors = llama3_factors(float(config["rope_theta"]), dims, *settings)
        return {FREQS: factors.astype(np.float32)}
    if kind in ("longrope", "su"):
        return {
            LONG: np.array(scaling["long_factor"], np.float32),
            SHORT: np.array(scaling["short_factor"], np.float32),
        }
    return {}


def architecture_of(name: str) -> str:
    """llama.cpp's name of an architecture; UserError where it has none."""
    if name not in NAMES:
        what = "llama.cpp has no such architecture, or we have no table of its names"
        raise UserError(what, name, f"known: {', '.join(NAMES)}")
    return NAMES[name].architecture
