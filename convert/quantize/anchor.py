"""Quantises an anchor with mlx-lm's own quantiser and saves it as mlx-lm does.

The result is an ordinary quantised model of mlx-lm (where mlx-lm knows the architecture). Its
matrices are made one after the other, so memory holds the quantised anchor and one matrix of the
original.
"""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import compute_bits_per_weight, get_total_parameters, make_shards, quantize_model
from tqdm import tqdm

from mlx_hmem.anchors.load import INDEX, load_anchor, named_parameters, read_config, weight_files
from mlx_hmem.bank import Quantization
from mlx_hmem.bank.quantization import all_finite
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, save_safetensors, write_atomic


@dataclass(frozen=True)
class AnchorChange:
    """An anchor before and after; bytes are those of its weight files.

    ``left`` names the modules that could have been quantised and were not: mlx-lm leaves those
    whose rows are no multiple of the group size. ``bits_per_weight`` is None where nothing was.
    """

    quantization: dict[str, Any] | None
    bytes_before: int
    bytes_after: int
    bits_per_weight: float | None
    left: tuple[str, ...]


def quantized_anchor(folder: Path, how: Quantization) -> tuple[nn.Module, dict[str, Any]]:
    """The quantised anchor and its config; no array is made before it is used.

    Raises:
        UserError: it is quantised already, or none of its matrices can be quantised so.
    """
    config = read_config(folder)
    found = config.get("quantization") or config.get("quantization_config")
    if found or (folder / "hf_quant_config.json").exists():
        raise UserError(
            "the anchor is quantised already",
            json.dumps(found)[:100],
            "start from the anchor as it was before, or leave out --anchor-…",
        )
    for file in weight_files(folder):
        arrays = load_safetensors(file)
        while arrays:  # one in memory at a time
            name, array = arrays.popitem()
            if not all_finite(array):
                remedy = "quantise the anchor as it was before they came"
                raise UserError(f"{name} has numbers that are not finite", file, remedy)
    anchor, config = load_anchor(folder, lazy=True)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the report says it better
            anchor, config = quantize_model(anchor, config, how.group_size, how.bits, how.mode)
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "MLX cannot quantise this anchor so", error, "use another mode, bits or group size"
        ) from None
    if not any("scales" in module for _, module in anchor.named_modules()):
        raise UserError(
            "no matrix of the anchor can be quantised so",
            f"groups of {how.group_size}",
            "use a group size that divides its widths",
        )
    return anchor, config


def save_quantized_anchor(folder: Path, target: Path, how: Quantization) -> AnchorChange:
    """Saves the anchor in ``folder`` quantised: ``target`` gets its weights and ``config.json``."""
    anchor, config = quantized_anchor(folder, how)
    _save(anchor, target)
    write_atomic(target / "config.json", json.dumps(dict(sorted(config.items())), indent=4))
    return AnchorChange(
        quantization=how.options,
        bytes_before=weight_bytes(folder),
        bytes_after=weight_bytes(target),
        bits_per_weight=compute_bits_per_weight(anchor),
        left=tuple(sorted(n for n, m in anchor.named_modules() if hasattr(m, "to_quantized"))),
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of the anchor's weight files."""
    return sum(file.stat().st_size for file in weight_files(folder))


def _save(anchor: nn.Module, target: Path) -> None:
    """Weights in files of at most 5 GB and their index, named as mlx-lm names them."""
    weights = named_parameters(anchor)
    for array in tqdm(
        weights.values(), desc="quantising anchor", unit="array", delay=2, disable=None
    ):
        mx.eval(array)
    shards = make_shards(weights)
    size, places = sum(array.nbytes for array in weights.values()), dict[str, str]()
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        name = name if len(shards) > 1 else "model.safetensors"
        save_safetensors(target / name, shard)
        places.update(dict.fromkeys(shard, name))
    about = {"total_size": size, "total_parameters": get_total_parameters(anchor)}
    index = {"metadata": about, "weight_map": dict(sorted(places.items()))}
    write_atomic(target / INDEX, json.dumps(index, indent=4))
