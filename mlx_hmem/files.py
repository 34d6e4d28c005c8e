"""Files that are whole or not there: strict safetensors headers, atomic writes, fingerprints.

MLX trusts what it loads (an overflowing shape in a 93-byte file ends the process) and writes in
place (a kill half-way destroys the file that was there). So headers are validated here before MLX
sees a file, and every file is written beside its place, synced and renamed. The part file has a
fixed name, so a killed write leaves at most one, which the next write of that file replaces; a lock
on it lets one program write at a time.
"""

import contextlib
import ctypes
import fcntl
import math
import os
import shutil
import stat
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import mlx.core as mx
import xxhash

from mlx_hmem.errors import UserError
from mlx_hmem.reading import RESTORE, Source, open_regular, read_exactly, strict_json

MAX_HEADER = 100_000_000  # the safetensors library's own limit
MAX_DIM = 2**31 - 1  # MLX shapes are 32-bit
MAX_RANK = 32
# The types MLX reads, in bytes per element.
ITEM_SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "C64": 8,
}  # fmt: skip
SAMPLE = 1 << 16
NUM_SAMPLES = 256


class TensorInfo(NamedTuple):
    """One tensor of a safetensors file; ``start`` and ``end`` are offsets in the file, in bytes."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_safetensors_header(
    path: Source, sizes: Mapping[str, int] = ITEM_SIZES
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads and validates the header of a safetensors file, never its data.

    Returns the tensors by name and the metadata. Raises :class:`UserError` for anything the format
    forbids (repeated names, overlaps, holes, data beyond the end or not accounted for) and for
    shapes that MLX cannot hold. ``sizes``: the types that are read, and their bytes; by default
    those of MLX.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise UserError(
                f"{path} is not a whole safetensors file",
                f"header of {length} bytes in a file of {size}",
                RESTORE,
            )
        text = read_exactly(file, length, path)
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not begin with {")
        return _check_tensors(strict_json(text), 8 + length, size, sizes)
    except ValueError as error:
        raise UserError(f"{path} has a wrong safetensors header", error, RESTORE) from None


def is_whole(value: Any, most: int = 2**60) -> bool:
    """Whether a value from a file is a whole number from 0 to ``most``."""
    return type(value) is int and 0 <= value <= most


def is_shape(values: Sequence[Any]) -> bool:
    """Whether MLX can hold an array of this shape; none of its 64-bit strides overflows, not even
    beside a dimension of 0."""
    if len(values) > MAX_RANK or not all(is_whole(n, MAX_DIM) for n in values):
        return False
    return math.prod(max(n, 1) for n in values) <= 2**60


def _check_tensors(
    header: dict[str, Any], base: int, size: int, sizes: Mapping[str, int]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a table of texts")
    tensors = {
        name: _check_tensor(name[:80], entry, base, size, sizes) for name, entry in header.items()
    }
    at = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != at:
            problem = "overlaps another" if info.start < at else "leaves a hole before it"
            raise ValueError(f"tensor {name[:80]!r} {problem}")
        at = info.end
    if at != size:
        raise ValueError(f"{size - at} bytes after the last tensor")
    return tensors, metadata


def _check_tensor(
    name: str, entry: Any, base: int, size: int, sizes: Mapping[str, int]
) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} needs dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in sizes:
        raise ValueError(f"tensor {name!r} has a dtype MLX does not read: {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not is_shape(shape):
        raise ValueError(f"tensor {name!r} has a wrong shape")
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has wrong data_offsets")
    if not all(is_whole(n, size - base) for n in offsets) or offsets[0] > offsets[1]:
        raise ValueError(f"tensor {name!r} lies outside the file")
    if offsets[1] - offsets[0] != math.prod(shape) * sizes[dtype]:
        raise ValueError(f"tensor {name!r}: its shape and its bytes do not agree")
    return TensorInfo(dtype, tuple(shape), base + offsets[0], base + offsets[1])


def load_safetensors(path: Source) -> dict[str, mx.array]:
    """Loads a safetensors file, lazily as ``mx.load`` does, after its header has been validated."""
    read_safetensors_header(path)
    try:
        return mx.load(os.fspath(path), format="safetensors")  # type: ignore[return-value]
    except RuntimeError as error:
        raise UserError(f"MLX cannot load {path}", error, RESTORE) from None


def sync(file: BinaryIO) -> None:
    """Puts a file's bytes on the disk itself, also on macOS, where fsync does not."""
    file.flush()
    if sys.platform == "darwin":
        try:
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
        except OSError:  # some network file systems know only fsync
            pass
    os.fsync(file.fileno())


def sync_folder(folder: Source) -> None:
    """Makes renames within ``folder`` last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_file(path: Source, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write into that appears at ``path`` only when the block ends without an error.

    One that is there keeps its permissions; a new one, if it is ``private``, is its owner's alone.
    Raises UserError where another program is writing it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else 0o600 if private else None
    opener = partial(_as_it_is, 0o666 if mode is None else 0o600)
    with open(part, "w+b", opener=opener) as file:
        # Or it was renamed before it could be locked.
        if not take_lock(file) or not lies_at(file.fileno(), part):
            raise UserError("another program is writing this file", path, "wait for it to end")
        try:
            file.truncate(0)
            if mode is not None:
                _permit(file, 0o600)  # until it is whole: a read-only part could not be taken over
            yield file
            if mode is not None:
                _permit(file, mode)
            sync(file)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    sync_folder(path.parent)


def _as_it_is(mode: int, path: str, flags: int) -> int:
    """Opens a file to write into, and leaves what is in it: it may be another's. A link is not
    followed: whoever may write into the folder could have laid it there."""
    return os.open(path, flags & ~os.O_TRUNC | os.O_NOFOLLOW, mode)


def _permit(file: BinaryIO, mode: int) -> None:
    with contextlib.suppress(OSError):  # a file system that knows no permissions
        os.fchmod(file.fileno(), mode)


def take_lock(file: BinaryIO | int) -> bool:
    """Whether an open file, or a folder's handle, could be locked for this process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True


def lies_at(handle: int, path: Path) -> bool:
    """Whether an open file or folder is what lies at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def save_safetensors(
    path: Source,
    arrays: dict[str, mx.array],
    metadata: dict[str, str] | None = None,
    private: bool = False,
) -> None:
    """Saves arrays so that ``path`` holds either what it held before or all of them; ``private`` as
    in :func:`atomic_file`."""
    mx.eval(*arrays.values())
    with atomic_file(path, private) as file:
        mx.save_safetensors(file, arrays, {"format": "mlx"} if metadata is None else metadata)


def copy_file(source: Source, target: Source) -> None:
    """A regular file once more at ``target``, whole or not at all."""
    with open_regular(source) as file, atomic_file(target) as copy:
        shutil.copyfileobj(file, copy, 1 << 24)


def link_or_copy(source: Source, target: Source) -> None:
    """The same file at another place: a hard link, or a copy where the file system has none."""
    source = Path(source).resolve()  # the Hub's cache holds symbolic links
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        copy_file(source, target)


def exchange(first: Source, second: Source) -> bool:
    """Puts each of two files or folders at the other's place, both at once; False where the file
    system cannot."""
    names = [os.fsencode(first), os.fsencode(second)]
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        if sys.platform == "darwin":
            done = libc.renamex_np(*names, ctypes.c_uint(2))  # RENAME_SWAP
        else:
            here = ctypes.c_int(-100)  # AT_FDCWD; 2: RENAME_EXCHANGE
            done = libc.renameat2(here, names[0], here, names[1], ctypes.c_uint(2))
    except AttributeError:
        return False
    if done == 0:
        sync_folder(Path(first).parent)
    return bool(done == 0)


def write_atomic(path: Source, data: bytes | str) -> None:
    """Writes bytes, or text as UTF-8, so that ``path`` is never half-written."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def fingerprint(*paths: Source, whole: bool = False) -> str:
    """``"xxh3:"`` and 32 hex digits that identify the contents of files, wherever they lie.

    The files are taken in order of name; the names themselves do not count. A file up to 16 MiB is
    read whole; of a larger one its size, the safetensors header, and 256 pieces of 64 KiB from the
    first to the last, evenly spaced, so that gigabytes take a moment. It tells files apart that
    differ by training or conversion; it is no guard against malice. With ``whole`` every byte of
    every file counts.
    """
    digest = xxhash.xxh3_128()
    for path in sorted((Path(p) for p in paths), key=lambda p: (p.name, str(p))):
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(struct.pack("<Q", size))
            if whole or size <= SAMPLE * NUM_SAMPLES:
                for at in range(0, size, SAMPLE * NUM_SAMPLES):
                    part = min(SAMPLE * NUM_SAMPLES, size - at)
                    digest.update(read_exactly(file, part, path))
                continue
            if path.suffix == ".safetensors":
                length = 8 + struct.unpack("<Q", read_exactly(file, 8, path))[0]
                file.seek(0)
                digest.update(read_exactly(file, min(length, 8 + MAX_HEADER, size), path))
            for index in range(NUM_SAMPLES):
                file.seek((size - SAMPLE) * index // (NUM_SAMPLES - 1))
                digest.update(read_exactly(file, SAMPLE, path))
    return f"xxh3:{digest.hexdigest()}"
