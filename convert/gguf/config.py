"""The ``config.json`` of the model in a GGUF file, as transformers would have written it.

llama.cpp keeps a model's sizes under its own names and leaves out what its code knows by itself;
that is added here. What a file says beyond what is looked at is named in a line.
"""

from collections.abc import Mapping
from typing import Any

from mlx_hmem.anchors.load import check_values
from mlx_hmem.errors import UserError

from .header import Header
from .names import EMBEDDING, HEAD, model_type_of
from .rope import scaling_of
from .settings import OTHER, Key, Settings

Config = dict[str, Any]
RMS, LAYER_NORM = "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"
ORIGINAL = "rope.scaling.original_context_length"
GEMMA_27B = 62  # layers of the one Gemma 3 that scales its queries otherwise


SIZES = {
    "hidden_size": Key("embedding_length"),
    "num_hidden_layers": Key("block_count"),
    "intermediate_size": Key("feed_forward_length"),
    "num_attention_heads": Key("attention.head_count"),
    "max_position_embeddings": Key("context_length"),
}
MODEL = SIZES | {"rms_norm_eps": Key(RMS, float)}
EXPERTS = {"num_experts_per_tok": Key("expert_used_count")}
KEYS: dict[str, dict[str, Key]] = {
    "llama": MODEL,
    "mixtral": MODEL | EXPERTS | {"num_local_experts": Key("expert_count")},
    "qwen2": MODEL,
    "qwen3": MODEL,
    "qwen3_moe": MODEL
    | EXPERTS
    | {
        "num_experts": Key("expert_count"),
        "moe_intermediate_size": Key("expert_feed_forward_length"),
    },
    "gemma3_text": MODEL
    | {
        "sliding_window": Key("attention.sliding_window", int, 1024),
        "sliding_window_pattern": Key("attention.sliding_window_pattern", int, 6),
        "rope_local_base_freq": Key("rope.freq_base_swa", float, 1e4),
    },
    "phi3": MODEL | {"original_max_position_embeddings": Key(ORIGINAL)},
    "olmo2": MODEL,
    "granite": MODEL
    | {
        "logits_scaling": Key("logit_scale", float, 1.0),
        "attention_multiplier": Key("attention.scale", float, 1.0),
        "embedding_multiplier": Key("embedding_scale", float, 1.0),
        "residual_multiplier": Key("residual_scale", float, 1.0),
    },
    "smollm3": MODEL,
    "starcoder2": SIZES | {"norm_epsilon": Key(LAYER_NORM, float)},
    "nemotron": SIZES | {"norm_eps": Key(LAYER_NORM, float)},
    "gpt2": {
        "n_embd": Key("embedding_length"),
        "n_layer": Key("block_count"),
        "n_inner": Key("feed_forward_length"),
        "n_head": Key("attention.head_count"),
        "n_positions": Key("context_length"),
        "layer_norm_epsilon": Key(LAYER_NORM, float),
    },
}  # fmt: skip
# What llama.cpp's code computes without a word in the file, and the class of transformers.
CONSTANT: dict[str, Config] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "hidden_act": "silu"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu",
              "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "hidden_act": "silu", "attention_bias": False,
              "use_sliding_window": False},
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "hidden_act": "silu",
                  "attention_bias": False, "use_sliding_window": False, "norm_topk_prob": True,
                  "decoder_sparse_step": 1, "mlp_only_layers": []},
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"], "attention_bias": False,
                    "hidden_activation": "gelu_pytorch_tanh"},
    "phi3": {"architectures": ["Phi3ForCausalLM"], "hidden_act": "silu"},
    "olmo2": {"architectures": ["Olmo2ForCausalLM"], "hidden_act": "silu"},
    "granite": {"architectures": ["GraniteForCausalLM"], "hidden_act": "silu"},
    "smollm3": {"architectures": ["SmolLM3ForCausalLM"], "hidden_act": "silu",
                "no_rope_layer_interval": 4, "use_sliding_window": False},
    "starcoder2": {"architectures": ["Starcoder2ForCausalLM"], "use_bias": True,
                   "hidden_act": "gelu_pytorch_tanh"},
    "nemotron": {"architectures": ["NemotronForCausalLM"], "hidden_act": "relu2"},
    "gpt2": {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new"},
}  # fmt: skip
HEAD_DIM = ("llama", "qwen3", "qwen3_moe", "gemma3_text", "smollm3", "nemotron")  # have the key
BIASES = ("llama", "olmo2", "granite", "smollm3", "nemotron")  # say whether they have them
PARTIAL = ("phi3", "nemotron")  # may turn a part of each head only
# Refused by hugging_face_config where they are set.
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def config_of(header: Header) -> tuple[Config, list[str]]:
    """``config.json`` of the model, without the ids of the tokenizer, and lines for the user.

    Raises UserError for an architecture or a setting that cannot be converted, by its name.
    """
    values, tensors = header.values, header.tensors
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        raise UserError("no general.architecture", header.files[0], OTHER)
    kind = values.get("general.type", "model")
    if kind != "model":
        raise UserError(f"{header.files[0]} holds no model", f"general.type {kind}", OTHER)
    settings = Settings(header, architecture)
    name = model_type_of(architecture, settings.value(Key("expert_count", int, 0)))
    if EMBEDDING not in tensors or len(tensors[EMBEDDING].shape) != 2:
        raise UserError("no embedding", f"{EMBEDDING} in {header.files[0]}", OTHER)
    config: Config = {"model_type": name} | CONSTANT[name]
    config |= {key: settings.value(where) for key, where in KEYS[name].items()}
    if (layers := settings.value(SIZES["num_hidden_layers"])) > len(tensors):  # building has no end
        what = f"{layers} layers, {len(tensors)} tensors in {header.files[0]}"
        raise UserError("the file has fewer tensors than layers", what, OTHER)
    config["vocab_size"] = tensors[EMBEDDING].shape[0]
    settings.seen.add(f"{architecture}.vocab_size")
    config["tie_word_embeddings"] = HEAD not in tensors
    if name in BIASES:
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    for cap in CAPS:
        if cap_value := settings.value(Key(cap, float, 0.0)):
            config[cap] = cap_value
    if name != "gpt2":
        config |= _heads(name, config, settings)
        config["rope_theta"] = settings.value(Key("rope.freq_base", float, 1e4))
        config |= scaling_of(config["rope_theta"], settings)
    if name == "gemma3_text":
        config |= _gemma(config, settings)
    check_values(config, header.files[0])
    return config, settings.unused()


def _heads(name: str, config: Mapping[str, Any], settings: Settings) -> Config:
    """The heads of query and of key and value, how wide they are and how much of each turns."""
    heads = config["num_attention_heads"]
    if not heads:
        raise UserError("a model without heads of attention", settings.header.files[0], OTHER)
    found: Config = {
        "num_key_value_heads": settings.value(Key("attention.head_count_kv", int, heads))
    }
    head_dim = settings.value(Key("attention.key_length", int, config["hidden_size"] // heads))
    value_dim = settings.value(Key("attention.value_length", int, head_dim))
    turned = settings.value(Key("rope.dimension_count", int, head_dim))
    if value_dim != head_dim:
        what = f"keys of {head_dim} and values of {value_dim} numbers"
        raise UserError("heads of two widths are not converted", what, OTHER)
    if name in HEAD_DIM:
        found["head_dim"] = head_dim
    if name in PARTIAL:
        found["partial_rotary_factor"] = turned / max(1, head_dim)
    elif turned != head_dim:
        what = f"{turned} of {head_dim} numbers"
        raise UserError(f"RoPE turns a part of each head, which {name} does not", what, OTHER)
    return found


def _gemma(config: Mapping[str, Any], settings: Settings) -> Config:
    """Which layers see all, and how queries are scaled."""
    pattern, layers = config["sliding_window_pattern"], config["num_hidden_layers"]
    types = [
        "full_attention" if pattern and (i + 1) % pattern == 0 else "sliding_attention"
        for i in range(layers)
    ]
    width = config["head_dim"]
    if layers == GEMMA_27B:
        width = config["hidden_size"] // config["num_attention_heads"]
    return {"layer_types": types, "query_pre_attn_scalar": width}
