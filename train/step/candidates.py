"""Some tokens of a large vocabulary in place of all, where a frozen head is most of a step's work.

Of Gemma 3 270M's step two thirds are its 262,144 tokens, hardly one of which is ever likely. A step
looks at the tokens of the text, at those that the anchor expects the most there, and at others that
are drawn anew for each step and stand for as many as they were drawn from. So the sum of
exponentials is right on average (importance sampling: Jean et al., arXiv 1412.2007), and what a
memory makes likely by mistake is met sooner or later.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.architectures import head_of
from mlx_hmem.anchors.load import num_embedded

from .loss import chunk_size, chunked_loss, counted_places

FEWEST = 1 << 14  # tokens that a step looks at, half of them certain
LARGE = 4  # times as large is a vocabulary that is not looked at whole
READ = 16  # sequences that the anchor is asked about
# Targets, places, count of :func:`.chunked_loss`; tokens and their weights, if not all are there.
Counting = tuple[mx.array, mx.array, mx.array, mx.array | None, mx.array | None]


class Drawn(NamedTuple):
    """``tokens`` in ascending order, (n,); ``weights``: the logarithms of how many tokens each of
    them stands for, (n,) float32."""

    tokens: np.ndarray
    weights: np.ndarray

    def places(self, tokens: np.ndarray) -> np.ndarray:
        """Where tokens that are certain to be there stand."""
        return np.searchsorted(self.tokens, tokens).astype(np.int32)


@dataclass(frozen=True)
class Candidates:
    """``certain``: tokens that every step looks at, in ascending order; ``others``: the rest."""

    certain: np.ndarray
    others: np.ndarray

    def draw(self, rng: np.random.Generator) -> Drawn:
        count = len(self.certain)
        drawn = rng.choice(self.others, count, replace=False, shuffle=False)
        tokens = np.concatenate([self.certain, drawn])
        stand_for = np.repeat([1, len(self.others) / count], count)
        order = np.argsort(tokens)
        return Drawn(tokens[order].astype(np.int32), np.log(stand_for[order]).astype(np.float32))


def candidates_for(
    anchor: nn.Module, text: Sequence[np.ndarray], targets: np.ndarray
) -> Candidates | None:
    """What a training looks at, None for the whole vocabulary; ``text``: the sequences that it is
    mostly about, each (tokens,); ``targets``: all tokens that are learned."""
    vocabulary, own = num_embedded(anchor), np.unique(targets)
    size = max(FEWEST, 1 << (4 * len(own) - 1).bit_length())  # a compiled step wants few shapes
    if vocabulary < LARGE * size:
        return None
    likely = np.argsort(_least_behind(anchor, text), kind="stable")
    others = likely[~np.isin(likely, own)]
    more = size // 2 - len(own)
    return Candidates(np.union1d(own, others[:more]), np.sort(others[more:]))


def _least_behind(anchor: nn.Module, text: Sequence[np.ndarray]) -> np.ndarray:
    """How far each token's logit stays behind the likeliest token's, where it is nearest to it, for
    the anchor alone in some of the sequences, (vocabulary,)."""
    head, chunk = head_of(anchor), chunk_size(num_embedded(anchor))
    least: Any = mx.full(num_embedded(anchor), np.inf)
    chosen = np.linspace(0, len(text) - 1, min(READ, len(text))).astype(int)
    for number in tqdm(chosen, desc="what the anchor expects", unit=" texts", delay=2, leave=False):
        hidden = anchor.model(mx.array(text[number].astype(np.int32))[None, :-1])[0]
        for first in range(0, len(hidden), chunk):
            logits = head(hidden[first : first + chunk])
            behind = logits.max(axis=-1, keepdims=True) - logits
            least = mx.minimum(least, behind.min(axis=0).astype(mx.float32))
            mx.eval(least)
    return np.array(least)


def counting_of(
    tokens: np.ndarray, counts: np.ndarray, chunk: int, drawn: Drawn | None = None
) -> Counting:
    """What is learned of sequences (batch, time + 1), the targets of which count by ``counts``
    (batch, time); ``drawn``: tokens that stand for the whole vocabulary."""
    places, count = counted_places(counts, chunk)
    targets = tokens[:, 1:].reshape(-1)[places].astype(np.int32)
    given = (mx.array(places), mx.array(count))
    if drawn is None:
        return mx.array(targets), *given, None, None
    named = mx.array(drawn.places(targets))
    return named, *given, mx.array(drawn.tokens), mx.array(drawn.weights)


def counted_loss(
    anchor: nn.Module, hidden: mx.array, counting: Counting, chunk: int
) -> tuple[mx.array, mx.array]:
    """:func:`.chunked_loss` of the hidden states that ``anchor.model`` gives, its head frozen."""
    targets, places, count, tokens, weights = counting
    return chunked_loss(hidden, targets, places, count, head_of(anchor, tokens), chunk, weights)
