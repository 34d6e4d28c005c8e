"""GGUF files put together byte by byte, so that any part of them can be wrong."""

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}


def text(value: str | bytes, length: int | None = None) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def value(found: Any) -> bytes:
    """A type and a value; ``bytes`` go as they are."""
    if isinstance(found, bytes):
        return found
    if isinstance(found, str):
        return struct.pack("<I", 8) + text(found)
    if isinstance(found, list):
        if not found or isinstance(found[0], str):
            return struct.pack("<IIQ", 9, 8, len(found)) + b"".join(map(text, found))
        kind, form = KINDS[type(found[0])]
        return struct.pack(f"<IIQ{len(found)}{form}", 9, kind, len(found), *found)
    kind, form = KINDS[type(found)]
    return struct.pack(f"<I{form}", kind, found)


def tensor(name: str | bytes, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """An entry of the table of tensors; ``shape`` as in PyTorch."""
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def gguf(
    values: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    pairs = list(values.items()) if isinstance(values, Mapping) else list(values)
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    head += b"".join(text(key) + value(found) for key, found in pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def save(path: Path, *arguments: Any, **options: Any) -> Path:
    path.write_bytes(gguf(*arguments, **options))
    return path
