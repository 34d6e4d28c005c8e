"""What memory is meant to compute, computed another way: the references of the parity tests.

FFN memory widens the anchor's own matrices, LoRA memory patches its weights, KV memory is attention
written out inside the architecture's own attention function.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import KINDS, MemoryConfig
from mlx_hmem.memory import Floats, join_blocks
from tests.helpers import tiny_anchors as anchors

PAIRS = [(name, kind) for name in anchors.GATED + anchors.UNGATED for kind in KINDS]
PAIRS += [(name, kind) for name in anchors.EXPERTS for kind in ("lora_qk", "lora_vo", "kv")]


def of_kind(kind: str) -> dict[str, Any]:
    """A kind as keys of a config; of kind lora with projections of both parts of a layer."""
    targets = ("key", "output", "up", "down")
    return {"kind": kind} | ({"targets": targets} if kind == "lora" else {})


def config_of(anchor: nn.Module, kind: str, layers: tuple[int, ...] | None = None) -> MemoryConfig:
    of = of_kind(kind)
    return memory_config(anchor, r=(4, 0, 3), branching=(2, 2, 2), **of, layers=layers)


def random_rows(config: MemoryConfig, seed: int, size: float = 0.3) -> Floats:
    rng = np.random.default_rng(seed)
    blocks = [
        mx.array(size * rng.standard_normal(config.block_shape(level), np.float32))
        for level in (1, 3)
    ]
    return join_blocks(blocks, config)


def make_ids(seed: int = 3, shape: tuple[int, int] = (2, 9)) -> mx.array:
    return mx.random.randint(0, anchors.VOCAB, shape, key=mx.random.key(seed))


def widen(anchor: nn.Module, rows: Floats) -> None:
    """Puts FFN memory into the anchor's own FFN matrices, bias 0 for the new units."""
    for index, layer in enumerate(anchor.layers):
        mlp, *rest = layer.mlp, *rows[0][index]
        down, inner = rest[-1], rest[:-1]
        if "gate_up_proj" in mlp:  # one matrix: all gates, then all ups
            gate, up = mx.split(mlp.gate_up_proj.weight, 2)
            mlp.gate_up_proj.weight = mx.concatenate([gate, inner[0], up, inner[1]])
            names = []
        else:
            names = [n for n in ("gate_proj", "up_proj", "c_fc") if n in mlp]
        for linear, added in zip((mlp[n] for n in names), inner, strict=bool(names)):
            linear.weight = mx.concatenate([linear.weight, added])
            if "bias" in linear:
                linear.bias = mx.concatenate([linear.bias, mx.zeros(added.shape[0])])
        last = mlp["down_proj" if "down_proj" in mlp else "c_proj"]
        last.weight = mx.concatenate([last.weight, down.T], axis=1)


def patched(weight: mx.array, start: int, a: mx.array, b: mx.array) -> mx.array:
    """``weight`` with 2 · Bᵀ A added to its rows from ``start`` on."""
    end = start + b.shape[-1]
    return mx.concatenate([weight[:start], weight[start:end] + 2 * b.T @ a, weight[end:]])


# Where the projections of mlx-lm's architectures lie: modules within a layer, by all their names.
PLACES = {
    "query": ("q_proj", "qkv_proj", "c_attn"),
    "key": ("k_proj", "qkv_proj", "c_attn"),
    "value": ("v_proj", "qkv_proj", "c_attn"),
    "output": ("o_proj", "c_proj"),
    "gate": ("gate_proj", "gate_up_proj"),
    "up": ("up_proj", "gate_up_proj", "c_fc"),
    "down": ("down_proj", "c_proj"),
}


def patch_weights(anchor: nn.Module, config: MemoryConfig, rows: Floats) -> None:
    """Puts LoRA memory into the anchor's own weights."""
    query, key_value = config.query_size, config.key_value_size
    starts = {"key": query, "value": query + key_value, "up": config.intermediate_size}
    for index, layer in enumerate(anchor.layers):
        names = [name for some in config.matrices.values() for name in some]
        own = dict(zip(names, (m for group in rows for m in group[index]), strict=True))
        for target in config.patched:
            parts = (
                ("attn", "self_attn") if target in ("query", "key", "value", "output") else ("mlp",)
            )
            part = next(layer[name] for name in parts if name in layer)
            name = next(name for name in PLACES[target] if name in part)
            shared = name in ("qkv_proj", "c_attn", "gate_up_proj")
            start = starts.get(target, 0) if shared else 0
            a, b = own[f"{target}_a"], own[f"{target}_b"]
            part[name].weight = patched(part[name].weight, start, a, b)


def write_out_kv(name: str, rows: Floats, replace: Callable[..., None]) -> None:
    """Adds softmax(q Kᵀ · scale) V in the attention function of the architecture's own module.

    That function sees queries after RoPE, so RoPE must be off. ``replace(module, name, value)``
    sets an attribute, as pytest's ``monkeypatch.setattr`` does.
    """
    code, layer = anchors.module_of(name), iter(range(anchors.LAYERS * 100))
    before = code.scaled_dot_product_attention

    def attention(queries, keys, values, cache, scale, mask, **kwargs):  # type: ignore[no-untyped-def]
        output = before(queries, keys, values, cache=cache, scale=scale, mask=mask, **kwargs)
        k, v = (
            part.reshape(part.shape[0], anchors.HEADS, -1).transpose(1, 0, 2)
            for part in rows[0][next(layer) % anchors.LAYERS]
        )
        weights = mx.softmax(scale * (queries @ k.swapaxes(-1, -2)), axis=-1)
        return output + weights @ v

    replace(code, "scaled_dot_product_attention", attention)


def switch_rope_off(anchor: nn.Module) -> None:
    for layer in anchor.layers:
        if "self_attn" in layer:
            layer.self_attn.rope = lambda x, offset=0: x


def apply_reference(
    anchor: nn.Module, name: str, kind: str, rows: Floats, replace: Callable[..., None]
) -> None:
    """Makes ``anchor`` the reference of the same anchor with the memory ``rows`` attached."""
    if kind == "ffn":
        widen(anchor, rows)
    elif kind == "kv":
        write_out_kv(name, rows, replace)
    else:
        patch_weights(anchor, config_of(anchor, kind), rows)


def gradient_errors(name: str, kind: str) -> list[float]:
    """For each group of rows, |gradient - finite difference| ÷ |finite difference|."""
    with mx.stream(mx.cpu):  # float64 is there only; RoPE and norms stay near float32
        anchor, ids = anchors.make_anchor(name), make_ids(shape=(1, 5))
        config = config_of(anchor, kind)
        anchor.update(tree_map(lambda a: a.astype(mx.float64), anchor.parameters()))
        slot = attach_memory(anchor, config)
        rows = tuple(g.astype(mx.float64) for g in random_rows(config, 5, size=0.15))
        weights = mx.random.normal((1, 5, anchors.VOCAB), key=mx.random.key(0))

        def loss(rows: Floats) -> mx.array:
            with slot.using(rows):
                return (anchor(ids) * weights).sum()

        def moved(group: int, step: mx.array) -> float:
            changed = (*rows[:group], rows[group] + step, *rows[group + 1 :])
            return np.array(loss(changed)).item()

        rng, errors = np.random.default_rng(0), []
        for group, gradient in enumerate(mx.grad(loss)(rows)):
            # Near the gradient: across it, rounding would be all that is measured.
            direction = gradient * mx.array(rng.uniform(0.2, 1.8, gradient.shape), mx.float64)
            direction = direction / mx.linalg.norm(direction)
            expected = (gradient * direction).sum().item()
            h = min(3e-2, 1e-1 / abs(expected))
            one, two = (
                moved(group, size * direction) - moved(group, -size * direction)
                for size in (h, 2 * h)
            )
            measured = (8 * one - two) / (12 * h)
            errors.append(abs(expected - measured) / abs(measured))
        return errors


def difference(a: object, b: object) -> float:
    """The largest absolute one."""
    return float(np.abs(np.array(a) - np.array(b)).max())


def openlm_differences(path: Path, tied: bool) -> dict[str, float]:
    """How far logits, loss and every gradient of a tiny OpenLM are from PyTorch's in ``path``."""
    data = dict(np.load(path))
    model = Model(ModelArgs("openlm", 64, 3, 160, 6, 8, 101, tie_word_embeddings=tied))

    def part(prefix: str) -> dict[str, mx.array]:
        found = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
        return model.sanitize({name: mx.array(array) for name, array in found.items()})

    model.load_weights(list(part("w/").items()))
    ids, expected = mx.array(data["ids"]), part("g/")

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    found: Any = dict(tree_flatten(gradients))
    assert found.keys() == expected.keys()
    return {
        "logits": difference(model(ids), data["logits"]),
        "loss": difference(value, data["loss"]),
        "gradients": float(np.max([difference(found[name], g) for name, g in expected.items()])),
    }


def minilm_differences(encoder: Any, path: Path) -> tuple[np.ndarray, dict[str, float]]:
    """The vectors of the texts in ``path``, and how they and their token ids differ from those of
    sentence-transformers there."""
    data = np.load(path)
    texts = json.loads(path.with_suffix(".texts.json").read_text(encoding="utf-8"))
    ids = [encoding.ids for encoding in encoder.tokenizer.encode_batch(texts)]
    golden = [row[:n].tolist() for row, n in zip(data["input_ids"], data["lengths"], strict=True)]
    vectors = encoder.encode(texts)
    return vectors, {
        "texts_whose_ids_differ": sum(a != b for a, b in zip(ids, golden, strict=True)),
        "vectors": difference(vectors, data["vectors"]),
    }
