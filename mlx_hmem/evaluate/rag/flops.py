"""FLOPs of what evaluation reads and writes, counted, not measured.

For a question of n tokens, each processed once as with a KV cache, s of them before:

    FLOPs = 2 · P · n + 4 · W · pairs,    pairs = n · s + n · (n + 1) / 2

P: parameters that a token uses: all of the anchor's but the lookup of its embedding, which is a
copy; the head is counted, also where it is the embedding's matrix; of experts those that a token is
sent to; and the fetched or generic memory's. W: heads × head_dim summed over the layers; a pair is
a query with a key at or before it, 2 FLOPs a number for their product and 2 for the value's sum.
Softmax, norms' roots and activations are left out, as is usual, and so is the search for memory or
document: encoder, tree and cosines. A sliding window is counted as if the anchor had none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.scoring import Candidate, plan_question
from mlx_hmem.memory.layer import AttentionLayer
from mlx_hmem.model.model import MemoryModel

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class Work:
    """Tokens processed, and pairs of a query and a key that attention compares in each layer."""

    tokens: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, tokens: int, before: int = 0) -> "Work":
        """That of some tokens behind others that a KV cache holds."""
        return cls(tokens, tokens * before + tokens * (tokens + 1) // 2)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.tokens + other.tokens, self.pairs + other.pairs)


def question_work(candidates: Sequence[Candidate], max_tokens: int = 0) -> Work:
    """Of one question: what its choices share is read once, then the rest of each; or, where
    ``max_tokens`` are generated, the prompt and all of these but the last."""
    if max_tokens:
        return Work.of(len(candidates[0].context) + max_tokens - 1)
    plan = plan_question(0, candidates)
    read = [Work.of(len(prefix)) for prefix in plan.prefixes]
    read += [Work.of(len(row), len(plan.prefixes[p])) for p, row, _ in plan.rows]
    return sum(read, Work())


def parameters_per_token(anchor: nn.Module, experts_per_token: int = 0) -> int:
    """P of the module's docstring for the anchor alone."""
    leaves: Any = tree_flatten(
        anchor.leaf_modules(), is_leaf=lambda module: isinstance(module, nn.Module)
    )
    has_head = any(name.split(".")[-1] == "lm_head" for name, _ in leaves)
    tokens = next(module for _, module in leaves if isinstance(module, EMBEDDINGS))
    count = 0
    for _, module in leaves:
        if isinstance(module, EMBEDDINGS):
            count += 0 if has_head or module is not tokens else _size(module)
        elif "weight" in module and module.weight.ndim == 3:  # (experts, outputs, inputs)
            if not experts_per_token:
                raise UserError("how many experts a token uses", "unknown", "add it to config.json")
            count += _size(module) * experts_per_token // module.weight.shape[0]
        else:
            count += _size(module)
    return count


def _size(module: nn.Module) -> int:
    """Parameters of a module without submodules; of a quantised one those that it stands for."""
    arrays: Any = dict(tree_flatten(module.parameters()))
    if not hasattr(module, "bits"):
        return sum(array.size for array in arrays.values())
    packed = arrays["weight"].size * 32 // module.bits
    return int(packed + (arrays["bias"].size if "bias" in arrays else 0))


class Flops:
    """The formula for one model."""

    def __init__(self, model: MemoryModel):
        experts = model.anchor_config.get("num_experts_per_tok") or 0
        self.anchor_parameters = parameters_per_token(model.anchor, experts)
        self.memory_parameters = model.require_bank().config.fetched_parameters
        self.attention_width = 0
        for layer in anchor_layers(model.anchor):
            if not isinstance(layer.attention, AttentionLayer):
                what = f"the attention of layer {layer.index} cannot be counted"
                raise UserError(what, layer.attention, "leave --rag out")
            self.attention_width += layer.attention.query.size

    def of(self, work: Work, memory: str) -> int:
        """FLOPs with ``memory`` "none", "generic" or "fetched"."""
        used = self.anchor_parameters + (0 if memory == "none" else self.memory_parameters)
        return 2 * used * work.tokens + 4 * self.attention_width * work.pairs
