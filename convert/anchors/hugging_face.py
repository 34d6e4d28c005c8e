"""Hugging Face folders to model directories of mlx-lm, and back.

The tables below do what each architecture's ``sanitize`` does in mlx-lm, as data, so that tensors
can be streamed and both directions read one table; a test holds the two against each other. What
the anchor needs, and in which shape, its own class says.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import anchor_of_config, named_parameters, named_weights, read_config
from mlx_hmem.errors import UserError, foreign, printable
from mlx_hmem.reading import read_json

from ..torch_files.pickles import open_files, refuse_distributed
from ..torch_files.tensors import LazyTensor, open_safetensors
from . import hugging_face_config
from .dequantize import dequantised, without_zero_biases
from .keys import MOST_NAMES, SAME, Drop, Rule, strip, to_mlx, to_torch
from .rounding import Rounding
from .tokenizer import check_tokenizer
from .weights import Conversion, Target, anchor_conversion, companions, equal_bits, write_shards

EXPERTS = ("gate_proj", "up_proj", "down_proj")  # the matrices of an expert, as mlx-lm calls them


def _stacked(block: str, theirs: Sequence[str]) -> list[Rule]:
    """The rules of a mixture of experts whose FFNs lie in ``block``."""
    front = f"model.layers.{{i}}.{block}"
    pairs = [
        (f"{front}.experts.{{e}}.{name}.weight", f"{front}.switch_mlp.{ours}.weight")
        for name, ours in zip(theirs, EXPERTS, strict=True)
    ]
    return [*(Rule(torch, (mlx,), "stacked") for torch, mlx in pairs), SAME]


RULES: dict[str, list[Rule]] = {
    "gpt2": [
        Rule(f"h.{{i}}.{name}.weight", (f"model.h.{{i}}.{name}.weight",), "transposed")
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    + [Rule("{any}", ("model.{any}",))],
    "qwen3_moe": _stacked("mlp", EXPERTS),
    "mixtral": _stacked("block_sparse_moe", ("w1", "w3", "w2")),
}
DROPS = [
    Drop("{any}rotary_emb.inv_freq", "RoPE is computed from the config"),
    Drop("h.{i}.attn.bias", "a causal mask"),
    Drop("h.{i}.attn.masked_bias", "the value of masked attention"),
    Drop("vision_tower.{any}", "it sees pictures, and an anchor reads text"),
    Drop("multi_modal_projector.{any}", "it hands pictures on, and an anchor reads text"),
]
# What a name may begin with, in any order and number: a wrapper's, or that of the model around the
# layers, which is put back before what it has.
PREFIXES = ("module.", "model.", "language_model.", "transformer.")
BODY = ("layers.", "embed_tokens.", "norm.")
EMBEDDING, EMBEDDINGS = "model.embed_tokens.weight", {"gpt2": "wte.weight"}
HEAD = "lm_head.weight"


def weight_files(folder: Path) -> list[Path]:
    """The folder's weights: safetensors if there are any, else PyTorch's pickles."""
    kinds = ((".safetensors", "model"), (".bin", "pytorch_model"))
    files = next((found for kind in kinds if (found := named_weights(folder, *kind))), [])
    if not files:
        refuse_distributed(folder)
        what = "no weights: neither model*.safetensors nor pytorch_model*.bin"
        raise UserError(what, folder, "download them")
    return files


def others_beside(folder: Path, files: Sequence[Path]) -> list[str]:
    """A line that names the weight files of a folder that are not read."""
    ends = (".safetensors", ".bin", ".pt", ".pth")
    names = sorted(f.name for f in folder.iterdir() if f.suffix in ends and f not in files)
    shown = ", ".join(names[:MOST_NAMES]) + (", …" if names[MOST_NAMES:] else "")
    more = f" and {len(files) - 1} more" if files[1:] else ""
    return [f"not read: {shown}; the weights are {files[0].name}{more}"] if names else []


def wanted_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of the anchor that a config describes."""
    parameters = named_parameters(anchor_of_config(config))
    return {name: array.shape for name, array in parameters.items()}


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder has a ``config.json`` of transformers; OpenLM's may have the same name."""
    file = folder / "config.json"
    values = read_json(file) if file.is_file() else None
    return isinstance(values, dict) and "model_type" in values


def from_torch(source: Path, dtype: str | None = None, tokenizer: Path | None = None) -> Conversion:
    """A Hugging Face folder as a model directory of mlx-lm.

    ``dtype`` rounds all weights to float32, float16 or bfloat16; None keeps each tensor's bits.
    Files of the folder ``tokenizer`` go before those of the source.
    """
    config = hugging_face_config.text_model(read_config(source), source / "config.json")
    beside = source / "quantize_config.json"  # of older AutoGPTQ
    if beside.is_file() and not config.get("quantization_config"):
        with foreign(f"{beside} holds no settings", "restore it"):
            config["quantization_config"] = {"quant_method": "gptq"} | read_json(beside)
    files = weight_files(source)
    checkpoint = open_files(files)
    short = strip(checkpoint.tensors, PREFIXES)
    tensors = {f"model.{n}" if n.startswith(BODY) else n: tensor for n, tensor in short.items()}
    tensors, config, rounding = dequantised(tensors, config, dtype)
    targets, config, notes = as_mlx_lm(tensors, config, dtype)
    notes += [f"left out {name}: no part of the model" for name in checkpoint.left_out]
    notes += others_beside(source, files)
    sources = [source / "config.json", *files]
    copied = companions(*([tokenizer] if tokenizer else []), source)
    notes += check_tokenizer(copied, config, source)
    config = with_dtype(config, dtype)
    write: Callable[[Path, Sequence[Target]], None] = write_shards
    if rounding is not None:
        write = partial(_write_dequantised, rounding)
    return anchor_conversion(sources, targets, config, notes, copied, write)


def as_mlx_lm(
    tensors: Mapping[str, LazyTensor], config: dict[str, Any], dtype: str | None = None
) -> tuple[list[Target], dict[str, Any], list[str]]:
    """Tensors and config as mlx-lm has them, whoever wrote them, and lines for the user."""
    name, head = config["model_type"], tensors.get(HEAD)
    embedding = tensors.get(EMBEDDINGS.get(name, EMBEDDING))
    equal = head is not None and embedding is not None and equal_bits(head, embedding)
    config, notes = hugging_face_config.for_mlx(config, head, equal)
    wanted = wanted_of(config)
    drops = DROPS + ([Drop(HEAD, "equal to the embedding, to which it is tied")] if equal else [])
    rules = [SAME] if wanted.keys() <= tensors.keys() else RULES.get(name, [SAME])
    tensors = without_zero_biases(tensors, wanted)
    targets, dropped = to_mlx(tensors, rules, drops, wanted, dtype)
    return targets, config, notes + dropped


def _write_dequantised(rounding: Rounding, folder: Path, targets: Sequence[Target]) -> None:
    """As :func:`write_shards`; then it is known, and said, what rounding changed."""
    write_shards(folder, targets)
    print(printable(rounding.line()), file=sys.stderr)


def into_torch(source: Path, dtype: str | None = None) -> Conversion:
    """A model directory of mlx-lm as a Hugging Face folder."""
    config, files = read_config(source), weight_files(source)
    rules = RULES.get(config["model_type"], [SAME])
    targets = to_torch(open_safetensors(files).tensors, rules, wanted_of(config), dtype)
    sources = [source / "config.json", *files]
    config, write = with_dtype(config, dtype), partial(write_shards, form="pt")
    return anchor_conversion(sources, targets, config, [], companions(source), write)


def with_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """The config with the dtype that the weights get, under the keys that name it already."""
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    return config | dict.fromkeys(keys, dtype) if dtype else config
