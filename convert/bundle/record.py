"""Writes a recorded function into a file that MLX reads from 0.31 on, as released mlx-swift is.

MLX 0.32.1 put a string of metadata into the header of its files, and reads none without it. MLX
before takes the length of that string for the number of keyword inputs of the file's first
function, and runs out of memory. With one byte of metadata, 0, and a first function that nobody
calls, of one keyword input whose name has 247 letters, the same bytes make sense to both:

| in the file | to MLX from 0.32.1 on | to MLX before |
|---|---|---|
| 1, in 8 bytes | the length of the metadata | the number of keyword inputs |
| 0, in 1 byte | the metadata | the length of its name, of which it takes 7 bytes |
| 1, in 8 bytes | the number of keyword inputs | from here on: 256; the last byte begins the name |
| 247, in 8 bytes | the length of its name | more of the name |
| 247 bytes | the name | the rest of the name |

From there on they agree. MLX writes all of it itself, and it is looked at afterwards.
"""

import struct
from collections.abc import Callable, Sequence
from importlib.metadata import version

import mlx.core as mx

from mlx_hmem.errors import UserError

OLDEST = "0.31.1"  # the MLX in released mlx-swift (0.31.6)
METADATA = "\0"
UNCALLED = "not for calling; a name as long as this lets MLX before 0.32.1 read the file ".ljust(
    247, "."
)
# Operations that MLX 0.31.1 does not have, or that 0.32.4 writes with more state than it reads.
NEWER = (
    "CustomKernel",
    "FFT",
    "FloorDivide",
    "ScaledDotProductAttention",
    "SearchSorted",
    "SliceUpdate",
)


def record(path: str, function: Callable[..., list[mx.array]], inputs: Sequence[mx.array]) -> None:
    """Writes ``function`` as it is traced for ``inputs``.

    Raises:
        UserError: MLX wrote something else than what both read.
    """

    def either(*arrays: mx.array, **uncalled: mx.array) -> list[mx.array]:
        return list(uncalled.values()) or function(*arrays)

    with mx.exporter(path, either, metadata=METADATA) as export:
        export(**{UNCALLED: mx.array(0)})
        export(*inputs)
    del export  # closes the file
    with open(path, "rb") as file:
        check_header(file.read(512))


def check_header(data: bytes) -> None:
    """Raises a ``UserError`` unless a file begins as MLX from 0.31 on reads it."""
    length = int.from_bytes(data[:8], "little")  # of the version of MLX that comes first
    expected = struct.pack("<i?Q", 2, False, len(METADATA)) + METADATA.encode()
    expected += struct.pack("<QQ", 1, len(UNCALLED)) + UNCALLED.encode()
    if not data[8 + length :].startswith(expected):
        raise UserError(
            "this MLX writes functions in a form that is not known here",
            version("mlx"),
            "make the bundle with MLX 0.32.4",
        )


def newer_operations(data: bytes) -> list[str]:
    """The operations in a file that MLX 0.31.1 cannot read."""
    return [name for name in NEWER if struct.pack("<Q", len(name)) + name.encode() in data]
