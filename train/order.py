"""Which sequences a step sees: the order of the data, from (seed, epoch) alone.

Arms with the same seed see the same sequences in the same order, and a run that was stopped goes on
with the sequences that would have come.
"""

import numpy as np

from train.recipe import TrainerConfig


class Order:
    """The endless stream of sequence numbers: one seeded permutation an epoch."""

    def __init__(self, num_sequences: int, seed: int):
        self.num_sequences, self.seed = num_sequences, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.num_sequences)
        return int(self._permutation[offset])

    def batch(self, step: int, size: int) -> np.ndarray:
        return np.array([self._at(step * size + i) for i in range(size)])


def num_steps_of(num_sequences: int, config: TrainerConfig) -> int:
    return max(1, int(config.epochs * num_sequences) // config.batch_size)
