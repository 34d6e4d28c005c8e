"""The LoRA memory of a path as an adapter: of PEFT, of mlx-lm, of llama.cpp.

All three keep for each module one pair, A and B, of one rank and one scale for the whole adapter.
Scale is our α; where patches share a module (query and key in one matrix) their pairs lie one
behind the other, and what is of lower rank is filled with zeros. No number changes.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.anchors.load import anchor_of_config, named_parameters, read_config
from mlx_hmem.bank.quantization import all_finite
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors, write_atomic
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.memory.lora import ALPHA

from ..anchors.hugging_face import RULES
from ..anchors.keys import SAME, rule_of
from ..gguf.names import NAMES, to_theirs
from ..gguf.out.values import architecture_of
from ..gguf.out.write import Stored, computed
from .matrices import Patch, patches_of

FILE = {"peft": "adapter_model.safetensors", "mlx-lm": "adapters.safetensors"}
CONFIG = "adapter_config.json"


class Pair(NamedTuple):
    """What is added to one module's matrix: α · B A; ``a`` (r, inputs), ``b`` (r, outputs)."""

    layer: int
    module: str
    a: mx.array
    b: mx.array


class Adapter(NamedTuple):
    """The pairs of all modules, of one rank; ``layers``: those that have some, None for all."""

    config: dict[str, Any]  # the anchor's
    anchor: nn.Module
    rank: int
    layers: tuple[int, ...] | None
    pairs: list[Pair]


def adapter_of(folder: Path, memory: FetchedMemory) -> Adapter:
    """The memory as an adapter of the anchor in ``folder``.

    Raises UserError: it is of another kind than LoRA, or holds numbers that are not finite.
    """
    if not memory.config.patched:
        wide = memory.config.kind == "ffn"
        remedy = "use --as model" if wide else "run it attached, with mlx_hmem.generate"
        raise UserError(f"memory of kind {memory.config.kind} is no LoRA adapter", folder, remedy)
    config = read_config(folder)
    anchor = anchor_of_config(config)
    sizes = {n: a.shape[0] for n, a in named_parameters(anchor).items() if n.endswith(".weight")}
    modules: dict[str, list[Patch]] = {}
    for patch in patches_of(anchor, memory):
        modules.setdefault(patch.module, []).append(patch)
    pairs = [_joined(own, sizes[f"{name}.weight"]) for name, own in modules.items()]
    rank = max(len(pair.a) for pair in pairs)
    pairs = [pair._replace(a=_filled(pair.a, rank), b=_filled(pair.b, rank)) for pair in pairs]
    for pair in pairs:
        if not (all_finite(pair.a) and all_finite(pair.b)):
            remedy = "restore the bank; mlx_hmem.bank verify looks for a damaged block"
            raise UserError("the memory has numbers that are not finite", pair.module, remedy)
    return Adapter(config, anchor, rank, memory.config.layers, pairs)


def _joined(patches: Sequence[Patch], outputs: int) -> Pair:
    """The patches of one module as one pair; those with the same A need it once."""
    parts: list[tuple[mx.array, mx.array]] = []
    for patch in patches:
        after = outputs - patch.start - patch.size
        b = mx.pad(patch.b, [(0, 0), (patch.start, after)])
        same = next((i for i, (a, _) in enumerate(parts) if mx.array_equal(a, patch.a)), None)
        if same is None:
            parts.append((patch.a, b))
        else:
            parts[same] = (patch.a, parts[same][1] + b)
    a, b = (mx.concatenate(list(each)) for each in zip(*parts, strict=True))
    return Pair(patches[0].layer, patches[0].module, a, b)


def _filled(rows: mx.array, rank: int) -> mx.array:
    return mx.pad(rows, [(0, rank - len(rows)), (0, 0)])


def _inside(pair: Pair) -> str:
    """The module's name within its layer: ``self_attn.q_proj``."""
    return pair.module.split(f".{pair.layer}.", 1)[1]


def write_peft(folder: Path, adapter: Adapter, base: str) -> None:
    """A folder that ``PeftModel.from_pretrained`` reads; ``base`` is what it names as its model."""
    name = adapter.config["model_type"]
    rules, prefix = RULES.get(name, [SAME]), "transformer." if name == "gpt2" else ""
    arrays = {}
    for pair in adapter.pairs:
        rule, _, values = rule_of(f"{pair.module}.weight", rules)
        theirs = prefix + rule.torch.format(**values).removesuffix(".weight")
        arrays[f"base_model.model.{theirs}.lora_A.weight"] = pair.a
        arrays[f"base_model.model.{theirs}.lora_B.weight"] = pair.b.T
    layer = [n.rsplit(".", 1)[-1] for n, _ in adapter.anchor.layers[0].named_modules() if n]
    ends = {inside: inside.rsplit(".", 1)[-1] for inside in map(_inside, adapter.pairs)}
    targets = {end if layer.count(end) == 1 else inside for inside, end in ends.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapter.rank,
        "lora_alpha": int(ALPHA * adapter.rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "layers_to_transform": None if adapter.layers is None else list(adapter.layers),
        "fan_in_fan_out": name == "gpt2",  # whose matrices transformers keeps transposed
        "inference_mode": True,
    }
    save_safetensors(folder / FILE["peft"], arrays, {"format": "pt"})
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def write_mlx_lm(folder: Path, adapter: Adapter, base: str) -> None:
    """A folder that mlx-lm reads with ``--adapter-path``."""
    arrays = {}
    for pair in adapter.pairs:
        arrays[f"{pair.module}.lora_a"], arrays[f"{pair.module}.lora_b"] = pair.a.T, pair.b
    everywhere = adapter.layers is None  # else each module is named by itself
    keys = dict.fromkeys(_inside(p) if everywhere else p.module for p in adapter.pairs)
    config = {
        "fine_tune_type": "lora",
        "model": base,
        "num_layers": len(adapter.anchor.layers),
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": ALPHA,
            "dropout": 0.0,
            "keys": list(keys),
        },
    }
    save_safetensors(folder / FILE["mlx-lm"], arrays)
    write_atomic(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def gguf_adapter(adapter: Adapter) -> tuple[dict[str, Any], list[Stored]]:
    """Values and tensors of llama.cpp's LoRA file. Its scale is alpha ÷ r; of architectures whose
    RoPE turns neighbours it has the rows of query and key, and so of B, interleaved."""
    name = adapter.config["model_type"]
    names = NAMES[name]
    values = {
        "general.architecture": architecture_of(name),
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": float(ALPHA * adapter.rank),
    }
    tensors: list[Stored] = []
    for pair in adapter.pairs:
        rule, _, found = rule_of(f"{pair.module}.weight", names.rules)
        theirs = rule.torch.format(**found)
        b = to_theirs({theirs: computed(pair.b.T)}, names, adapter.config)[theirs]
        for end, tensor in (("lora_a", computed(pair.a)), ("lora_b", b)):
            tensors.append(Stored(f"{theirs}.{end}", tensor, tensor.dtype))
    return values, tensors


WRITERS: dict[str, Callable[..., None]] = {"peft": write_peft, "mlx-lm": write_mlx_lm}
