"""The weights that a conversion makes, from tensors in files, and how they are written, streamed.

A :class:`Target` is one tensor to be: pieces of source tensors, row after row. Nothing is read
before it is written, and then in chunks of 32 MiB; only a transposed piece is read whole.
"""

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.load import INDEX
from mlx_hmem.errors import UserError, printable
from mlx_hmem.files import atomic_file, copy_file, write_atomic
from mlx_hmem.folders import copy_missing, whole_folder
from mlx_hmem.model.find import check_inside

from ..torch_files.tensors import (
    ITEM_SIZES,
    MLX_TYPES,
    LazyTensor,
    all_finite,
    bits_of,
    numbers_of,
    safetensors_header,
)
from ..torch_files.writer import bytes_of

FLOATS = ("F64", "F32", "F16", "BF16")
# --dtype: names of MLX and of safetensors.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CHUNK = 32 << 20
SHARD_BYTES = 1 << 30  # a stopped conversion begins again with the shard it was at
# What travels with a model; never code.
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "chat_template.json", "generation_config.json", "README.md", "LICENSE", "LICENSE.txt", "NOTICE",
)  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A tensor to write: the rows of ``pieces``, one after the other, as ``dtype``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[LazyTensor, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]

    def chunks(self, bar: tqdm) -> Iterator[np.ndarray]:
        for piece in self.pieces:
            for bits in chunks_of(piece):
                made = bits if piece.dtype == self.dtype else cast(bits, piece, self)
                if not all_finite(made, self.dtype):
                    what = f"{self.name} has numbers that are not finite"
                    raise UserError(what, piece.path, "convert a checkpoint from before they came")
                yield made
                bar.update(made.nbytes)


def chunks_of(tensor: LazyTensor) -> Iterator[np.ndarray]:
    """The bits of a tensor in row-major order, about 32 MiB at once."""
    if tensor.strides is not None or not tensor.shape:
        yield tensor.read()
        return
    row = max(1, tensor.nbytes // max(1, tensor.shape[0]))
    step = max(1, CHUNK // row)
    for first in range(0, tensor.shape[0], step):
        yield tensor.read(first, min(step, tensor.shape[0] - first))


def equal_bits(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors are the same, bit for bit."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a == b:
        return True
    return all(np.array_equal(x, y) for x, y in zip(chunks_of(a), chunks_of(b), strict=True))


def cast(bits: np.ndarray, source: LazyTensor, target: Target) -> np.ndarray:
    """Rounds numbers to the target's dtype, to nearest with ties to even."""
    return bits_of(rounded(numbers_of(bits, source.dtype), target.dtype, target.name))


def rounded(wide: mx.array, dtype: str, name: str) -> mx.array:
    """``wide``, of the tensor ``name``, in another dtype; UserError for what that cannot hold."""
    result = wide.astype(MLX_TYPES[dtype])
    if mx.any(mx.isinf(result) & mx.isfinite(wide)).item():
        what = f"{name} has numbers too large for this dtype"
        raise UserError(what, dtype, "choose --dtype bfloat16 or float32")
    return result


def write_safetensors(path: Path, targets: Sequence[Target], form: str, bar: tqdm) -> None:
    """Writes a safetensors file, whole or not at all."""
    # The widest first: each tensor then begins at a multiple of its elements' size.
    ordered = sorted(targets, key=lambda target: -ITEM_SIZES[target.dtype])
    header = safetensors_header(((t.name, t.dtype, t.shape) for t in ordered), {"format": form})
    with atomic_file(path) as file:
        file.write(header)
        for target in ordered:
            for chunk in target.chunks(bar):
                file.write(bytes_of(chunk))
        assert file.tell() == len(header) + sum(target.nbytes for target in ordered), path


def progress(targets: Iterable[Target]) -> tqdm:
    """A bar over all bytes; it shows itself after 2 seconds."""
    total = sum(target.nbytes for target in targets)
    return tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, desc="converting")


def write_shards(folder: Path, targets: Sequence[Target], form: str = "mlx") -> None:
    """Writes ``model*.safetensors`` of at most 1 GiB, or one tensor, and their index.

    ``form`` is what the files say of themselves, "mlx" or "pt". A shard that exists is whole, and
    left as it is.
    """
    shards: list[list[Target]] = [[]]
    for target in targets:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + target.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(target)
    where: dict[str, str] = {}
    with progress(targets) as bar:
        for index, shard in enumerate(shards, 1):
            suffix = "" if len(shards) == 1 else f"-{index:05}-of-{len(shards):05}"
            path = folder / f"model{suffix}.safetensors"
            where |= {target.name: path.name for target in shard}
            if path.exists():
                bar.update(sum(target.nbytes for target in shard))
            else:
                write_safetensors(path, shard, form, bar)
    if len(shards) > 1:
        size = sum(target.nbytes for target in targets)
        index_json = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        write_atomic(folder / INDEX, json.dumps(index_json, indent=2) + "\n")


def companions(*folders: Path) -> list[Path]:
    """The tokenizer's files, the card and the licence, and others that travel with a model; of
    those that several folders have the first one's."""
    places = ([folder / name for folder in folders] for name in COMPANIONS)
    found = ([file for file in files if file.is_file()] for files in places)
    chosen = [files[0] for files in found if files]
    for file in chosen:
        check_inside(file, file.parent)
    return chosen


def _copy(source: Path, target: Path) -> None:
    """JSON as UTF-8 without a byte order mark: mlx-lm and transformers read no other."""
    data = source.read_bytes() if source.suffix == ".json" else b""
    if (encoding := json.detect_encoding(data)) == "utf-8":
        copy_file(source, target)
    else:
        write_atomic(target, data.decode(encoding).encode())


class Conversion(NamedTuple):
    """A conversion that has been checked, before anything is written.

    sources: files that it reads. notes: lines for the user. write: makes it in a folder, where it
    skips what is there. made: what came of it, in words, unless ``write`` returns better ones.
    config: that of its anchor.
    """

    sources: list[Path]
    need_bytes: int
    notes: list[str]
    write: Callable[[Path], str | None]
    made: str
    config: dict[str, Any]


def carry_out(conversion: Conversion, path: Path, identity: dict[str, Any], replace: bool) -> None:
    """Makes the folder ``path``, whole or not at all, and says what came of it; a stopped one of
    the same ``identity`` (:func:`mlx_hmem.folders.identity_of`) goes on."""
    need = conversion.need_bytes
    with whole_folder(path, identity, replace=replace, need_bytes=need) as part:
        for note in conversion.notes:
            print(printable(note), file=sys.stderr, flush=True)
        made = conversion.write(part)
    print(f"{path}: {made or conversion.made}")


def anchor_conversion(
    inputs: Sequence[Path],
    targets: Sequence[Target],
    config: dict[str, Any],
    notes: list[str],
    copied: Sequence[Path],
    write_weights: Callable[[Path, Sequence[Target]], None],
    config_name: str = "config.json",
) -> Conversion:
    """That of an anchor: ``config`` is that of ``config_name``, ``copied`` are small files that are
    taken along."""
    size = sum(target.nbytes for target in targets)
    small = sum(file.stat().st_size for file in copied)

    def write(part: Path) -> None:
        write_weights(part, targets)
        copy_missing({file.name: file for file in copied}, part, _copy)
        # The config comes last, so none loads before its time.
        write_atomic(part / config_name, json.dumps(config, indent=2) + "\n")

    if config.get("model_type") == "gemma3_text" and any(t.dtype == "F16" for t in targets):
        notes = [
            *notes,
            "Gemma 3 computes worse in float16, whose range it leaves: choose bfloat16",
        ]
    numbers = sum(math.prod(target.shape) for target in targets)
    made = f"{numbers:,} parameters in {len(targets)} tensors, {size / 1e6:,.1f} MB"
    return Conversion([*inputs, *copied], size + small + (1 << 20), notes, write, made, config)
