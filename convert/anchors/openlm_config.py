"""What an OpenLM checkpoint and its config JSON say of the model, brought together.

The config may leave out almost everything: the shapes of the tensors then say it, or else OpenLM's
own default, and whatever is not stated is said in a line. What it states must agree with them.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.anchors.openlm import ModelArgs
from mlx_hmem.errors import UserError
from mlx_hmem.reading import read_json

from ..torch_files.tensors import LazyTensor
from .weights import equal_bits

Config = dict[str, Any]
INV_FREQ = "layers.{i}.attention.pos_embed.inv_freq"
EMBEDDING, HEAD = "tok_embeddings.weight", "output.weight"
NORMS = {
    "gain_only_layer_norm": "layer_norm",
    "gain_only_lp_layer_norm": "layer_norm",
    "rms_norm": "rms_norm",
}
FFNS = ("swiglu", "swiglu_torch")
POSITIONS = {"rotary": False, "llama_rotary": True}  # whether pairs are interleaved
DEFAULTS = {"model_norm": "gain_only_layer_norm", "ffn_type": "swiglu"}
SEQ_LEN = 2048
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # handed through to config.json
KNOWN = {
    "hidden_dim", "n_layers", "n_heads", "head_dim", "ffn_dim", "vocab_size", "seq_len",
    "post_embed_norm", "weight_tying", "model_norm", "qk_norm", "positional_embedding_type",
    "ffn_type", "rope_theta", "norm_eps", *IDS,
}  # fmt: skip
SET = "give --config FILE with it, or --set"


def read_openlm_config(
    source: Path, file: Path | None, options: Config
) -> tuple[Config, Path | None]:
    """The config of the file given, else of the one beside the checkpoint, under ``options``."""
    if file is None:
        folder = source if source.is_dir() else source.parent
        found = [f for f in sorted(folder.glob("*.json")) if _has_config(f)]
        own = [f for f in found if f.stem == source.stem]
        if len(own or found) > 1:
            names = ", ".join(f.name for f in found)
            raise UserError("several OpenLM configs", names, "name one with --config")
        file = next(iter(own or found), None)
    config = read_json(file) if file else {}
    if not isinstance(config, dict):
        raise UserError("the OpenLM config is no JSON object", file, "restore it")
    config |= options
    if unknown := sorted(set(config) - KNOWN):
        raise UserError(
            "the OpenLM config has a key that has no meaning here",
            unknown[0],
            f"take it out if it changes nothing; known are {', '.join(sorted(KNOWN))}",
        )
    return config, file


def _has_config(file: Path) -> bool:
    try:
        values = read_json(file, most_bytes=1 << 20)
    except UserError:
        return False
    return isinstance(values, dict) and "hidden_dim" in values


class _Facts:
    """What config and tensors say, brought together."""

    def __init__(self, config: Config, tensors: dict[str, LazyTensor]):
        self.config, self.tensors, self.notes = config, tensors, list[str]()

    def tensor(self, name: str) -> LazyTensor:
        if name not in self.tensors:
            raise UserError("not an OpenLM checkpoint: a tensor is missing", name, "check the file")
        if len(self.tensors[name].shape) != 2:
            raise UserError(f"{name} is no matrix", self.tensors[name].shape, "check the file")
        return self.tensors[name]

    def agree(self, key: str, found: Any, where: str) -> Any:
        """The value of ``key`` that the tensors show; the config must not contradict it."""
        if key not in self.config:
            self.notes.append(f"{key} {found}: from {where}")
            return found
        stated = self.config[key]
        if stated != found or isinstance(stated, bool) != isinstance(found, bool):
            raise UserError(
                "the config contradicts the tensors",
                f"{key} is {stated!r} in the config, {found!r} by {where}",
                "give the config of this checkpoint",
            )
        return found

    def chosen(self, key: str, choices: Iterable[str]) -> str:
        """A flag of the config, or OpenLM's default, which is said."""
        if key not in self.config:
            self.notes.append(f"{key} {DEFAULTS[key]}: OpenLM's default, as no config says it")
        value = self.config.get(key, DEFAULTS.get(key))
        if not isinstance(value, str) or value not in choices:
            remedy = f"models with {', '.join(choices)} are"
            raise UserError(f"this {key} is not supported", value, remedy)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise UserError(f"{key} is not a number above 0", repr(value), "correct it")
        return value


def model_args(tensors: dict[str, LazyTensor], config: Config) -> tuple[Config, bool, list[str]]:
    """The ``config.json`` of the anchor, whether its head is tied, and what was inferred."""
    facts = _Facts(config, tensors)
    vocab, hidden = facts.tensor(EMBEDDING).shape
    facts.agree("vocab_size", vocab, EMBEDDING)
    facts.agree("hidden_dim", hidden, EMBEDDING)
    # Counted, not read: a single name may speak of any layer.
    numbers = {m[1] for name in tensors if (m := re.match(r"layers\.(\d+)\.", name))}
    layers = facts.agree("n_layers", len(numbers), "the names of the tensors")
    in_proj = facts.tensor("layers.0.attention.in_proj.weight")
    packed = facts.tensor("layers.0.feed_forward.w12.weight")
    for name, tensor, parts in (("in_proj", in_proj, 3), ("w12", packed, 2)):
        if tensor.shape[0] % parts or not tensor.shape[0]:
            what = f"{name} does not hold {parts} matrices"
            raise UserError(what, tensor.shape, "check the file")
    ffn = facts.agree("ffn_dim", packed.shape[0] // 2, "the shape of w12")
    heads, head_dim = _heads(facts, in_proj.shape[0] // 3)
    if facts.config.get("post_embed_norm"):
        raise UserError(
            "a norm after the embedding is not supported", "post_embed_norm", "use PyTorch"
        )
    facts.chosen("ffn_type", FFNS)
    norm = NORMS[facts.chosen("model_norm", NORMS)]
    qk_norm = "layers.0.attention.q_norm.weight" in tensors
    facts.agree("qk_norm", qk_norm, "the tensors")
    interleaved = _positions(facts)
    tied = _tied(facts)
    seq_len = facts.number("seq_len", SEQ_LEN)
    if "seq_len" not in config:
        facts.notes.append(f"seq_len {seq_len}: OpenLM's default, as no config says it")
    args = ModelArgs(
        model_type="openlm",
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=ffn,
        num_attention_heads=heads,
        head_dim=head_dim,
        vocab_size=vocab,
        norm_type=norm,
        norm_eps=facts.number("norm_eps", 1e-5),
        qk_norm=qk_norm,
        rope_theta=_rope_theta(facts, head_dim),
        rope_traditional=interleaved,
        max_position_embeddings=int(seq_len),
        tie_word_embeddings=tied,
    )
    return asdict(args), tied, facts.notes


def _heads(facts: _Facts, inner: int) -> tuple[int, int]:
    """(heads, head_dim), whose product is ``inner``."""
    inv_freq = facts.tensors.get(INV_FREQ.format(i=0))
    heads: Any = facts.config.get("n_heads")
    head_dim: Any = facts.config.get("head_dim")
    for key, value in (("n_heads", heads), ("head_dim", head_dim)):
        if value is not None and (type(value) is not int or not 1 <= value <= inner):
            raise UserError(f"{key} does not fit in_proj", value, f"its width is {inner} × 3")
    if inv_freq is not None:
        head_dim = facts.agree("head_dim", 2 * math.prod(inv_freq.shape), "inv_freq")
    if head_dim is None and heads is None:
        raise UserError(
            "neither head_dim nor n_heads is known", "nothing says them", f"{SET} head_dim=N"
        )
    if head_dim is None:
        head_dim = facts.agree("head_dim", inner // heads, "the shape of in_proj and n_heads")
    head_dim = int(head_dim)
    if heads is None:
        heads = facts.agree(
            "n_heads", inner // max(1, head_dim), "the shape of in_proj and head_dim"
        )
    if heads * head_dim != inner:
        raise UserError(
            "the config contradicts the tensors",
            f"{heads} heads × head_dim {head_dim} = {heads * head_dim}, in_proj makes it {inner}",
            f"{SET} head_dim=N",
        )
    return heads, head_dim


def _positions(facts: _Facts) -> bool:
    """Whether RoPE's pairs are interleaved."""
    key, has_buffer = "positional_embedding_type", INV_FREQ.format(i=0) in facts.tensors
    if key in facts.config:
        return POSITIONS[facts.chosen(key, POSITIONS)]
    kind = "rotary" if has_buffer else "llama_rotary"
    presence = "is there" if has_buffer else "is not there, which only llama_rotary leaves out"
    facts.notes.append(f"{key} {kind}: inv_freq {presence}; {SET} {key}=… if it is another")
    return POSITIONS[kind]


def _rope_theta(facts: _Facts, head_dim: int) -> float:
    """RoPE's base: the config's, which inv_freq must bear out, or that of inv_freq."""
    stated = facts.number("rope_theta", 0.5) if "rope_theta" in facts.config else None
    tensor = facts.tensors.get(INV_FREQ.format(i=0))
    if tensor is None or head_dim < 4:
        if stated is None:
            facts.notes.append(
                f"rope_theta 10000: OpenLM's own, as nothing says it; {SET} rope_theta=…"
            )
        return float(stated or 10_000.0)
    found = tensor.numbers().reshape(-1)
    for name, other in facts.tensors.items():
        if name.endswith("inv_freq") and not np.array_equal(other.numbers().reshape(-1), found):
            raise UserError("layers have different RoPE", name, "such models are not supported")
    tolerance = 1e-2 if tensor.dtype == "BF16" else 2e-3 if tensor.dtype == "F16" else 1e-4
    exact = float(found[1]) ** (-head_dim / 2) if found[1] > 0 else math.nan
    # The round number that was meant: 99999.7 is 100000.
    rounded = [float(f"{exact:.{digits}g}") for digits in (1, 2, 3, 6)] if exact > 0 else []
    for base in [stated] if stated is not None else rounded:
        if np.allclose(inverse_frequencies(base, head_dim), found, rtol=tolerance, atol=0):
            if stated is None:
                facts.notes.append(f"rope_theta {base:g}: from inv_freq")
            return float(base)
    raise UserError(
        "the config contradicts the tensors" if stated else "inv_freq is of no RoPE known here",
        f"rope_theta {stated}, inv_freq makes it {exact:.6g}",
        f"{SET} rope_theta={exact:.6g}",
    )


def inverse_frequencies(base: float, head_dim: int) -> np.ndarray:
    """RoPE's ``inv_freq`` as OpenLM computes it, (head_dim / 2,) float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (1.0 / np.float32(base) ** exponents).astype(np.float32)


def _tied(facts: _Facts) -> bool:
    embedding, head = facts.tensors[EMBEDDING], facts.tensors.get(HEAD)
    if head is None:
        return bool(facts.agree("weight_tying", True, f"the absence of {HEAD}"))
    stated = facts.config.get("weight_tying")
    equal = stated is not False and equal_bits(embedding, head)
    if stated is True and not equal:
        raise UserError(
            "the config contradicts the tensors",
            f"weight_tying is true, {HEAD} and {EMBEDDING} differ",
            "set weight_tying to false",
        )
    if stated is None:
        facts.notes.append(
            f"weight_tying {equal}: {HEAD} {'equals' if equal else 'is not'} {EMBEDDING}"
        )
    elif not isinstance(stated, bool):
        raise UserError("weight_tying is not true or false", repr(stated), "correct it")
    return equal
