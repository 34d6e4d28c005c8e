"""Checkpoints as ``torch.save`` wrote them before PyTorch 1.6, and writes them without zip still:
one pickle after the other (a magic number, a version, what the machine was like, the value, the
names of the storages), then each storage as its number of elements and its bytes.

There are no checksums. Where a storage lies is known only behind the pickle that refers to it, so
that pickle is run twice: first for how long each storage is, then for the tensors.
"""

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from mlx_hmem.reading import read_exactly

from .names import NAMES, Storage, check_reference
from .pickle_machine import MAX_PICKLE, Machine
from .tensors import ITEM_SIZES

MAGIC = 0x1950A86A20F9469CFC6C
BEGIN = re.compile(  # of protocol 4, too, which puts pickles into frames
    rb"\x80.(\x95.{8})?\x8a\x0a" + re.escape(MAGIC.to_bytes(10, "little")), re.DOTALL
)
VERSION = 1001
COUNT = struct.Struct("<q")  # before each storage


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins so is one: its first pickle is the magic number."""
    return BEGIN.match(start) is not None


def read_legacy(path: Path, file: BinaryIO, size: int) -> Any:
    """The value of the checkpoint in ``file``, of ``size`` bytes; ValueError for what is none."""
    file.seek(0)
    data = read_exactly(file, min(size, MAX_PICKLE), path)
    known: dict[str, Storage] = {}

    def measure(reference: Any) -> Any:
        if type(reference) is tuple and reference[:1] == ("module",) and len(reference) == 4:
            return reference[1]  # a class with its source, which is nothing to us
        kind, key, length = check_reference(reference, 6)
        if reference[5] is not None:
            raise ValueError("its pickle refers to a part of a storage")
        found = known.setdefault(key, Storage(path, kind.dtype, 0, length))
        if (found.dtype, found.size) != (kind.dtype, length):
            raise ValueError(f"its pickle refers to storage {key[:80]!r} in two ways")
        return found

    pickles = _Pickles(data)
    _check_head(pickles)
    begin = pickles.at
    pickles.run(measure)
    places = _places(pickles.run(_nothing), known, file, pickles.at, size)

    def place(reference: Any) -> Any:
        found = measure(reference)
        return places[reference[2]] if type(found) is Storage else found

    return _Pickles(data, begin).run(place)


class _Pickles:
    """Pickles one after the other."""

    def __init__(self, data: bytes, at: int = 0):
        self.data, self.at = data, at

    def run(self, persistent: Callable[[Any], Any]) -> Any:
        machine = Machine(self.data, NAMES, persistent, self.at)
        value = machine.run(whole=False)
        self.at = machine.at
        return value


def _nothing(reference: Any) -> Any:
    raise ValueError("its pickle refers to a storage where none can be")


def _check_head(pickles: _Pickles) -> None:
    magic, version, machine = (pickles.run(_nothing) for _ in range(3))
    if magic != MAGIC or version != VERSION or type(machine) is not dict:
        raise ValueError(f"it has another head, or a version that is not {VERSION}")
    if machine.get("little_endian") is not True:
        raise ValueError("its numbers are not little-endian")


def _places(
    keys: Any, known: Mapping[str, Storage], file: BinaryIO, at: int, size: int
) -> dict[str, Storage]:
    """Where the storages ``known`` lie, which follow each other from ``at`` on as ``keys`` say."""
    if type(keys) is not list or not all(type(key) is str for key in keys):
        raise ValueError("its list of storages is none")
    if len(keys) != len(known) or set(keys) != set(known):
        raise ValueError("its list of storages is not that of its tensors")
    places = {}
    for key in keys:
        if at + COUNT.size > size:
            raise ValueError("it ends too early")
        file.seek(at)
        (count,) = COUNT.unpack(read_exactly(file, COUNT.size, file.name))
        storage, at = known[key], at + COUNT.size
        if count * ITEM_SIZES[storage.dtype or "U8"] != storage.size or at + storage.size > size:
            raise ValueError(f"storage {key[:80]!r} of {storage.size} bytes is not in it")
        places[key] = replace(storage, start=at)
        at += storage.size
    if at != size:
        raise ValueError("it goes on after its last storage")
    return places
