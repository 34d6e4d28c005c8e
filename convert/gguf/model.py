"""A GGUF file as a model directory of mlx-lm."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mlx_hmem.files import write_atomic

from ..anchors import hugging_face_config
from ..anchors.hugging_face import wanted_of
from ..anchors.keys import Drop, to_mlx
from ..anchors.tokenizer import check_tokenizer
from ..anchors.weights import (
    Conversion,
    Target,
    anchor_conversion,
    companions,
    equal_bits,
    write_shards,
)
from .config import config_of
from .header import Header, read_gguf
from .names import DROPS, EMBEDDING, HEAD, NAMES, to_ours
from .settings import OTHER
from .tensors import open_tensors, raw_of
from .tokenizer import TokenizerFiles, config_ids, special_ids, tokenizer_files


def from_gguf(source: Path, dtype: str | None = None, tokenizer: Path | None = None) -> Conversion:
    """The model of a GGUF file, or of a set of shards by any of them, with its tokenizer.

    Quantised numbers are dequantised to float32; ``dtype`` rounds all to float32, float16 or
    bfloat16. ``tokenizer``: a folder whose tokenizer goes before that of the file.

    Raises UserError for what cannot be converted, by name.
    """
    header = read_gguf(source)
    config, notes = config_of(header)
    names = NAMES[config["model_type"]]
    theirs = open_tensors(header)
    drops = list(DROPS)
    if HEAD in theirs and _head_is_embedding(header):
        config["tie_word_embeddings"] = True
        drops.append(Drop(HEAD, "equal to the embedding, to which it is tied"))
    tied = config["tie_word_embeddings"]
    head = None if tied else theirs[HEAD]
    if tokenizer is None:
        made = tokenizer_files(header, config["vocab_size"])
    else:
        made = TokenizerFiles({}, config_ids(special_ids(header, config["vocab_size"])), [])
    config, more = hugging_face_config.for_mlx(config | made.ids, head, tied)
    targets, dropped = to_mlx(
        to_ours(theirs, names, config), names.rules, drops, wanted_of(config), dtype, OTHER
    )
    notes += [*more, *dropped, *made.notes]
    write = partial(_write, files=made.files)
    copied = companions(tokenizer) if tokenizer else []
    notes += check_tokenizer(copied, config, source)
    conversion = anchor_conversion(header.files, targets, config, notes, copied, write)
    size = sum(len(text.encode()) for text in made.files.values())
    return conversion._replace(need_bytes=conversion.need_bytes + size)


def _head_is_embedding(header: Header) -> bool:
    """Whether head and embedding are the same, bit for bit, as some converters write them."""
    head, embedding = header.tensors[HEAD], header.tensors[EMBEDDING]
    if (head.type, head.shape) != (embedding.type, embedding.shape):
        return False
    return equal_bits(raw_of(head), raw_of(embedding))


def _write(part: Path, targets: Sequence[Target], files: dict[str, str]) -> None:
    for name, text in files.items():
        if not (part / name).exists():
            write_atomic(part / name, text)
    write_shards(part, targets)
