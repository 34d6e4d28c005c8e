"""Writes GGUF files, streamed: header, then each tensor in chunks, whole or not at all.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. As with llama.cpp's own
converter, vectors stay float32 whatever the matrices are stored as.
"""

import math
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.errors import UserError, needed
from mlx_hmem.files import atomic_file
from mlx_hmem.folders import check_sources, identity_of

from ...anchors.weights import FLOATS, chunks_of, rounded
from ...torch_files.tensors import (
    MLX_TYPES,
    ComputedTensor,
    LazyTensor,
    all_finite,
    bits_of,
    numbers_of,
)
from ...torch_files.writer import bytes_of
from ..header import ALIGNMENT, BOOL, MAGIC, TEXT, TYPES

VERSION = 3
NUMBER = {name: number for number, (name, _, _) in TYPES.items()}
UINT32, INT32, FLOAT32, LIST = 4, 5, 6, 9
# How a file says what most of it is stored as (llama.h), by the names of --dtype.
FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "bfloat16": 32}
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")  # as llama.cpp needs them


class Stored(NamedTuple):
    """A tensor to write, under llama.cpp's name, and the type that it gets."""

    name: str
    tensor: LazyTensor
    type: str

    @property
    def nbytes(self) -> int:
        _, block, nbytes = TYPES[NUMBER[self.type]]
        return math.prod(self.tensor.shape) // block * nbytes


def stored(name: str, tensor: LazyTensor, dtype: str) -> Stored:
    """A model's tensor: a vector as float32, a matrix as ``dtype``, one of FILE_TYPES; where its
    rows are no whole blocks, as float16."""
    kind = STORED[dtype]
    if len(tensor.shape) < 2 or name.endswith(ALWAYS_FLOAT32):
        kind = "F32"
    elif tensor.shape[-1] % TYPES[NUMBER[kind]].block:
        kind = "F16"
    return Stored(name, tensor, kind)


def computed(array: mx.array) -> ComputedTensor:
    """An array as a tensor of a conversion."""
    dtype = next(name for name in FLOATS[1:] if MLX_TYPES[name] == array.dtype)
    bits = bits_of(mx.contiguous(array))
    return ComputedTensor(
        Path(), 0, dtype, array.shape, compute=lambda first, count: bits[first : first + count]
    )


def write_gguf(
    path: Path, values: Mapping[str, Any], tensors: Sequence[Stored], sources: Iterable[Path] = ()
) -> None:
    """Writes a GGUF file.

    ``values``: str, bool, int, float, and lists of one of these; whole numbers as 32 bits.

    Raises UserError for numbers that are not finite or too large for their type, and for a file of
    ``sources`` that changes meanwhile.
    """
    identity = identity_of(sources)
    head = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(values))]
    head += [_text(key) + _value(value) for key, value in values.items()]
    at = 0
    for name, tensor, kind in tensors:
        shape = tensor.shape[::-1]
        head.append(_text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        head.append(struct.pack("<IQ", NUMBER[kind], at))
        at += _aligned(Stored(name, tensor, kind).nbytes)
    data = b"".join(head)
    total = sum(each.nbytes for each in tensors)
    with (
        tqdm(total=total, unit="B", unit_scale=True, delay=2, disable=None, desc="writing") as bar,
        atomic_file(path) as file,
    ):
        file.write(data + bytes(_aligned(len(data)) - len(data)))
        for each in tensors:
            for chunk in _chunks(each):
                file.write(chunk)
                bar.update(len(chunk))
            file.write(bytes(_aligned(each.nbytes) - each.nbytes))
        check_sources(identity)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _chunks(stored: Stored) -> Iterator[Any]:
    name, tensor, kind = stored
    if tensor.dtype not in FLOATS:
        raise UserError(f"{name} holds no floating-point numbers", tensor.dtype, "dequantise it")
    for bits in chunks_of(tensor):
        if not all_finite(bits, tensor.dtype):
            what = f"{name} has numbers that are not finite"
            raise UserError(what, tensor.path, "convert a model from before they came")
        if kind == tensor.dtype:
            yield bytes_of(bits)
        elif kind in STORED.values() and TYPES[NUMBER[kind]].block == 1:
            yield bytes_of(bits_of(rounded(numbers_of(bits, tensor.dtype), kind, name)))
        else:
            package = needed("gguf", f"a GGUF file with {kind}")
            numbers = np.array(numbers_of(bits, tensor.dtype).astype(mx.float32))
            number = package.GGMLQuantizationType[kind]
            yield bytes_of(package.quants.quantize(numbers, number))


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    if not isinstance(value, list):
        return struct.pack("<I", _kind(value)) + _plain(value)
    kind = _kind(value[0]) if value else TEXT
    kind = INT32 if kind == UINT32 else kind  # as llama.cpp has them in lists
    head = struct.pack("<IIQ", LIST, kind, len(value))
    if kind in (INT32, FLOAT32):
        return head + np.array(value, "<i4" if kind == INT32 else "<f4").tobytes()
    return head + b"".join(map(_plain, value))


def _kind(value: Any) -> int:
    kinds: dict[type, int] = {str: TEXT, bool: BOOL, int: UINT32, float: FLOAT32}
    return kinds[type(value)]


def _plain(value: Any) -> bytes:
    if isinstance(value, str):
        return _text(value)
    form = {bool: "<?", int: "<I", float: "<f"}[type(value)]
    return struct.pack(form, value)
