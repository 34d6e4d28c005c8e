"""The processes of one training, started by ``mlx.launch``: on one machine or on several.

Each rank holds the whole anchor and a store of its own, takes its share of every batch, and makes
the same update from the summed gradient. Ranks on one machine share the folder of the run: the
first of them there reads and writes what they share, the others wait.
"""

import contextlib
import hashlib
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import numpy as np

from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file

PIECE = 1 << 24  # bytes of a file that travel at once


@dataclass(frozen=True)
class Ranks:
    """This process among those that train a run; alone unless it has met others.

    ``first`` of those ``on_this_machine``, which share the folder of the run."""

    group: mx.distributed.Group | None = None
    rank: int = 0
    size: int = 1
    first: bool = True
    on_this_machine: int = 1

    @classmethod
    def meet(cls, folder: Path) -> Self:
        """Among all that were started to train the run in ``folder``, once they have come."""
        group = mx.distributed.init()
        ranks = cls(group, group.rank(), group.size())
        place = f"{socket.gethostname()} {folder.resolve()}".encode()
        number = int.from_bytes(hashlib.sha256(place).digest()[:3], "big")
        numbers = ranks.gather(number)
        first = numbers.index(number) == ranks.rank
        return replace(ranks, first=first, on_this_machine=numbers.count(number))

    def gather(self, number: int) -> list[int]:
        """The numbers, up to 2**31, that the ranks came with, once all have come."""
        if self.size == 1:
            return [number]
        # A sum, because every backend has it.
        numbers = np.zeros(self.size, np.int32)
        numbers[self.rank] = number
        return [int(i) for i in np.array(self.sum(mx.array(numbers)))]

    def sum(self, array: mx.array) -> mx.array:
        """The sum of the ranks' arrays. Raises UserError if one of them has gone."""
        try:
            result = mx.distributed.all_sum(array, group=self.group)
            mx.eval(result)
        except RuntimeError as error:
            remedy = "see what the others say, and start all of them again: the run goes on"
            raise UserError("the connection between the ranks was lost", error, remedy) from None
        return result

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(0)

    def share_file(self, path: Path, source: int) -> None:
        """Puts the file of rank ``source`` where machines lack it."""
        if self.size == 1:
            return
        size = path.stat().st_size if self.rank == source else 0
        pieces = self.gather(size // PIECE)[source] * [PIECE] + [self.gather(size % PIECE)[source]]
        file: Any = contextlib.nullcontext()
        if self.rank == source:
            file = path.open("rb")
        elif self.first and not path.exists():
            file = atomic_file(path)
        with file as opened:
            for length in pieces:
                own = opened.read(length) if self.rank == source else bytes(length)
                piece = self.sum(mx.array(np.frombuffer(own, np.uint8)))
                if opened is not None and self.rank != source:
                    opened.write(np.array(piece))

    def share(self, arrays: dict[str, mx.array], source: int) -> dict[str, mx.array]:
        """The arrays of rank ``source`` on all ranks; names and shapes are the same everywhere."""
        if self.size == 1:
            return arrays
        there = self.rank == source
        return {n: self.sum(a if there else mx.zeros_like(a)) for n, a in arrays.items()}


ALONE = Ranks()
