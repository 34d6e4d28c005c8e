"""Arrays to read into. MLX knows none whose values are not written first, which for 36 MB takes as
long as a third of the read; but it does not fill what it loads. So it loads from a file that writes
nothing.

Linux brings memory in by pages of 4 KB as it is first written, which for a block of 200 MB takes
longer than to read it warm; it is asked for pages of 2 MB where they fit.
"""

import ctypes
import json
import mmap
import struct
import time
import weakref
from typing import Any

import mlx.core as mx

LARGE = 4 << 20  # bytes that surely hold a page of 2 MB
TAGS = {mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32"}


def unfilled(count: int, dtype: mx.Dtype) -> mx.array:
    """An evaluated array (count,) of integers of any values: to be written through memoryview."""
    file: Any = _Unwritten(count, dtype)
    loaded: Any = mx.load(file, format="safetensors")
    array: mx.array = loaded["a"]
    mx.eval(array)
    read_by = weakref.ref(file)
    del file, loaded
    _wait_until_gone(read_by)
    if array.nbytes >= LARGE:
        _ask_for_large_pages(array)
    return array


def _wait_until_gone(file: weakref.ref[Any], longest: float = 1.0) -> None:
    """MLX's thread lets go of the file after it has said that it is done, and takes the interpreter
    lock for it. A program that ended just then was ended by SIGABRT."""
    end = time.monotonic() + longest
    while file() is not None and time.monotonic() < end:
        time.sleep(0)


def _ask_for_large_pages(array: mx.array) -> None:
    """A hint: where the system has no such pages nothing changes."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    view: Any = memoryview(array).cast("B")  # type: ignore[arg-type]
    start = ctypes.addressof(ctypes.c_char.from_buffer(view))
    first = start - start % mmap.PAGESIZE
    length = ctypes.c_size_t(start + array.nbytes - first)
    ctypes.CDLL(None).madvise(ctypes.c_void_p(first), length, mmap.MADV_HUGEPAGE)


class _Unwritten:
    """A safetensors file of one tensor, as MLX reads one from Python: its data is never given."""

    closed = False

    def __init__(self, count: int, dtype: mx.Dtype):
        nbytes = count * dtype.size
        entry = {"dtype": TAGS[dtype], "shape": [count], "data_offsets": [0, nbytes]}
        header = json.dumps({"a": entry}).encode()
        self._header = struct.pack("<Q", len(header)) + header
        self._size, self._at = len(self._header) + nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def read(self, count: int = -1) -> bytes:
        data = self._header[self._at :] if count < 0 else self._header[self._at : self._at + count]
        self._at += len(data)
        return data

    def readinto(self, target: memoryview) -> int:
        with memoryview(target) as view, view.cast("B") as data:
            own = self._header[self._at : self._at + len(data)]
            data[: len(own)] = own
            self._at += len(data)
            return len(data)
