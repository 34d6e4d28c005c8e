"""What llama.cpp calls the tensors of each architecture, and in which form it keeps them.

One table for both directions, as for PyTorch (:mod:`convert.anchors.keys`): on the left a name in
the GGUF file, on the right mlx-lm's. The names are those of llama.cpp's ``tensor_mapping.py``; what
its converter changes besides is said by ``rotated`` and ``plus_one``, and undone or done again by
:func:`to_ours` and :func:`to_theirs`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_hmem.errors import UserError

from ..anchors.keys import Drop, Rule, fits
from ..torch_files.tensors import LazyTensor
from .rows import halved, interleaved, shifted


@dataclass(frozen=True)
class Names:
    """How llama.cpp keeps an architecture of ours.

    ``architecture`` is ``general.architecture``. ``rotated``: of query and key it interleaves the
    two halves of each head, since it turns neighbours (RoPE). ``plus_one``: the gains of the norms
    are stored plus one.
    """

    architecture: str
    rules: list[Rule]
    rotated: bool = False
    plus_one: bool = False


def _layers(pairs: Mapping[str, str], layer: str = "model.layers.{i}") -> list[Rule]:
    return [
        Rule(f"blk.{{i}}.{theirs}.{{any}}", (f"{layer}.{ours}.{{any}}",))
        for theirs, ours in pairs.items()
    ]


ENDS = [
    Rule("token_embd.weight", ("model.embed_tokens.weight",)),
    Rule("output_norm.{any}", ("model.norm.{any}",)),
    Rule("output.weight", ("lm_head.weight",)),
]
ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
# Of architectures with norms behind attention and FFN.
POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
DENSE = [*ENDS, *_layers(ATTENTION | NORMS | FFN)]


def _experts(block: str) -> dict[str, str]:
    """Of a mixture of experts, whose matrices lie stacked with llama.cpp as with mlx-lm."""
    parts = ("gate", "up", "down")
    return {"ffn_gate_inp": f"{block}.gate"} | {
        f"ffn_{part}_exps": f"{block}.switch_mlp.{part}_proj" for part in parts
    }


# By our names of the architectures (model_type). Of those that have one architecture of llama.cpp
# in common the first is what such a file becomes, if it has no experts.
NAMES: dict[str, Names] = {
    "llama": Names("llama", DENSE, rotated=True),
    "mistral": Names("llama", DENSE, rotated=True),
    "mixtral": Names(
        "llama", [*ENDS, *_layers(ATTENTION | NORMS | _experts("block_sparse_moe"))], rotated=True
    ),
    "qwen2": Names("qwen2", DENSE),
    "qwen3": Names("qwen3", [*ENDS, *_layers(ATTENTION | NORMS | FFN | QK_NORMS)]),
    "qwen3_moe": Names(
        "qwen3moe", [*ENDS, *_layers(ATTENTION | NORMS | QK_NORMS | _experts("mlp"))]
    ),
    "gemma3_text": Names(
        "gemma3",
        [
            *ENDS,
            *_layers(ATTENTION | QK_NORMS | FFN | POST_NORMS),
            *_layers({"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}),
        ],
        plus_one=True,
    ),
    "phi3": Names(
        "phi3",
        [
            *ENDS,
            *_layers(NORMS),
            *_layers({"attn_qkv": "self_attn.qkv_proj", "attn_output": "self_attn.o_proj"}),
            *_layers({"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}),
        ],
    ),
    "olmo2": Names("olmo2", [*ENDS, *_layers(ATTENTION | QK_NORMS | POST_NORMS | FFN)]),
    "granite": Names("granite", DENSE, rotated=True),
    "smollm3": Names("smollm3", DENSE, rotated=True),
    "starcoder2": Names(
        "starcoder2",
        [*ENDS, *_layers(ATTENTION | NORMS | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"})],
    ),
    "nemotron": Names("nemotron", DENSE, plus_one=True),
    "gpt2": Names(
        "gpt2",
        [
            Rule("token_embd.weight", ("model.wte.weight",)),
            Rule("position_embd.weight", ("model.wpe.weight",)),
            Rule("output_norm.{any}", ("model.ln_f.{any}",)),
            *_layers(
                {
                    "attn_norm": "ln_1",
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_norm": "ln_2",
                    "ffn_up": "mlp.c_fc",
                    "ffn_down": "mlp.c_proj",
                },
                "model.h.{i}",
            ),
        ],
    ),
}
HEAD, EMBEDDING = "output.weight", "token_embd.weight"
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
DROPS = [
    *(Drop(name, "RoPE is computed from the config") for name in ROPE_FACTORS),
    Drop("blk.{i}.attn_rot_embd", "RoPE is computed from the config"),
]


def model_type_of(architecture: str, num_experts: int) -> str:
    """Our name for an architecture of llama.cpp; UserError where we have none."""
    found = [name for name, names in NAMES.items() if names.architecture == architecture]
    if not found:
        known = ", ".join(dict.fromkeys(names.architecture for names in NAMES.values()))
        raise UserError("no such architecture is converted", architecture, f"known: {known}")
    return found[-1] if num_experts and architecture == "llama" else found[0]


def _heads(name: str, config: Mapping[str, Any]) -> int | None:
    """How many heads a tensor of query or key has, by llama.cpp's name; None for any other."""
    for kind, key in (("q", "num_attention_heads"), ("k", "num_key_value_heads")):
        if fits(f"blk.{{i}}.attn_{kind}.{{any}}", name):
            return int(config[key])
    return None


def to_ours(
    tensors: Mapping[str, LazyTensor], names: Names, config: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """llama.cpp's tensors, under its names, with rows and gains as mlx-lm has them."""
    return _changed(tensors, names, config, halved, -1)


def to_theirs(
    tensors: Mapping[str, LazyTensor], names: Names, config: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """The inverse of :func:`to_ours`: mlx-lm's tensors under llama.cpp's names."""
    return _changed(tensors, names, config, interleaved, 1)


def _changed(
    tensors: Mapping[str, LazyTensor],
    names: Names,
    config: Mapping[str, Any],
    turn: Callable[[LazyTensor, int], LazyTensor],
    more: float,
) -> dict[str, LazyTensor]:
    """The tensors, those of query and key ``turn``ed, and gains of norms ``more`` than they are."""
    result = dict(tensors)
    for name, tensor in tensors.items():
        if names.rotated and (heads := _heads(name, config)):
            result[name] = turn(tensor, heads)
        if names.plus_one and name.endswith("norm.weight"):
            result[name] = shifted(tensor, more)
    return result
