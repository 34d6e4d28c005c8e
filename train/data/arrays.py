"""Arrays in .npy files that appear whole or not at all, also those larger than memory."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_hmem.files import atomic_file


def save_array(path: Path, values: np.ndarray) -> None:
    """``np.save``, complete or not at all."""
    with atomic_file(path) as file:
        np.save(file, values)


def load_mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, of which only what is used is read. An empty one is no map."""
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def _header(file: BinaryIO, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    described = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": described, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def save_pieces(
    path: Path, dtype: Any, shape: tuple[int, ...], pieces: Iterable[np.ndarray]
) -> None:
    """Saves an array whose pieces, along its first axis, come one after the other."""
    with atomic_file(path) as file:
        _header(file, np.dtype(dtype), shape)
        rows = 0
        for piece in pieces:
            file.write(np.ascontiguousarray(piece, dtype).data)
            rows += len(piece)
    assert rows == shape[0], (rows, shape)


@contextlib.contextmanager
def new_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """A mapped array, not empty, to fill in any order; it is at ``path`` when the block ends."""
    with atomic_file(path) as file:
        _header(file, np.dtype(dtype), shape)
        file.flush()
        array = np.memmap(file, dtype, "r+", file.tell(), shape)
        yield array
        array.flush()
