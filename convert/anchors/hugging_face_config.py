"""A Hugging Face ``config.json`` for mlx-lm: as it is, plus the keys that mlx-lm would miss.

mlx-lm takes the keys it knows and a default for every other, without a word: ``rope_parameters``,
where transformers 5 keeps the base of RoPE, is passed over by all but a few of its architectures.
So such keys are written out again under the names that mlx-lm reads, and a setting that it would
ignore though it changes the result is refused, or named where it is a small thing.
"""

from pathlib import Path
from typing import Any

from mlx_hmem.anchors.architectures import ARCHITECTURES
from mlx_hmem.anchors.load import check_values
from mlx_hmem.errors import UserError

from ..torch_files.tensors import LazyTensor

Config = dict[str, Any]
SUPPORTED = [name for name in ARCHITECTURES if name != "openlm"]
# What transformers takes where config.json does not say; mlx-lm's defaults are others.
ROPE_THETA = {"smollm3": 2e6, "mixtral": 1e6, "gemma3_text": 1e6}
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new")
ACTIVATIONS = {
    "gemma3_text": TANH_GELU,
    "gpt2": TANH_GELU,
    "starcoder2": ("gelu", *TANH_GELU),  # mlx-lm always computes gelu
    "nemotron": ("relu2",),
}
NO_ROPE = ("gpt2",)
# Settings that no architecture of mlx-lm here heeds, and the value that it computes with.
FIXED = {
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}


# Models of text and pictures: the one within that reads text, and what transformers takes where
# ``text_config`` does not say.
TEXT_MODELS: dict[str, Config] = {
    "gemma3": {
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 2304,
        "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
SHARED = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype",
          "quantization_config")  # fmt: skip


def text_model(config: Config, path: Path) -> Config:
    """The config of the part that reads text, of a model that sees pictures, too; else ``config``,
    which is that of ``path``."""
    defaults, own = TEXT_MODELS.get(config["model_type"]), config.get("text_config")
    if defaults is None:
        return config
    if not isinstance(own, dict) or own.get("model_type") != defaults["model_type"]:
        what = f"text_config is not one of {defaults['model_type']}"
        raise UserError(what, repr(own)[:80], f"restore or correct {path}")
    check_values(own, path)
    return defaults | {key: config[key] for key in SHARED if key in config} | own


def for_mlx(
    config: Config, head: LazyTensor | None, head_is_embedding: bool
) -> tuple[Config, list[str]]:
    """The config as mlx-lm needs it, and lines that say what was added and what differs.

    ``head`` is the tensor ``lm_head.weight`` of the checkpoint, if it has one.
    """
    name = config["model_type"]
    if name not in SUPPORTED:
        raise UserError("no such architecture is converted", name, f"known: {', '.join(SUPPORTED)}")
    notes = _check_settings(name, config)
    added = {} if name in NO_ROPE else _rope(name, config)
    if name == "gemma3_text":
        added |= _gemma_pattern(config)
        _check_gemma(config | added)
    if name == "gpt2" and "n_ctx" not in config:
        added["n_ctx"] = config.get("n_positions", 1024)
    if name == "qwen3_moe" and "num_experts" not in config:
        added["num_experts"] = config.get("num_local_experts")
    if "tie_word_embeddings" not in config and name != "gpt2":
        added["tie_word_embeddings"] = head is None or head_is_embedding
    if config.get("tie_word_embeddings") and head is not None and not head_is_embedding:
        raise UserError(
            "config.json contradicts the tensors",
            "tie_word_embeddings is true, lm_head.weight is not the embedding",
            "set it to false, or take lm_head.weight out",
        )
    if added:
        text = ", ".join(f"{key} {value}" for key, value in added.items())
        notes.append(f"written into config.json, since mlx-lm reads it there: {text}")
    return config | added, notes


def _check_settings(name: str, config: Config) -> list[str]:
    """Refuses what mlx-lm would silently compute otherwise."""
    notes = []
    keys = ("hidden_activation", "hidden_act", "activation_function")
    key = next((k for k in keys if config.get(k)), "")
    allowed = ACTIVATIONS.get(name, ("silu", "swish"))
    if key and config[key] not in allowed:
        raise UserError(
            f"mlx-lm computes {name} with {allowed[0]} only", f"{key} {config[key]}", "use PyTorch"
        )
    if name == "starcoder2" and key and config[key] != "gelu":
        notes.append(f"mlx-lm computes the exact gelu where config.json says {config[key]}")
    for setting, value in FIXED.items():
        if config.get(setting, value) != value:
            raise UserError(
                "mlx-lm does not heed this setting", f"{setting} {config[setting]}", "use PyTorch"
            )
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    slides = name != "gemma3_text" and config.get("use_sliding_window", True)
    if slides and window and context and window < context and "layer_types" not in config:
        notes.append(f"mlx-lm attends to all tokens where transformers sees the last {window}")
    return notes


def _agreed(key: str, config: Config, value: Any) -> Config:
    """``{key: value}`` if the config lacks it; an error if it says otherwise."""
    if key not in config or config[key] is None:
        return {key: value}
    if config[key] != value:
        raise UserError(
            "config.json contradicts itself",
            f"{key} is {config[key]} and in rope_parameters {value}",
            "correct one of them",
        )
    return {}


def _rope(name: str, config: Config) -> Config:
    """The keys of RoPE under the names of old, which mlx-lm reads."""
    found, added = config.get("rope_parameters") or {}, Config()
    if name == "gemma3_text" and "full_attention" in found:
        local, found = found.get("sliding_attention") or {}, found["full_attention"] or {}
        if not isinstance(local, dict) or not isinstance(found, dict):
            raise UserError("rope_parameters is no table", repr((local, found))[:80], "restore it")
        if local.get("rope_type", "default") != "default":
            raise UserError("mlx-lm does not scale local RoPE", local["rope_type"], "use PyTorch")
        added |= _agreed("rope_local_base_freq", config, local.get("rope_theta", 1e4))
    if "rope_theta" in found:
        added |= _agreed("rope_theta", config, found["rope_theta"])
    elif config.get("rope_theta") is None:
        added["rope_theta"] = ROPE_THETA.get(name, 1e4)
    if "partial_rotary_factor" in found:
        added |= _agreed("partial_rotary_factor", config, found["partial_rotary_factor"])
    kind = found.get("rope_type", found.get("type", "default"))
    if kind != "default" and not config.get("rope_scaling"):
        scaling = {k: v for k, v in found.items() if k != "rope_theta"}
        added["rope_scaling"] = scaling | {"type": kind, "rope_type": kind}
    scaling = added.get("rope_scaling") or config.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type"))
    if name == "starcoder2" and kind not in (None, "default"):
        raise UserError("mlx-lm does not scale starcoder2's RoPE", scaling, "use PyTorch")
    return added


def _gemma_pattern(config: Config) -> Config:
    """Every how many layers attention is not local, from the list of the layers' types."""
    types = config.get("layer_types")
    if "sliding_window_pattern" in config or not types:
        return {}
    full = [index for index, kind in enumerate(types) if kind == "full_attention"]
    pattern = full[0] + 1 if full else len(types) + 1
    if full != list(range(pattern - 1, len(types), pattern)):
        raise UserError("mlx-lm needs a regular pattern of layers", types, "use PyTorch")
    return {"sliding_window_pattern": pattern}


def _check_gemma(config: Config) -> None:
    """Where no layer sees all, mlx-lm looks for the cache of one and finds none."""
    layers, pattern = config.get("num_hidden_layers", 26), config.get("sliding_window_pattern", 6)
    if layers < pattern:
        what, remedy = f"{layers} layers, a pattern of {pattern}", "use PyTorch, or a whole model"
        raise UserError("mlx-lm runs no Gemma 3 without a layer that sees all", what, remedy)
