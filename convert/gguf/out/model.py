"""An anchor as one GGUF file, which llama.cpp, LM Studio and transformers read."""

import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.load import anchor_of_config, read_config
from mlx_hmem.errors import UserError, printable
from mlx_hmem.folders import check_room

from ...anchors.hugging_face import as_mlx_lm, wanted_of
from ...anchors.keys import rule_of
from ...anchors.mlx_folder import QUANTIZED, plain_tensors
from ...anchors.tokenizer import check_tokenizer
from ...anchors.weights import Conversion, Target, companions
from ...torch_files.tensors import ComputedTensor, LazyTensor
from ..header import is_gguf
from ..names import NAMES, to_theirs
from .values import architecture_of, rope_factors, values_of
from .vocabulary import vocabulary_of
from .write import FILE_TYPES, computed, stored, write_gguf

DTYPE = "float16"  # where nothing is asked for


def to_gguf(source: Path, dtype: str | None = None) -> Conversion:
    """The anchor in a folder of mlx-lm's or of transformers' as a GGUF file, which ``write`` makes.

    ``dtype``: float32, float16 (default), bfloat16 or q8_0, for the matrices.

    Raises UserError for what llama.cpp does not compute, by name.
    """
    config = read_config(source)
    name = config["model_type"]
    architecture = architecture_of(name)
    config = {key: value for key, value in config.items() if key not in QUANTIZED}
    tensors, notes = plain_tensors(source, wanted_of(config))
    targets, config, more = as_mlx_lm(tensors, config)
    values: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": source.resolve().name,
        "general.file_type": FILE_TYPES[dtype or DTYPE],
        "general.quantization_version": 2,
    }
    own = values_of(config, anchor_of_config(config))
    values |= {f"{architecture}.{key}": value for key, value in own.items()}
    beside = companions(source)
    more += check_tokenizer(beside, config, source)
    values |= vocabulary_of(source, config, config["vocab_size"])
    theirs = {_their_name(name, target.name): _whole(target) for target in targets}
    theirs = to_theirs(theirs, NAMES[name], config)
    theirs |= {each: computed(mx.array(array)) for each, array in rope_factors(config).items()}
    made = [stored(each, tensor, dtype or DTYPE) for each, tensor in theirs.items()]
    smaller = [each.name for each in made if dtype == "q8_0" and each.type == "F16"]
    if smaller:
        what = (
            f"{len(smaller)} matrices are stored as float16, since their rows are no whole blocks"
        )
        more.append(f"{what} (the first: {smaller[0]})")
    if (source / "hmem.json").is_file():
        more.append("the memory is left out: mlx_hmem.convert fuse puts one into the anchor first")
    files = {tensor.path for tensor in tensors.values()}
    sources = [source / "config.json", *sorted(files), *beside]
    size = sum(each.nbytes for each in made)
    said = f"{len(made)} tensors, {size / 1e6:,.1f} MB, {dtype or DTYPE}"

    def write(path: Path) -> None:
        write_gguf(path, values, made, sources)

    return Conversion(sources, size + (32 << 20), notes + more, write, said, config)


def write_file(conversion: Conversion, path: Path, replace: bool) -> None:
    """Writes the GGUF file of a conversion, whole or not at all, and says what came of it.

    Raises UserError: something lies there that may not be replaced, the disk has too little room.
    """
    if path.exists() and not (replace and is_gguf(path)):
        remedy = "choose another" if replace else "choose another or add --overwrite"
        raise UserError("the destination exists", path, remedy)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path.parent, conversion.need_bytes)
    for note in conversion.notes:
        print(printable(note), file=sys.stderr)
    conversion.write(path)
    print(f"{path}: {conversion.made}")


def _whole(target: Target) -> LazyTensor:
    """A target as one tensor: experts that lie apart are stacked."""
    pieces = target.pieces
    if len(pieces) == 1:
        return pieces[0]

    def compute(first: int, count: int) -> np.ndarray:
        return np.stack([piece.read() for piece in pieces[first : first + count]])

    return ComputedTensor(pieces[0].path, 0, target.dtype, target.shape, compute=compute)


def _their_name(model_type: str, name: str) -> str:
    rule, _, values = rule_of(name, NAMES[model_type].rules)
    return rule.torch.format(**values)
