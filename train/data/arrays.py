"""Arrays in .npy files that appear whole or not at all, also those larger than memory."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import header_data_from_array_1_0, open_memmap, write_array_header_1_0

from mlx_hmem.files import atomic_file


def save_array(path: Path, values: np.ndarray) -> None:
    """``np.save``, complete or not at all."""
    with atomic_file(path) as file:
        np.save(file, values)


def load_mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, of which only what is used is read. An empty one is no map."""
    array: np.ndarray = np.load(path, mmap_mode="r")
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
        array = open_memmap(file.name, "w+", dtype, shape)
        yield array
        array.flush()
