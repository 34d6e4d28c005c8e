"""The header of a GGUF file, validated before anything is made of it; the tensors are not read.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Versions 2 and 3, little
endian: magic, counts, values (key, type, value), tensors (name, shape, type, offset), and behind
them, aligned, the data. A set of shards has its values in the first file.
"""

import os
import re
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.files import MAX_HEADER, is_shape
from mlx_hmem.reading import RESTORE, Source, open_regular

MAGIC = b"GGUF"
ALIGNMENT = 32  # where general.alignment does not say
MAX_TEXTS = 1 << 22  # of a whole header: a vocabulary of 262,144 and its merges are a fifth of it
MAX_TENSORS = 1 << 16
MAX_DIMS = 4
LENGTH = struct.Struct("<Q")  # before each text
PIECE = 1 << 20  # bytes that are read at once
TEXT, ARRAY, BOOL = 8, 9, 7
NUMBERS: dict[int, np.dtype] = {
    0: np.dtype("u1"), 1: np.dtype("i1"), 2: np.dtype("<u2"), 3: np.dtype("<i2"),
    4: np.dtype("<u4"), 5: np.dtype("<i4"), 6: np.dtype("<f4"), BOOL: np.dtype("u1"),
    10: np.dtype("<u8"), 11: np.dtype("<i8"), 12: np.dtype("<f8"),
}  # fmt: skip
# A value: a number, a truth, a text, a list of texts, or numbers as an array of NumPy.
Value = int | float | bool | str | list[str] | np.ndarray
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class Type(NamedTuple):
    """How numbers are stored: ``block`` of them in ``nbytes`` bytes."""

    name: str
    block: int
    nbytes: int


# By their number in a file (ggml.h).
TYPES = {
    0: Type("F32", 1, 4), 1: Type("F16", 1, 2), 2: Type("Q4_0", 32, 18), 3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22), 7: Type("Q5_1", 32, 24), 8: Type("Q8_0", 32, 34),
    9: Type("Q8_1", 32, 40), 10: Type("Q2_K", 256, 84), 11: Type("Q3_K", 256, 110),
    12: Type("Q4_K", 256, 144), 13: Type("Q5_K", 256, 176), 14: Type("Q6_K", 256, 210),
    15: Type("Q8_K", 256, 292), 16: Type("IQ2_XXS", 256, 66), 17: Type("IQ2_XS", 256, 74),
    18: Type("IQ3_XXS", 256, 98), 19: Type("IQ1_S", 256, 50), 20: Type("IQ4_NL", 32, 18),
    21: Type("IQ3_S", 256, 110), 22: Type("IQ2_S", 256, 82), 23: Type("IQ4_XS", 256, 136),
    24: Type("I8", 1, 1), 25: Type("I16", 1, 2), 26: Type("I32", 1, 4), 27: Type("I64", 1, 8),
    28: Type("F64", 1, 8), 29: Type("IQ1_M", 256, 56), 30: Type("BF16", 1, 2),
    34: Type("TQ1_0", 256, 54), 35: Type("TQ2_0", 256, 66), 39: Type("MXFP4", 32, 17),
    40: Type("NVFP4", 64, 36), 41: Type("Q1_0", 128, 18),
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor in a file: its data begin at ``start``, in bytes; ``shape`` has the longest strides
    first, as in PyTorch and the other way round than in the file."""

    path: Path
    type: Type
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Header(NamedTuple):
    """What a file, or a set of shards, says of itself; tensors in the order of the file."""

    files: list[Path]
    values: dict[str, Value]
    tensors: dict[str, Tensor]


class _Reader:
    """The bytes of a header one after the other, read in pieces; every length is checked."""

    def __init__(self, file: BinaryIO, path: Source):
        self.file, self.path = file, path
        self.size = os.fstat(file.fileno()).st_size
        self.data, self.at, self.texts = bytearray(), 0, 0

    def wrong(self, what: str) -> UserError:
        return UserError(f"{self.path} has a wrong GGUF header", what, RESTORE)

    def need(self, count: int) -> int:
        """The place of the next ``count`` bytes, which are then in memory and passed."""
        at, self.at = self.at, self.at + count
        if self.at > len(self.data):
            self.load(self.at)
        return at

    def load(self, end: int) -> None:
        if end > self.size:
            raise self.wrong(f"it ends at byte {self.size}, {end} are needed")
        if end > MAX_HEADER:
            raise self.wrong(f"it is longer than {MAX_HEADER} bytes")
        while len(self.data) < end:
            part = self.file.read(max(end - len(self.data), PIECE))
            if not part:
                raise self.wrong(f"it ends at byte {len(self.data)}")
            self.data += part

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack_from(form, self.data, self.need(struct.calcsize(form)))

    def text(self) -> str:
        (length,) = LENGTH.unpack_from(self.data, self.need(LENGTH.size))
        at = self.need(length)
        self.texts += 1
        if self.texts > MAX_TEXTS:
            raise self.wrong(f"more than {MAX_TEXTS} texts")
        try:
            return self.data[at : self.at].decode()
        except UnicodeDecodeError:
            raise self.wrong(f"the text at byte {at} is not UTF-8") from None

    def value(self, key: str) -> Value:
        (kind,) = self.unpack("<I")
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            number = self.numbers(key, kind, 1)[0].item()
            return bool(number) if kind == BOOL else number
        kind, count = self.unpack("<IQ")
        if kind == TEXT:
            if count > min(MAX_TEXTS, (self.size - self.at) // 8):
                raise self.wrong(f"{key[:80]!r} counts {count} texts")
            return [self.text() for _ in range(count)]
        return self.numbers(key, kind, count)

    def numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        # Arrays of arrays, which the format allows, llama.cpp does not read either.
        if kind not in NUMBERS:
            raise self.wrong(f"{key[:80]!r} has a type that is not known: {kind}")
        item = NUMBERS[kind]
        at = self.need(count * item.itemsize)
        found = np.frombuffer(bytes(self.data[at : self.at]), item)
        if kind == BOOL and count and found.max() > 1:
            raise self.wrong(f"{key[:80]!r} is neither true nor false: {found.max()}")
        return found


def read_header(path: Source) -> Header:
    """Reads and validates the header of one GGUF file.

    Raises :class:`UserError` for anything the format forbids and for what no model has: repeated
    keys or names, lengths, shapes, offsets and alignments that lead out of the file, tensors that
    overlap, arrays of arrays, more than 4 M texts, 65,536 tensors or 100 MB.
    """
    path = Path(path)
    with open_regular(path) as file:
        reader = _Reader(file, path)
        if reader.size < len(MAGIC) or bytes(reader.unpack("4s")[0]) != MAGIC:
            raise UserError("not a GGUF file", path, "give the path of one")
        (version,) = reader.unpack("<I")
        if version not in (2, 3):
            told = "a big-endian file" if version in (2 << 24, 3 << 24) else f"version {version}"
            raise UserError(
                f"{path} is no GGUF that is read here", told, "versions 2 and 3, little endian, are"
            )
        num_tensors, num_values = reader.unpack("<QQ")
        values: dict[str, Value] = {}
        for _ in range(num_values):
            key = reader.text()
            if key in values:
                raise reader.wrong(f"the key {key[:80]!r} occurs twice")
            values[key] = reader.value(key)
        tensors = _read_tensors(reader, num_tensors, values.get("general.alignment", ALIGNMENT))
    return Header([path], values, tensors)


def _read_tensors(reader: _Reader, count: int, alignment: Any) -> dict[str, Tensor]:
    if count > MAX_TENSORS:
        raise reader.wrong(f"{count} tensors, {MAX_TENSORS} are the most")
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise reader.wrong(f"general.alignment is no power of two: {str(alignment)[:40]}")
    found: dict[str, tuple[Type, tuple[int, ...], int, int]] = {}
    for _ in range(count):
        name = reader.text()
        if name in found:
            raise reader.wrong(f"the tensor {name[:80]!r} occurs twice")
        found[name] = _read_tensor(reader, name[:80], alignment)
    base = -(-reader.at // alignment) * alignment
    tensors = {
        name: Tensor(Path(reader.path), kind, shape, base + offset, nbytes)
        for name, (kind, shape, offset, nbytes) in found.items()
    }
    in_order = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes))
    for name, tensor in in_order:
        if tensor.start + tensor.nbytes > reader.size:
            raise reader.wrong(f"the tensor {name[:80]!r} lies outside the file")
    for (_, tensor), (name, other) in pairwise(in_order):
        if other.start < tensor.start + tensor.nbytes:
            raise reader.wrong(f"the tensor {name[:80]!r} overlaps another")
    return tensors


def _read_tensor(
    reader: _Reader, name: str, alignment: int
) -> tuple[Type, tuple[int, ...], int, int]:
    """Type, shape, offset behind the header and bytes of a tensor."""
    (num_dims,) = reader.unpack("<I")
    if num_dims > MAX_DIMS:
        raise reader.wrong(f"the tensor {name!r} has {num_dims} dimensions")
    shape = tuple(reversed(reader.unpack(f"<{num_dims}Q")))
    number, offset = reader.unpack("<IQ")
    if number not in TYPES:
        raise reader.wrong(f"the tensor {name!r} has a type that is not known: {number}")
    kind, count = TYPES[number], 1
    if not is_shape(shape):
        raise reader.wrong(f"the tensor {name!r} has a wrong shape")
    if (shape[-1] if shape else 1) % kind.block:
        raise reader.wrong(f"the rows of tensor {name!r} are no whole blocks of {kind.name}")
    if offset % alignment:
        raise reader.wrong(f"the tensor {name!r} does not begin at a multiple of {alignment}")
    for length in shape:
        count *= length
    return kind, shape, offset, count // kind.block * kind.nbytes


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does."""
    if not path.is_file():
        return False
    with open_regular(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def read_gguf(path: Path) -> Header:
    """The header of a GGUF file, or of all shards of a set by any of them.

    Raises :class:`UserError` as :func:`read_header`, and for a shard that is missing or belongs to
    another set.
    """
    header = read_header(path)
    count = header.values.get("split.count", 1)
    if type(count) is not int or count < 2:
        return header
    named = SHARD.fullmatch(path.name)
    if not named or int(named["count"]) != count:
        raise UserError(
            f"{path} is one of {count} shards, and its name does not lead to the others",
            path.name,
            f"name them NAME-00001-of-{count:05}.gguf and so on, as llama.cpp does",
        )
    files = [
        path.with_name(f"{named['stem']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)
    ]
    if missing := [file.name for file in files if not file.is_file()]:
        what = f"{len(missing)} of {count} shards are missing"
        raise UserError(what, f"{missing[0]} in {path.parent}", "fetch them all")
    return _joined([header if file == path else read_header(file) for file in files], path)


def _joined(parts: Sequence[Header], path: Path) -> Header:
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        place = (part.values.get("split.no"), part.values.get("split.count"))
        if place != (number, len(parts)):
            raise UserError(
                "a shard of another set", f"{part.files[0]} says {place}", "fetch the set again"
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise UserError(
                "two shards have one tensor", sorted(twice)[0][:80], "fetch the set again"
            )
        tensors |= part.tensors
    total = parts[0].values.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        what = f"the shards of {path} do not hold all tensors"
        raise UserError(what, f"{len(tensors)} of {total}", "fetch the set again")
    return Header([part.files[0] for part in parts], parts[0].values, tensors)
