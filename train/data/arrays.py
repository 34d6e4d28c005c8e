"""Arrays in .npy files that appear whole or not at all, also those larger than memory."""

import contextlib
import errno
import fcntl
import math
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.format import dtype_to_descr, header_data_from_array_1_0, write_array_header_1_0

from mlx_hmem.files import atomic_file

ZEROS = 1 << 20


def save_array(path: Path, values: np.ndarray) -> None:
    """``np.save``, complete or not at all."""
    with atomic_file(path) as file:
        np.save(file, values)


def load_mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, of which only what is used is read. An array without rows is no
    map. ValueError where the file holds none."""
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except EOFError as error:  # of a file without bytes
        raise ValueError(str(error)) from None
    return array


def save_pieces(path: Path, pieces: Iterable[np.ndarray]) -> None:
    """Saves an array whose pieces, one at least, come one after the other along its first axis."""
    with atomic_file(path) as file:
        rows = 0
        for piece in map(np.ascontiguousarray, pieces):
            header = header_data_from_array_1_0(piece)
            if not file.tell():
                write_array_header_1_0(file, header)
            file.write(piece.data)
            rows += len(piece)
        file.seek(0)  # NumPy leaves room for a greater number of rows
        write_array_header_1_0(file, header | {"shape": (rows, *piece.shape[1:])})


@contextlib.contextmanager
def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A mapped array, not empty, to fill in any order; it is at ``path`` when the block ends."""
    with atomic_file(path) as file:
        header = {"descr": dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        write_array_header_1_0(file, header)
        start = file.tell()
        take_room(file, start + math.prod(shape) * np.dtype(dtype).itemsize)
        array = np.memmap(file.name, dtype, "r+", start, shape)
        yield array
        array.flush()


def take_room(file: BinaryIO, size: int) -> None:
    """Makes a file ``size`` bytes long, all of which the disk has: a full one is an OSError here
    and not, where a page of a map is written, the end of the process (SIGBUS)."""
    file.flush()
    handle, start = file.fileno(), os.fstat(file.fileno()).st_size
    try:
        if sys.platform == "darwin":
            all_of_it, from_the_end = 4, 3  # F_ALLOCATEALL, F_PEOFPOSMODE
            wanted = struct.pack("=Iiqqq", all_of_it, from_the_end, 0, size - start, 0)
            fcntl.fcntl(handle, 42, wanted)  # F_PREALLOCATE
            file.truncate(size)
        else:
            os.posix_fallocate(handle, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        file.seek(start)  # a file system that does not know how: written, it has its room too
        for at in range(start, size, ZEROS):
            file.write(bytes(min(ZEROS, size - at)))
        file.flush()
