"""Where each architecture of mlx-lm keeps the parts that memory joins.

To add an architecture, add a line to ``ARCHITECTURES``: docs/architectures.md says how.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.errors import UserError
from mlx_hmem.memory.layer import Activation, AnchorLayer, AttentionLayer, FFNLayer, Projection


@dataclass(frozen=True)
class Architecture:
    """Names of modules within a layer, of projections within those, and of the counts of heads.

    ``gate_up`` and ``qkv`` name one matrix whose outputs are gate and up, or query, key and value,
    one after the other; the names of its parts are then not looked at.
    """

    activation: Activation = nn.silu
    ffn: str = "mlp"
    gate: str | None = "gate_proj"  # None: an FFN without a gate
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: str | None = None
    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    qkv: str | None = None
    output: str = "o_proj"
    num_heads: str = "n_heads"
    num_kv_heads: str = "n_kv_heads"  # as many as heads where the module has none
    query_norm: str = "q_norm"  # none where the module has none


def relu_squared(x: mx.array) -> mx.array:
    return mx.square(nn.relu(x))


ARCHITECTURES: dict[str, Architecture] = {
    "openlm": Architecture(),
    "llama": Architecture(),
    "mistral": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "olmo2": Architecture(),
    "smollm3": Architecture(),
    "granite": Architecture(),
    "gemma3_text": Architecture(nn.gelu_approx),
    "phi3": Architecture(gate_up="gate_up_proj", qkv="qkv_proj"),
    "starcoder2": Architecture(nn.gelu, gate=None, up="c_fc", down="c_proj"),
    "nemotron": Architecture(relu_squared, gate=None),
    "gpt2": Architecture(
        nn.gelu_approx,
        gate=None,
        up="c_fc",
        down="c_proj",
        attention="attn",
        qkv="c_attn",
        output="c_proj",
        num_heads="n_head",
    ),
    # Mixtures of experts: their attention alone can be joined.
    "qwen3_moe": Architecture(),
    "mixtral": Architecture(ffn="block_sparse_moe", num_heads="num_heads"),
}


def anchor_layers(anchor: nn.Module) -> list[AnchorLayer]:
    """The layers of ``anchor``; UserError if its architecture is not in the table."""
    name = getattr(anchor, "model_type", type(anchor).__name__)
    if name not in ARCHITECTURES:
        raise UserError(
            "no memory can be attached to this architecture",
            name,
            f"use one of {', '.join(ARCHITECTURES)}",
        )
    architecture = ARCHITECTURES[name]
    return [
        AnchorLayer(index, _ffn(layer, architecture), _attention(layer, architecture))
        for index, layer in enumerate(anchor.layers)
    ]


def head_of(anchor: nn.Module, tokens: mx.array | None = None) -> Callable[[mx.array], mx.array]:
    """What makes logits, (..., vocabulary), of the hidden states that ``anchor.model`` gives; of
    ``tokens`` (n,) alone, (..., n), where they are given."""
    tied = anchor.model["wte" if "wte" in anchor.model else "embed_tokens"]
    scaling = getattr(anchor, "logits_scaling", 1)  # granite's

    def head(hidden: mx.array) -> mx.array:
        # Looked up when it is called: a compiled step sees the weights that it trains.
        own = anchor.get("lm_head", tied)
        if tokens is not None:
            logits = _some_outputs(own, tokens)(hidden)
        else:
            logits = own.as_linear(hidden) if own is tied else own(hidden)
        return logits if scaling == 1 else logits / scaling

    return head


def _some_outputs(module: nn.Module, outputs: mx.array) -> Callable[[mx.array], mx.array]:
    """A linear module or an embedding used as one, quantised or not, for some of its outputs."""
    weight, bias = module["weight"][outputs], module.get("bias")
    if "scales" not in module:
        rows = weight
    else:
        how = (module.group_size, module.bits, module.mode)
        biases = module["biases"][outputs] if "biases" in module else None  # some modes have none
        rows = mx.dequantize(weight, module["scales"][outputs], biases, *how)

    def some(x: mx.array) -> mx.array:
        found = x @ rows.astype(x.dtype).T  # some modes have no dtype but bfloat16
        return found if bias is None else found + bias[outputs]

    return some


def outputs(linear: nn.Module) -> int:
    """Outputs of a linear module, quantised or not."""
    return int(linear.weight.shape[0])


def _whole(module: nn.Module) -> Projection:
    return Projection(module, 0, outputs(module))


def _missing(layer: nn.Module, part: str, names: list[str]) -> str:
    """What lies in the place of ``part`` if it is not there with all its projections, else ''."""
    if part not in layer:
        return f"it has no {part}"
    module = layer[part]
    if any(name not in module or "weight" not in module[name] for name in names):
        return type(module).__name__
    return ""


def _ffn(layer: nn.Module, names: Architecture) -> FFNLayer | str:
    wanted = [names.gate_up] if names.gate_up else [names.gate, names.up]
    if missing := _missing(layer, names.ffn, [n for n in (*wanted, names.down) if n]):
        return missing
    module = layer[names.ffn]
    gate = None
    if names.gate_up:
        size = outputs(module[names.gate_up]) // 2
        gate, up = (Projection(module[names.gate_up], i * size, size) for i in range(2))
    else:
        gate = _whole(module[names.gate]) if names.gate else None
        up = _whole(module[names.up])
    return FFNLayer(module, names.activation, gate, up, _whole(module[names.down]))


def _attention(layer: nn.Module, names: Architecture) -> AttentionLayer | str:
    wanted = [names.qkv] if names.qkv else [names.query, names.key, names.value]
    if missing := _missing(layer, names.attention, [*wanted, names.output]):
        return missing
    module = layer[names.attention]
    heads = getattr(module, names.num_heads)
    if names.qkv:
        kv_heads = getattr(module, names.num_kv_heads, heads)
        shared = module[names.qkv]
        head_dim = outputs(shared) // (heads + 2 * kv_heads)
        sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        parts = [Projection(shared, sum(sizes[:i]), size) for i, size in enumerate(sizes)]
    else:
        parts = [_whole(module[name]) for name in wanted]
    return AttentionLayer(
        query=parts[0],
        key=parts[1],
        value=parts[2],
        output=_whole(module[names.output]),
        num_heads=heads,
        scale=module.scale,
        query_norm=module.get(names.query_norm),
    )
