"""The OpenLM architecture, the paper's own anchors, in the style of mlx-lm's models.

Facts that the parameter counts and the lineage fix: no biases, gain-only norms, query and key
normalised over the whole heads × head_dim vector *before* the head split and RoPE, explicit head
and FFN widths. Gain-only layer norm is the lineage's default; RMS norm is a configuration.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention


@dataclass
class ModelArgs(BaseModelArgs):
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    head_dim: int
    vocab_size: int
    norm_type: str = "layer_norm"  # or "rms_norm"
    norm_eps: float = 1e-5
    qk_norm: bool = True
    rope_theta: float = 100_000.0
    rope_traditional: bool = False  # True: interleaved pairs, OpenLM's `llama_rotary`
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.norm_type not in NORMS:
            raise ValueError(f"unknown norm_type: {self.norm_type!r}; use one of {list(NORMS)}")


NORMS = {
    "layer_norm": lambda dims, eps: nn.LayerNorm(dims, eps=eps, bias=False),
    "rms_norm": lambda dims, eps: nn.RMSNorm(dims, eps=eps),
}


def _preset(layers: int, hidden: int, heads: int, head_dim: int, ffn: int, tied: bool) -> ModelArgs:
    return ModelArgs(
        model_type="openlm",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        head_dim=head_dim,
        vocab_size=50_432,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )


# Paper, section 4: 163,510,016, 411,665,408 and 1,439,893,504 parameters.
PRESETS = {
    "openlm-160m": _preset(35, 512, 12, 32, 2048, True),
    "openlm-410m": _preset(24, 1024, 16, 64, 2816, False),
    "openlm-1b": _preset(24, 2048, 16, 128, 5632, False),
}


def document_mask(document_ids: mx.array) -> mx.array:
    """Causal attention inside each document of a packed sequence.

    ``document_ids`` (batch, time) gives a boolean mask (batch, 1, time, time).
    """
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & mx.tri(document_ids.shape[1], dtype=mx.bool_)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        inner = args.num_attention_heads * args.head_dim
        self.n_heads = args.num_attention_heads
        self.scale = args.head_dim**-0.5
        self.q_proj = nn.Linear(args.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(args.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(args.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, args.hidden_size, bias=False)
        if args.qk_norm:
            self.q_norm = NORMS[args.norm_type](inner, args.norm_eps)
            self.k_norm = NORMS[args.norm_type](inner, args.norm_eps)
        self.rope = nn.RoPE(args.head_dim, args.rope_traditional, args.rope_theta)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        B, L, _ = x.shape
        queries, keys, values = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if "q_norm" in self:
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys, values = (
            a.reshape(B, L, self.n_heads, -1).transpose(0, 2, 1, 3) for a in (queries, keys, values)
        )
        offset = cache.offset if cache is not None else 0
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        output = scaled_dot_product_attention(
            queries,
            keys,
            values,
            cache,
            self.scale,
            mask,  # type: ignore[arg-type]
        )
        return self.o_proj(output.transpose(0, 2, 1, 3).reshape(B, L, -1))


class MLP(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = NORMS[args.norm_type](args.hidden_size, args.norm_eps)
        self.post_attention_layernorm = NORMS[args.norm_type](args.hidden_size, args.norm_eps)

    def __call__(
        self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None
    ) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class OpenLMModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        self.norm = NORMS[args.norm_type](args.hidden_size, args.norm_eps)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, mask: mx.array | None = None
    ) -> mx.array:
        h = self.embed_tokens(inputs)
        states = cache if cache is not None else [None] * len(self.layers)
        attention_mask = create_attention_mask(h, states[0]) if mask is None else mask
        for layer, state in zip(self.layers, states, strict=True):
            h = layer(h, attention_mask, state)
        return self.norm(h)


class Model(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = OpenLMModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, mask: mx.array | None = None
    ) -> mx.array:
        """Logits (batch, time, vocabulary) of token ids (batch, time).

        ``mask`` replaces the causal mask, e.g. by :func:`document_mask`; without a KV cache only.
        """
        h = self.model(inputs, cache, mask)
        if self.args.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(h)
        return self.lm_head(h)

    @property
    def layers(self) -> list[TransformerBlock]:
        return self.model.layers

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Takes OpenLM's own state-dict names as well as ours."""
        if not any("tok_embeddings.weight" in name for name in weights):
            return weights
        weights = from_openlm_names(weights)
        if self.args.tie_word_embeddings:  # OpenLM's tied models carry the matrix twice
            weights.pop("lm_head.weight", None)
        return weights


# OpenLM's names and ours, for layer {i}; of a packed matrix, ours are equal parts of its rows.
NAMES = {
    "tok_embeddings.weight": ("model.embed_tokens.weight",),
    "layers.{i}.attention.in_proj.weight": (
        "model.layers.{i}.self_attn.q_proj.weight",
        "model.layers.{i}.self_attn.k_proj.weight",
        "model.layers.{i}.self_attn.v_proj.weight",
    ),
    "layers.{i}.attention.out_proj.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.attention.q_norm.weight": ("model.layers.{i}.self_attn.q_norm.weight",),
    "layers.{i}.attention.k_norm.weight": ("model.layers.{i}.self_attn.k_norm.weight",),
    "layers.{i}.feed_forward.w12.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.feed_forward.w3.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.ffn_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
}
PREFIXES = ("module.", "_orig_mod.", "model.")  # of PyTorch's wrappers


def from_openlm_names(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Renames and unpacks an OpenLM state dict; RoPE buffers are dropped."""
    result = {}
    for name, array in weights.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
            name = name.removeprefix(prefix)
        if name.endswith("inv_freq"):
            continue
        index = name.split(".")[1]
        parts = NAMES[name.replace(f"layers.{index}.", "layers.{i}.", 1)]
        for part, piece in zip(parts, mx.split(array, len(parts), axis=0), strict=True):
            result[part.replace("{i}", index)] = piece
    return result
