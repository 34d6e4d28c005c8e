"""Centroids that stay in their file: a tree of 65,536 leaves is 100 MB, and a route needs 16 rows
of each level.

A file that shrinks meanwhile is a short read, not a bus error as it would be under a map.
"""

import os
from typing import Any

import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.files import RESTORE, Source, TensorInfo


class RowsInFile:
    """A float32 matrix of a safetensors file, read row by row as it is indexed."""

    dtype = np.dtype(np.float32)

    def __init__(self, path: Source, info: TensorInfo):
        self.shape, self._start, self._path = info.shape, info.start, path
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115  closed with this object

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows by one number, a slice, or rising numbers that lie close together."""
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            return self._read(first, last)
        if np.ndim(rows) == 0:
            return self._read(int(rows), int(rows) + 1)[0]
        return self._read(int(rows[0]), int(rows[-1]) + 1)[np.asarray(rows) - rows[0]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._read(0, len(self)).astype(dtype or self.dtype, copy=False)

    def _read(self, first: int, last: int) -> np.ndarray:
        result = np.empty((max(0, last - first), self.shape[1]), self.dtype)
        offset = self._start + first * result.itemsize * self.shape[1]
        buffers: Any = [result]
        if os.preadv(self._file.fileno(), buffers, offset) < result.nbytes:
            raise UserError(f"{self._path} ends too early", f"row {first}", RESTORE)
        return result
