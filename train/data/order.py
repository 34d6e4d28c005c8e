"""Which sequences a step sees: the order of the data, from the seed alone.

Arms with the same seed see the same sequences in the same order, and a run that was stopped goes on
with the sequences that would have come. ``SubtreeOrder`` makes batches of one level-1 cluster each,
so that a subtree of the bank can be trained apart, ``BucketOrder`` batches of one length each.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import xxhash

from mlx_hmem.errors import UserError

from ..recipe.recipe import TrainerConfig


class Batch(NamedTuple):
    """The numbers of the sequences of a step, and where the step lies in its schedule of learning
    rates: step ``step`` of ``num_steps``."""

    rows: np.ndarray
    step: int
    num_steps: int


class Order(Protocol):
    """The batches of a run. ``batch`` is also asked for the step after the last one."""

    num_steps: int
    identity: dict[str, Any]  # JSON values that the order follows from

    def batch(self, step: int) -> Batch: ...


class Stream:
    """The numbers below ``count`` without end, one permutation an epoch from (seed, epoch, key)."""

    def __init__(self, count: int, seed: int, *key: int):
        self.count, self.seed, self.key = count, seed, key
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def numbers(self, first: int, size: int) -> np.ndarray:
        """``size`` numbers, from position ``first`` of the stream on."""
        found = []
        for epoch, offset in (divmod(i, self.count) for i in range(first, first + size)):
            if epoch != self._epoch:
                rng = np.random.default_rng([self.seed, epoch, *self.key])
                self._epoch, self._permutation = epoch, rng.permutation(self.count)
            found.append(self._permutation[offset])
        return np.array(found)


class ShuffledOrder:
    """The stream of all sequences, cut into batches."""

    def __init__(self, num_sequences: int, training: TrainerConfig, seed: int):
        _check_some(num_sequences)
        self.identity: dict[str, Any] = {"num_sequences": num_sequences, "seed": seed}
        self.num_steps, self._size = training.num_steps(num_sequences), training.batch_size
        self._stream = Stream(num_sequences, seed)

    def batch(self, step: int) -> Batch:
        rows = self._stream.numbers(step * self._size, self._size)
        return Batch(rows, step, self.num_steps)


class SubtreeOrder:
    """Batches of one level-1 cluster each. A cluster has a stream, a number of steps and a schedule
    of learning rates of its own, as if it were trained apart; the clusters' batches are mixed, each
    cluster's spread evenly over the run and in its own order. With ``one_schedule`` all are on the
    same, for weights that every batch trains, whatever its cluster.

    With a frozen anchor no step depends on one of another cluster, so the clusters can also be
    trained by one job each: ``subtree`` leaves only the batches of that cluster.

    Args:
        clusters: the level-1 cluster of each sequence, (n,).
    """

    def __init__(
        self,
        clusters: np.ndarray,
        training: TrainerConfig,
        seed: int,
        subtree: int | None = None,
        one_schedule: bool = False,
    ):
        clusters = np.ascontiguousarray(clusters, np.int32)
        self.identity: dict[str, Any] = {
            "num_sequences": len(clusters),
            "seed": seed,
            "subtrees": xxhash.xxh3_64_hexdigest(clusters.tobytes()),
            "subtree": subtree,
            **({"schedule": "one"} if one_schedule else {}),
        }
        self._one_schedule = one_schedule
        chosen = [c for c in np.unique(clusters).tolist() if subtree in (None, c)]
        self._rows = {cluster: np.flatnonzero(clusters == cluster) for cluster in chosen}
        _check_some(len(self._rows))
        self._streams = {c: Stream(len(rows), seed, c) for c, rows in self._rows.items()}
        self.steps_of = {
            c: training.num_steps(len(rows), len(clusters)) for c, rows in self._rows.items()
        }
        self.num_steps, self._size = sum(self.steps_of.values()), training.batch_size
        self._mixed = _mix(self.steps_of, seed)

    def place(self, step: int) -> tuple[int, int]:
        """The cluster of a step, and the number of the step among those of its cluster."""
        cluster, own = self._mixed[step].tolist()
        return cluster, own

    def batch(self, step: int) -> Batch:
        """After the last one: the last again, for which nothing needs to be fetched."""
        cluster, own = self.place(min(step, self.num_steps - 1))
        numbers = self._streams[cluster].numbers(own * self._size, self._size)
        place = (step, self.num_steps) if self._one_schedule else (own, self.steps_of[cluster])
        return Batch(self._rows[cluster][numbers], *place)


class BucketOrder:
    """Batches of sequences of one length each, all of as many tokens: the shorter the sequences,
    the more of them. A bucket gets steps by the tokens it holds, mixed evenly over the run; one
    that holds less than half a batch may get none. Weights are the same for every bucket, so all
    steps are on one schedule of learning rates.

    Args:
        counts: the sequences of each length. They are numbered bucket after bucket, the longest
            first; ``training.batch_size`` is the number of those of the longest length in a batch.
    """

    def __init__(self, counts: dict[int, int], training: TrainerConfig, seed: int):
        counts = dict(sorted(counts.items(), reverse=True))
        self.identity: dict[str, Any] = {
            "buckets": {str(length): n for length, n in counts.items()},
            "seed": seed,
        }
        longest, tokens = max(counts), [length * n for length, n in counts.items()]
        _check_some(sum(tokens))
        self._sizes = [training.batch_size * longest // length for length in counts]
        self.num_steps = training.num_steps(sum(tokens) // longest)
        # The largest remainders are rounded up, so that the steps of all are as many as wanted.
        shares = np.array(tokens) * (self.num_steps / sum(tokens))
        steps = np.floor(shares).astype(np.int64)
        steps[np.argsort(steps - shares, kind="stable")[: self.num_steps - steps.sum()]] += 1
        self.steps_of = dict(enumerate(steps.tolist()))
        self._mixed = _mix(self.steps_of, seed)
        self._firsts = np.cumsum([0, *counts.values()])
        self._streams = [Stream(n, seed, length) for length, n in counts.items()]

    def batch(self, step: int) -> Batch:
        """After the last one: the last again."""
        bucket, own = self._mixed[min(step, self.num_steps - 1)].tolist()
        size = self._sizes[bucket]
        numbers = self._streams[bucket].numbers(own * size, size)
        return Batch(self._firsts[bucket] + numbers, step, self.num_steps)


def _mix(steps_of: dict[int, int], seed: int) -> np.ndarray:
    """(cluster, step of that cluster) of each step of the run, (n, 2): step ``i`` of ``n`` of a
    cluster comes at a random moment of the i-th of ``n`` equal parts of the run."""
    moments, places = [], []
    for cluster, steps in steps_of.items():
        own = np.arange(steps)
        random = np.random.default_rng([seed, 4, cluster])
        moments.append((own + random.random(steps)) / steps)
        places.append(np.stack([np.full(steps, cluster), own], axis=1))
    # Stable: should rounding make two moments equal, a cluster's steps still keep their order.
    return np.concatenate(places)[np.argsort(np.concatenate(moments), kind="stable")]


def _check_some(number: int) -> None:
    if number < 1:
        raise UserError("there is nothing to train on", "0 sequences", "use a larger corpus")
