"""Writes checkpoints that ``torch.load(path, weights_only=True)`` reads, without PyTorch.

A checkpoint is a zip archive of stored entries: ``data.pkl``, a pickle that names the tensors and
where they lie, and one entry ``data/N`` of raw bytes per storage, each beginning at a multiple of
64 bytes. Tensors are streamed: only the chunk that is being written is in memory. The bytes depend
on nothing but what is written (no date, no host), so a conversion that is done again gives the same
file. The pickle is written by hand, opcode by opcode, because the classes it names are PyTorch's.
"""

import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file

from .names import STORAGES
from .tensors import ITEM_SIZES, row_major

Chunk = memoryview | np.ndarray | bytes
# Name, dtype as safetensors calls it, shape, and the bytes in row-major order, piece by piece.
Entry = tuple[str, str, tuple[int, ...], Iterable[Chunk]]

CLASSES = {dtype: name for name, dtype in STORAGES.items()}  # PyTorch's, of storages
ALIGNMENT = 64


class _Tensor:
    """A tensor in the pickle: which storage it is, and its shape."""

    def __init__(self, storage: str, dtype: str, shape: tuple[int, ...]):
        self.storage, self.dtype, self.shape = storage, dtype, shape


def write_torch(
    path: Path,
    tensors: Iterable[Entry],
    values: Mapping[str, Any] | None = None,
    under: str | None = "state_dict",
    aliases: Mapping[str, str] | None = None,
) -> None:
    """Writes a checkpoint, whole or not at all.

    Args:
        path: the file to appear.
        tensors: name, dtype (``F32``, ``BF16``, …), shape and bytes of each, taken one by one.
        values: plain values beside them: str, int, float, bool, None, and lists, tuples and
            dictionaries of these.
        under: the key that holds the tensors; None puts them beside ``values``.
        aliases: further names of tensors, as tied weights have them: new name → a name above.
    """
    state: dict[str, Any] = {}
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        root = path.stem
        _add(archive, file, f"{root}/byteorder", [b"little"], 6)
        for index, (name, dtype, shape, chunks) in enumerate(tensors):
            if dtype not in CLASSES:
                raise UserError(
                    f"tensor {name!r} has a dtype PyTorch checkpoints do not hold",
                    dtype,
                    f"use one of {', '.join(CLASSES)}",
                )
            size = math.prod(shape) * ITEM_SIZES[dtype]
            _add(archive, file, f"{root}/data/{index}", chunks, size)
            state[name] = _Tensor(str(index), dtype, tuple(shape))
        state |= {new: state[old] for new, old in (aliases or {}).items()}
        plain = dict(values or {})
        root_value = plain | {under: state} if under else state | plain
        pickled = b"\x80\x02" + _value(root_value) + b"."
        _add(archive, file, f"{root}/data.pkl", [pickled], len(pickled))
        _add(archive, file, f"{root}/version", [b"3\n"], 2)


def _add(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, chunks: Iterable[Chunk], size: int
) -> None:
    """Adds a stored entry whose bytes begin at a multiple of 64."""
    info = zipfile.ZipInfo(name)
    info.file_size = size
    header = 30 + len(name.encode()) + 20  # 20: the zip64 field, always written
    padding = -(file.tell() + header + 4) % ALIGNMENT
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as entry:
        for chunk in chunks:
            entry.write(bytes_of(chunk))
        written = entry._file_size  # type: ignore[attr-defined]
    assert written == size, (name, written, size)


def bytes_of(chunk: Chunk) -> memoryview | bytes:
    """The bytes of a chunk, not copied if they lie without gaps."""
    if isinstance(chunk, np.ndarray):
        return np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
    return chunk


def _value(value: Any) -> bytes:
    """One value as opcodes of pickle's protocol 2."""
    if isinstance(value, _Tensor):
        return _tensor(value)
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int) and -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return b"X" + struct.pack("<I", len(text)) + text
    if isinstance(value, list):
        return b"](" + b"".join(map(_value, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_value, value)) + b"t"
    if isinstance(value, dict):
        return b"}(" + b"".join(_value(k) + _value(v) for k, v in value.items()) + b"u"
    raise UserError("a checkpoint cannot hold this value", type(value).__name__, "leave it out")


def _tensor(tensor: _Tensor) -> bytes:
    """``torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())``."""
    kind = b"ctorch\n" + CLASSES[tensor.dtype].encode() + b"\n"
    place = _value(tensor.storage) + _value("cpu") + _value(math.prod(tensor.shape))
    storage = b"(" + _value("storage") + kind + place + b"tQ"
    shape, strides = _value(tensor.shape), _value(row_major(tensor.shape))
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage + _value(0) + shape + strides + b"\x89" + hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
