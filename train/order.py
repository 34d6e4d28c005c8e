"""Which sequences a step sees: the order of the data, from (seed, epoch) alone.

Arms with the same seed see the same sequences in the same order, and a run that was stopped goes on
with the sequences that would have come.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np

from mlx_hmem.errors import UserError
from train.recipe import TrainerConfig


class Batch(NamedTuple):
    """The numbers of the sequences of a step, and where the step lies in its schedule of learning
    rates: step ``step`` of ``num_steps``."""

    rows: np.ndarray
    step: int
    num_steps: int


class Order(Protocol):
    """The batches of a run. ``batch`` is also asked for the step after the last one."""

    num_steps: int

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that the order follows from."""

    def batch(self, step: int) -> Batch: ...


class ShuffledOrder:
    """An endless stream of sequence numbers, one seeded permutation an epoch, cut into batches."""

    def __init__(self, num_sequences: int, training: TrainerConfig, seed: int):
        if num_sequences < 1:
            raise UserError("there is nothing to train on", "0 sequences", "use a larger corpus")
        self.num_sequences, self.batch_size, self.seed = num_sequences, training.batch_size, seed
        self.num_steps = num_steps_of(num_sequences, training)
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    @property
    def identity(self) -> dict[str, Any]:
        return {"num_sequences": self.num_sequences, "seed": self.seed}

    def batch(self, step: int) -> Batch:
        first = step * self.batch_size
        rows = [self._at(position) for position in range(first, first + self.batch_size)]
        return Batch(np.array(rows), step, self.num_steps)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.num_sequences)
        return int(self._permutation[offset])


def num_steps_of(num_sequences: int, training: TrainerConfig) -> int:
    return max(1, int(training.epochs * num_sequences) // training.batch_size)
