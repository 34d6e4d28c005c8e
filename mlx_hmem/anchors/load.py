"""Loads an anchor from a model directory, ours or mlx-lm's, with every file checked first."""

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints

import mlx.core as mx
import mlx.nn as nn
import xxhash
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

from mlx_hmem.anchors import openlm
from mlx_hmem.config import MAX_LAYERS, HmemConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import MAX_DIM, fingerprint, is_whole, read_safetensors_header
from mlx_hmem.memory.layer import extend
from mlx_hmem.reading import check_mark, read_json

INDEX = "model.safetensors.index.json"
BESIDE = ("generation_config.json", "hf_quant_config.json")  # mlx-lm opens them as they are
COUNTS = {"hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "n_layer",
          "n_embd", "n_head", "n_positions", "n_ctx", "num_experts", "num_local_experts",
          "num_experts_per_tok", "moe_intermediate_size"}  # fmt: skip
FEW = {"num_hidden_layers", "n_layer", "num_experts", "num_local_experts"}
NUMBERS = {"rope_theta", "rope_local_base_freq", "norm_eps", "rms_norm_eps", "layer_norm_eps",
           "layer_norm_epsilon", "norm_epsilon", "partial_rotary_factor"}  # fmt: skip
# What an architecture's own arguments may be. No int is told from a float: files write both.
PLAIN: dict[type, Callable[[Any], bool]] = {
    int: lambda value: type(value) in (int, float) and math.isfinite(value),
    float: lambda value: type(value) in (int, float) and math.isfinite(value),
    bool: lambda value: value in (True, False),
    str: lambda value: isinstance(value, str),
}
PLAIN_WORDS = {int: "a number", float: "a number", bool: "true or false", str: "a text"}
FLAGS = {"tie_word_embeddings", "qk_norm", "rope_traditional", "attention_bias", "mlp_bias"}
KINDS = {"rope_parameters": (dict, "a table"), "rope_scaling": (dict, "a table"),
         "layer_types": (list, "a list"), "sliding_window": (int, "a whole number")}  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")  # the first that is there is read


def weight_files(folder: Path) -> list[Path]:
    """The anchor's weight files, checked to be sound safetensors. mlx-lm loads whatever is called
    model*.safetensors: what is none of the anchor's would be loaded over it, without a word."""
    files = named_weights(folder)
    if not files:
        raise UserError("no anchor weights (model*.safetensors)", folder, "name a model directory")
    for file in folder.glob("model*.safetensors"):
        if file not in files:
            by_index = f"{INDEX} does not name it"
            why = by_index if (folder / INDEX).exists() else "model.safetensors is there"
            what = "a weight file that is none of the anchor's"
            raise UserError(what, f"{file}: {why}", "move the file elsewhere")
    for file in files:
        if not file.match("model*.safetensors"):
            what = "mlx-lm reads weights that are called model*.safetensors, and no others"
            raise UserError(what, file, "convert the model: mlx_hmem.convert FOLDER DESTINATION")
        read_safetensors_header(file)
    return files


def named_weights(folder: Path, suffix: str = ".safetensors", stem: str = "model") -> list[Path]:
    """Which weight files count, for everybody: with an index exactly those that it names; else the
    one file ``{stem}{suffix}``; else all that begin so. None where there are none.

    Raises UserError where one of them is missing.
    """
    index = folder / f"{stem}{suffix}.index.json"
    if index.exists():
        names = indexed_files(index)
    elif (folder / f"{stem}{suffix}").exists():
        names = [f"{stem}{suffix}"]
    else:
        names = sorted(file.name for file in folder.glob(f"{stem}*{suffix}"))
        check_whole_set(names, "weight files", folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        shown = f"{missing[0]} and {len(missing) - 1} more" if missing[1:] else missing[0]
        what = f"{len(missing)} of {len(names)} weight files are missing"
        raise UserError(what, f"{shown} in {folder}", "fetch them all")
    return [folder / name for name in names]


def check_whole_set(names: Sequence[str], kind: str, folder: Path) -> None:
    """Raises UserError if of files ``…-00001-of-00003`` a part is missing."""
    count = re.search(r"-of-0*(\d+)\.[^.]*$", names[0]) if names else None
    if count and int(count[1]) != len(names):
        what = f"{len(names)} of {count[1]} {kind} are there"
        raise UserError(what, folder, "fetch them all")


def indexed_files(index: Path) -> list[str]:
    """The names of the weight files of an index, each once and in order."""
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(n, str) and PurePosixPath(n).name == n for n in names.values()
    ):
        raise UserError("the index names no files of this folder", index, "download it again")
    return sorted(set(names.values()))


def num_embedded(anchor: nn.Module) -> int:
    """Tokens that an anchor has embeddings of."""
    ends = ("embed_tokens.weight", "wte.weight")
    return next(a.shape[0] for n, a in named_parameters(anchor).items() if n.endswith(ends))


def named_parameters(module: nn.Module) -> dict[str, mx.array]:
    """All weights by their dotted names, in the module's order."""
    pairs: Any = tree_flatten(module.parameters())
    return dict(pairs)


def anchor_hash(folder: Path) -> str:
    """Fingerprint of the anchor's weights, by which a bank knows its anchor."""
    return fingerprint(*weight_files(folder))


def text_hashes(folder: Path, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """The hashes of ``hmem.json`` beside that of the weights, for the anchor in ``folder``, whose
    ``config`` may be given as :func:`read_config` has read it. Only what makes ids and logits
    counts: what ends a text may be changed, and so a chat template."""
    known = read_config(folder) if config is None else config
    values = {key: value for key, value in known.items() if key != "eos_token_id"}
    text = json.dumps(values, sort_keys=True).encode()
    found = {"config_hash": f"xxh3:{xxhash.xxh3_128_hexdigest(text)}"}
    # A conversion may have none to take along.
    tokenizers = (folder / name for name in TOKENIZER_FILES if (folder / name).exists())
    if (tokenizer := next(tokenizers, None)) is not None:
        found["tokenizer_hash"] = fingerprint(tokenizer)
    return found


def check_hashes(
    folder: Path, hmem: HmemConfig, config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """:func:`text_hashes`; UserError unless config and tokenizer are those that ``hmem`` names, if
    it does."""
    hashes = text_hashes(folder, config)
    for key, found in hashes.items():
        if getattr(hmem, key) not in (None, found):
            what = key.removesuffix("_hash")
            raise UserError(
                f"the {what} is not the one this memory was made with",
                f"{found} in {folder}",
                f"restore it, or write its hash as {key} into hmem.json if it is to be so",
            )
    return hashes


def _classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    own = config["model_type"] == "openlm"
    return (openlm.Model, openlm.ModelArgs) if own else _get_classes(config)


def check_types(config: dict[str, Any], path: Path) -> None:
    """Raises UserError for a value of another type than its architecture says; null is one of them
    unless it is the default, or may be one."""
    args = _classes(config)[1]
    hints = get_type_hints(args)
    for field in (f for f in dataclasses.fields(args) if f.name in config):
        value, hint = config[field.name], hints[field.name]
        kind = next((k for k in PLAIN if hint in (k, k | None)), None)
        null_too = hint != kind or field.default is None
        if kind is None or (null_too if value is None else PLAIN[kind](value)):
            continue
        what, said = f"{field.name} is not {PLAIN_WORDS[kind]}", json.dumps(value, default=str)
        raise UserError(what, said[:40], f"restore or correct {path}")


def read_config(folder: Path) -> dict[str, Any]:
    """The anchor's ``config.json``, checked for what every architecture has."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(
            f"{folder / 'config.json'} names no model_type", folder, "restore the anchor's config"
        )
    if config.get("model_file") is not None:
        raise UserError(
            "the anchor needs code of its own, which is never run",
            f"model_file {str(config['model_file'])[:40]!r} in {folder / 'config.json'}",
            "restore the config, or use an architecture that mlx-lm has",
        )
    check_values(config, folder / "config.json")
    for name in BESIDE:
        if (folder / name).exists():
            read_json(folder / name)
    result: dict[str, Any] = config
    return result


def check_values(config: dict[str, Any], path: Path) -> None:
    """Raises UserError for a size, number or flag that no architecture has; null is none of it.
    Architectures look at no value twice: a wrong one was a traceback, NaN, or no end."""
    for name, value in config.items():
        values = value if isinstance(value, list) else [value]
        right, what = True, ""
        if name in COUNTS:
            most = MAX_LAYERS if name in FEW else MAX_DIM
            what = f"a whole number from 1 to {most}"
            right = all(is_whole(n, most) and n > 0 for n in values if n is not None)
        elif name in NUMBERS:
            what = "a number above 0"
            right = type(value) in (int, float) and 0 < value < math.inf
            right = right or (value is None and "rope_parameters" in config)
        elif name in FLAGS:
            right, what = value in (True, False, None), "true or false"
        elif name in KINDS:
            kind, what = KINDS[name]
            right = value is None or type(value) is kind
        if not right:
            raise UserError(f"{name} is not {what}", repr(value)[:40], f"restore or correct {path}")


def anchor_of_config(config: dict[str, Any]) -> nn.Module:
    """An anchor of this shape with random weights, none of which is made before it is used."""
    try:
        check_types(config, Path("config.json"))
        model, args = _classes(config)
        anchor: Any = model
        anchor = anchor(args.from_dict(config))  # type: ignore[attr-defined]
        if config["model_type"] == "gemma3_text" and config.get("tie_word_embeddings", True):
            anchor.sanitize({})  # only the weights tell it that it has no head of its own
    except UserError:
        raise
    except Exception as error:  # a wrong config is whatever an architecture makes of it
        raise UserError(
            "config.json describes no anchor",
            f"{type(error).__name__}: {error}"[:300],
            "restore it",
        ) from None
    return anchor


def float_dtype(anchor: nn.Module) -> mx.Dtype:
    """The dtype that activations have: that of the norms' gains, which are never quantised."""
    for array in reversed(named_parameters(anchor).values()):
        if array.ndim == 1 and mx.issubdtype(array.dtype, mx.floating):
            return array.dtype
    return mx.float32


def _embed_in_own_dtype(anchor: nn.Module) -> None:
    """MLX gives embeddings in mxfp4, mxfp8 and nvfp4 as bfloat16: behind norms in float16 all that
    follows would be float32, keys and values too."""
    dtype = float_dtype(anchor)
    for module in anchor.modules():
        if isinstance(module, nn.QuantizedEmbedding):
            extend(module, lambda before, ids: before(ids).astype(dtype))


def check_rope(config: dict[str, Any], model: str | Path) -> None:
    """Raises UserError where RoPE's base stands as transformers 5 writes it: mlx-lm would take a
    default instead, without a word."""
    unread = "rope_parameters" in config and config.get("rope_theta") is None
    if unread and config["model_type"] != "qwen3":
        raise UserError(
            "config.json keeps RoPE's base where mlx-lm does not look",
            f"rope_parameters in {model}",
            "convert the model: mlx_hmem.convert --hf-path MODEL --mlx-path DESTINATION",
        )


def load_anchor(
    folder: Path, lazy: bool = False, config: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The anchor and its ``config.json``; mlx-lm's own loader with OpenLM added. ``config`` may be
    given as :func:`read_config` has read it."""
    config = read_config(folder) if config is None else config
    for name in ("config.json", *BESIDE):
        if (folder / name).exists():
            check_mark(folder / name)
    check_rope(config, folder)
    weight_files(folder)
    try:
        check_types(config, folder / "config.json")
        anchor, config = load_model(folder, lazy=lazy, get_model_classes=_classes)
        _embed_in_own_dtype(anchor)
        anchor(mx.array([[0, 0]]))  # built, not computed: what no call could do shows here
    except UserError:
        raise
    except Exception as error:  # a wrong config is whatever an architecture makes of it
        raise UserError(
            f"config.json and weights of the anchor in {folder} do not go together",
            f"{type(error).__name__}: {error}"[:300],
            "restore both from one place",
        ) from None
    return anchor, config
