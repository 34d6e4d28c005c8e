"""LoRA adapters of PEFT and mlx-lm, read as patches of an anchor's projections.

What made a folder is seen from its ``adapter_config.json``: PEFT's has ``peft_type``, and lies
beside ``adapter_model.safetensors`` or ``.bin``, mlx-lm's beside ``adapters.safetensors``. Headers
alone are read here.
Sources: PEFT's LoraConfig and LoraLayer (the scale is alpha / r, with use_rslora alpha / √r; a
pattern's key is the end of a module's name), mlx-lm's tuner (the scale is the config's own).
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn as nn

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.anchors.attach import anchor_sizes
from mlx_hmem.config import PROJECTIONS
from mlx_hmem.errors import UserError
from mlx_hmem.memory.layer import AttentionLayer, FFNLayer, Projection
from mlx_hmem.reading import read_json, strict_json

from ..anchors.keys import Problems
from ..anchors.weights import FLOATS
from ..torch_files.pickles import open_files
from ..torch_files.tensors import LazyTensor
from .matrices import module_names

CONFIG = "adapter_config.json"
# A LoRA tensor, with the name of the adapter that PEFT may put into it.
NAMED = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[\w-]+)?\.weight")
NAMED_BY_MLX = re.compile(r"(?P<module>.+)\.lora_(?P<half>[ab])")
IN_LAYER = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d{1,4})\.(.+)")
MERGE = "merge it into the model (merge_and_unload) and convert that"
# Keys of PEFT's config that change what an adapter computes, and what to do about them.
REFUSED = {
    "use_dora": MERGE,
    "use_qalora": MERGE,
    "use_bdlora": MERGE,
    "modules_to_save": MERGE,
    "trainable_token_indices": MERGE,
    "target_parameters": MERGE,
    "lora_bias": MERGE,
    "kasa_config": MERGE,
    "monteclora_config": MERGE,
    "layer_replication": "give the model that has these layers for an anchor",
    "alora_invocation_tokens": "train it as plain LoRA",
    "arrow_config": "give its adapters one by one",
}
# Starts of A and B that leave the anchor as it is; others, as pissa, subtract from its weights.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
MOST = 1e9  # of a scale: more is no adapter
TASKS = (None, "CAUSAL_LM")


class Patch(NamedTuple):
    """What is added to a projection: ``scale`` · B A, both as rows of r, (r, width), in files."""

    a: LazyTensor
    b: LazyTensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """An adapter on one anchor: ``patches`` by layer and projection."""

    folder: Path
    sources: tuple[Path, ...]
    patches: Mapping[tuple[int, str], Patch]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The greatest of its patches."""
        return max(patch.a.shape[0] for patch in self.patches.values())


class Place(NamedTuple):
    """A projection by its place in a module: outputs ``start`` to ``start + size``."""

    name: str
    start: int
    size: int


Places = dict[tuple[int, str], list[Place]]  # by layer, and module within it


def places_of(anchor: nn.Module) -> Places:
    """The modules of an anchor's layers that a patch can join, with their projections."""
    names = module_names(anchor)
    found: Places = {}
    for layer in anchor_layers(anchor):
        parts = [
            p for p in (layer.attention, layer.ffn) if isinstance(p, AttentionLayer | FFNLayer)
        ]
        for part in parts:
            for name in PROJECTIONS:
                projection = getattr(part, name, None)
                if isinstance(projection, Projection):
                    match = IN_LAYER.fullmatch(names[id(projection.module)])
                    assert match is not None, names[id(projection.module)]
                    place = Place(name, projection.start, projection.size)
                    found.setdefault((layer.index, match[2]), []).append(place)
    return found


def read_adapter(folder: Path, anchor: nn.Module) -> Adapter:
    """The adapter in a folder, found to fit the anchor.

    Raises:
        UserError: it is no LoRA adapter, has what a patch cannot hold, or another anchor's sizes.
    """
    if not folder.is_dir():
        raise UserError("no such folder", folder, "give the folder of an adapter")
    config = read_json(folder / CONFIG, parse=strict_json) if (folder / CONFIG).exists() else None
    if not isinstance(config, dict):
        what = "not an adapter: no adapter_config.json" if config is None else f"wrong {CONFIG}"
        raise UserError(what, folder, "give a folder that PEFT or mlx_lm.lora has saved")
    of_mlx = "peft_type" not in config
    file = _weights(folder, of_mlx)
    tensors = open_files([file]).tensors
    scale_of, notes = (_of_mlx if of_mlx else _of_peft)(config, folder)
    halves: dict[str, dict[str, LazyTensor]] = {}
    problems = Problems()
    for name, tensor in tensors.items():
        match = (NAMED_BY_MLX if of_mlx else NAMED).fullmatch(name)
        if match is None or tensor.dtype not in FLOATS or len(tensor.shape) != 2:
            problems.lists["left over"].append(name)
            continue
        # Either is kept as rows of r: PEFT's A is (r, inputs), mlx-lm's (inputs, r).
        upper = match["half"].upper()
        rows = tensor.T if (upper == "A") == of_mlx else tensor
        halves.setdefault(match["module"], {})[upper] = rows
    places = places_of(anchor)
    patches = _patches(halves, places, anchor_sizes(anchor), scale_of, problems)
    problems.lists["missing"] += _lacking(config, halves, places)
    remedy = f"it must be LoRA on projections of layers of this anchor alone; else {MERGE}"
    problems.check(f"the adapter {folder.name} does not fit the anchor", remedy)
    if not patches:
        raise UserError("an adapter without tensors", file, "give one that was trained")
    return Adapter(folder, (folder / CONFIG, file), patches, notes)


def _weights(folder: Path, of_mlx: bool) -> Path:
    names = (
        ("adapters.safetensors",) if of_mlx else ("adapter_model.safetensors", "adapter_model.bin")
    )
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise UserError("an adapter without its weights", folder, f"it needs {' or '.join(names)}")


def _patches(
    halves: Mapping[str, Mapping[str, LazyTensor]],
    places: Places,
    sizes: Mapping[str, Any],
    scale_of: Callable[[str, int], float],
    problems: Problems,
) -> dict[tuple[int, str], Patch]:
    patches: dict[tuple[int, str], Patch] = {}
    for module, pair in halves.items():
        match = IN_LAYER.fullmatch(module)
        layer, inside = (int(match[1]), match[2]) if match else (-1, module)
        if (own := places.get((layer, inside))) is None:
            problems.lists.setdefault("no projection of a layer", []).append(module)
            continue
        if len(pair) < 2:
            problems.lists["missing"].append(f"{module}.lora_{'B' if 'A' in pair else 'A'}")
            continue
        a, b = pair["A"], pair["B"]
        inputs, outputs = sizes[PROJECTIONS[own[0].name][0]], sum(p.size for p in own)
        if a.shape != (a.shape[0], inputs) or b.shape != (a.shape[0], outputs) or not a.shape[0]:
            found = (
                f"{module} is {a.shape[1]} to {b.shape[1]} of rank {a.shape[0]} and {b.shape[0]}"
            )
            problems.lists["wrong shape"].append(f"{found}, the anchor's {inputs} to {outputs}")
            continue
        scale = scale_of(module, a.shape[0])
        for place in own:
            patches[layer, place.name] = Patch(a, _part(b, place), scale)
    return patches


def _lacking(config: dict[str, Any], modules: Iterable[str], places: Places) -> list[str]:
    """The modules that PEFT's config targets in all layers and that have no tensors."""
    targets, here = config.get("target_modules"), [IN_LAYER.fullmatch(m) for m in modules]
    some = config.get("layers_to_transform") is not None or config.get("exclude_modules")
    if some or not isinstance(targets, list):
        return []
    ends = tuple(f".{target}" for target in targets if isinstance(target, str))
    have = {(int(match[1]), match[2]) for match in here if match}
    wanted = (place for place in places if f".{place[1]}".endswith(ends))
    return [f"layers.{layer}.{inside}" for layer, inside in wanted if (layer, inside) not in have]


def _part(b: LazyTensor, place: Place) -> LazyTensor:
    """The outputs of B, (r, outputs), that belong to one projection of a fused matrix."""
    return b if b.shape[1] == place.size else b.T.rows(place.start, place.size).T


def _of_mlx(config: dict[str, Any], folder: Path) -> tuple[Callable[[str, int], float], Any]:
    kind, own = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora":
        remedy = "merge it into the model (mlx_lm.fuse) and convert that"
        raise UserError(f"{folder.name} is no LoRA adapter", f"fine_tune_type {kind!r:.40}", remedy)
    own = own if isinstance(own, dict) else {}
    scale = _number(folder, "scale of lora_parameters", own.get("scale"))

    def scale_of(module: str, r: int) -> float:
        _same_rank(folder, module, r, own.get("rank"))
        return scale

    return scale_of, _dropped(folder, own.get("dropout"))


def _of_peft(config: dict[str, Any], folder: Path) -> tuple[Callable[[str, int], float], Any]:
    if config["peft_type"] != "LORA":
        what = f"{folder.name} is no LoRA adapter"
        raise UserError(what, f"peft_type {config['peft_type']!r:.40}", MERGE)
    for key, remedy in REFUSED.items():
        if value := config.get(key):
            raise UserError(f"{folder.name} has more than LoRA", f"{key} {value!r:.80}", remedy)
    if (start := config.get("init_lora_weights")) not in PLAIN_STARTS:
        what = f"the training of {folder.name} began by changing the anchor's weights"
        remedy = f"{MERGE}, or save it with path_initial_model_for_weight_conversion"
        raise UserError(what, f"init_lora_weights {start!r:.40}", remedy)
    if (bias := config.get("bias", "none")) != "none":
        raise UserError(f"{folder.name} has trained biases", f"bias {bias!r:.40}", MERGE)
    if (task := config.get("task_type")) not in TASKS:
        remedy = "an anchor answers with text: give an adapter of task CAUSAL_LM"
        raise UserError(f"{folder.name} is for another task", f"task_type {task!r:.40}", remedy)
    ranks, alphas = (_pattern(config, folder, key) for key in ("rank_pattern", "alpha_pattern"))
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    root = config.get("use_rslora") is True

    def scale_of(module: str, r: int) -> float:
        _same_rank(folder, module, r, _by_pattern(ranks, module, rank))
        own = _number(folder, "lora_alpha", _by_pattern(alphas, module, alpha))
        return own / math.sqrt(r) if root else own / r

    return scale_of, _dropped(folder, config.get("lora_dropout"))


def _pattern(config: dict[str, Any], folder: Path, key: str) -> dict[str, Any]:
    found = config.get(key) or {}
    if not isinstance(found, dict) or not all(re.fullmatch(r"\^?[\w.]+", name) for name in found):
        remedy = "name each module in full, without a regular expression"
        raise UserError(f"{folder.name}: {key} names no modules", repr(found)[:80], remedy)
    return found


def _by_pattern(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    name = module.removeprefix("base_model.model.")
    for key, value in pattern.items():
        if name == key.removeprefix("^") or (key[0] != "^" and name.endswith(f".{key}")):
            return value
    return default


def _same_rank(folder: Path, module: str, r: int, said: Any) -> None:
    if type(said) is not int or said != r:
        what = f"{folder.name}: {CONFIG} has another rank than its weights"
        raise UserError(what, f"{said!r:.40}, {module} has {r}", "give those of one adapter")


def _number(folder: Path, name: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < MOST:
        what = f"{folder.name}: {name} is not a number"
        raise UserError(what, repr(value)[:40], f"restore {CONFIG}")
    return float(value)


def _dropped(folder: Path, dropout: Any) -> tuple[str, ...]:
    text = f"{folder.name}: dropout {dropout} is for training, and left out"
    return (text,) if dropout else ()
