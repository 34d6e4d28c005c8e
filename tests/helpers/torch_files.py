"""Checkpoint files made by hand, byte by byte: whole ones, and what a hostile hand would make."""

import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert.torch_files.pickles import open_files
from tests.helpers.programs import refused


def opcodes(value: Any) -> bytes:
    """A plain value as opcodes of pickle's protocol 2; bytes stand for opcodes already."""
    if isinstance(value, bytes):
        return value
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, list):
        return b"](" + b"".join(map(opcodes, value)) + b"e"
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcodes, value)) + b"t"
    assert isinstance(value, dict)
    return b"}(" + b"".join(opcodes(k) + opcodes(v) for k, v in value.items()) + b"u"


def name(module: str, word: str) -> bytes:
    return f"c{module}\n{word}\n".encode()


def storage(
    key: Any = "0",
    count: Any = 6,
    kind: bytes = name("torch", "FloatStorage"),
    word: Any = "storage",
) -> bytes:
    return opcodes((word, kind, key, "cpu", count)) + b"Q"


def tensor(
    shape: Any = (2, 3), strides: Any = (3, 1), offset: Any = 0, at: bytes | None = None
) -> bytes:
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = (storage() if at is None else at, offset, shape, strides, False, hooks)
    return name("torch._utils", "_rebuild_tensor_v2") + opcodes(arguments) + b"R"


def pickled(value: Any) -> bytes:
    return b"\x80\x02" + opcodes(value) + b"."


@dataclass
class Part:
    """An entry; ``local`` and ``central`` replace fields of its two headers."""

    name: str
    data: bytes
    local: dict[str, int | bytes] = field(default_factory=dict)
    central: dict[str, int | bytes] = field(default_factory=dict)


def archive(parts: list[Part], end: dict[str, int] | None = None) -> bytes:
    """A zip archive of stored entries; ``end`` replaces fields of its last record."""
    body, directory = b"", b""
    for part in parts:
        size = len(part.data)
        fields: dict[str, Any] = dict(
            name=part.name.encode(), flags=0, method=0, crc=zlib.crc32(part.data), packed=size,
            size=size, extra=b"", header=len(body), disk=0,
        )  # fmt: skip
        f = fields | part.central
        directory += struct.pack(
            "<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 45, 45, f["flags"], f["method"], 0, 0, f["crc"],
            f["packed"], f["size"], len(f["name"]), len(f["extra"]), 0, f["disk"], 0, 0,
            f["header"],
        ) + f["name"] + f["extra"]  # fmt: skip
        f = fields | part.local
        body += struct.pack(
            "<4sHHHHHIIIHH", b"PK\x03\x04", 45, f["flags"], f["method"], 0, 0, f["crc"],
            f["packed"], f["size"], len(f["name"]), len(f["extra"]),
        ) + f["name"] + f["extra"] + part.data  # fmt: skip
    f = dict(here=len(parts), count=len(parts), length=len(directory), start=len(body), disk=0)
    f |= end or {}
    return body + directory + struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", f["disk"], 0, f["here"], f["count"], f["length"], f["start"], 0
    )  # fmt: skip


def parts(value: Any, storages: dict[str, bytes] | None = None) -> list[Part]:
    """The entries of a checkpoint; by default storage 0 of 24 bytes."""
    storages = {"0": bytes(range(24))} if storages is None else storages
    data = value if isinstance(value, bytes) else pickled(value)
    return [
        Part("a/data.pkl", data), Part("a/byteorder", b"little"),
        *(Part(f"a/data/{key}", raw) for key, raw in storages.items()), Part("a/version", b"3\n"),
    ]  # fmt: skip


def write(path: Path, value: Any, storages: dict[str, bytes] | None = None) -> Path:
    """A checkpoint of a value, or of a finished pickle given as bytes."""
    path.write_bytes(archive(parts(value, storages)))
    return path


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    return refused("", open_files, [path])
