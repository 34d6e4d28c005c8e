"""The next-token loss over the positions that count, with never more than a chunk of the logits.

With a vocabulary of 262,144 the logits of a thousand tokens are a gigabyte, and a whole loss holds
them three times. Where the head is frozen the gradient of the hidden states is all that is wanted:
it is worked out with the loss, chunk by chunk, from the same exponentials, and kept until it is
asked for. A head that is trained keeps whole logits.
"""

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..padding import counted

CHUNK_BYTES = 1 << 26  # of logits in float32
LEAST = -60.0  # nats below the likeliest: less adds nothing to a sum of a vocabulary
CHUNKS_AT_ONCE = 12  # MLX makes room for ten operations ahead (measured, CPU)
Head = Callable[[mx.array], mx.array]  # hidden states (n, hidden) -> logits (n, vocabulary)


def masked_loss(logits: mx.array, tokens: mx.array, eot: int) -> mx.array:
    """Mean next-token cross-entropy in nats of ``tokens`` (batch, time + 1), padding left out."""
    return summed_loss(logits, tokens, eot) / mx.maximum(counted(tokens, eot).sum(), 1)


def summed_loss(logits: mx.array, tokens: mx.array, eot: int) -> mx.array:
    """:func:`masked_loss` summed over the tokens that count."""
    logits = logits.astype(mx.float32)
    picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1).squeeze(-1)
    losses = mx.logsumexp(logits, axis=-1) - picked
    return (losses * counted(tokens, eot).astype(mx.float32)).sum()


def chunk_size(vocabulary: int) -> int:
    """Positions in a chunk."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


def counted_places(counts: np.ndarray, chunk: int) -> tuple[np.ndarray, int]:
    """The flat places of the targets that count by ``counts`` (batch, time), and how many they are;
    filled with zeros to whole chunks, for a compiled step wants few shapes."""
    found = np.flatnonzero(counts)
    size = min(counts.size, -(-max(1, len(found)) // chunk) * chunk)
    return np.pad(found, (0, size - len(found))).astype(np.int32), len(found)


def chunked_loss(
    hidden: mx.array,
    targets: mx.array,
    places: mx.array,
    count: mx.array,
    head: Head,
    chunk: int,
    log_weights: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """:func:`summed_loss` of the logits that a frozen ``head`` makes of ``hidden`` (batch, time,
    hidden size), at the first ``count`` of ``places`` (:func:`counted_places`), and for each of
    these whether the target is the likeliest token.

    Args:
        targets: at these places, (places,), as the head counts them.
        log_weights: (vocabulary,), where a token of the head stands for several.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])[places]
    weights = (mx.arange(places.size) < count).astype(mx.float32)

    @mx.custom_function
    def loss(rows: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        total, gradients, right = mx.array(0.0), list[mx.array](), list[mx.array]()
        for first in range(0, places.size, chunk):
            part = slice(first, first + chunk)
            own = rows[part]
            if gradients:  # else all chunks' logits could be there at once
                own = mx.depends([own], [total, gradients[-1]])[0]
            given = (own, targets[part], weights[part], head, log_weights)
            value, gradient, likeliest = _of_chunk(*given)
            total = total + value
            gradients.append(gradient)
            right.append(likeliest)
        return total, mx.concatenate(gradients), mx.concatenate(right)

    @loss.vjp
    def of_rows(rows: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
        return cotangents[0].astype(outputs[1].dtype) * outputs[1]

    found: Any = loss(rows)
    total, _, right = found
    return total, right


def token_losses(hidden: mx.array, targets: mx.array, head: Head, chunk: int) -> mx.array:
    """Cross-entropy in nats of ``targets`` (batch, time), each, given ``hidden`` (batch, time,
    hidden size). Computed when called, a chunk at a time."""
    rows, flat, found = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), list[mx.array]()
    for first in range(0, flat.size, chunk):
        part = slice(first, first + chunk)
        logits = head(rows[part]).astype(mx.float32)
        found.append(nn.losses.cross_entropy(logits, flat[part], reduction="none"))
        mx.eval(found[-1])
    return mx.concatenate(found).reshape(targets.shape)


def _of_chunk(
    rows: mx.array, targets: mx.array, weights: mx.array, head: Head, log_weights: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    """Weighted sum of the losses, its gradient for ``rows``: softmax less the target, back through
    the head; and where the target is the likeliest."""
    logits = head(rows)
    wide = logits.astype(mx.float32)
    picked = mx.take_along_axis(wide, targets[:, None], axis=-1)
    top = likeliest = mx.depends([wide.max(axis=-1, keepdims=True)], [picked])[0]
    if log_weights is not None:  # a target stands for itself alone
        wide = wide + log_weights
        top = wide.max(axis=-1, keepdims=True)
    # Then wide is let go of. A third of the time of exp on a CPU; numbers too small to be normal
    # take 100 times as long.
    powers = mx.power(math.e, mx.maximum(wide - top, LEAST))
    sums = powers.sum(axis=-1, keepdims=True)
    losses = (top + mx.log(sums) - picked).squeeze(-1)
    chances = powers / sums
    hit = mx.take_along_axis(chances, targets[:, None], axis=-1)
    slope = mx.put_along_axis(chances, targets[:, None], hit - 1, axis=-1)
    _, gradients = mx.vjp(head, [rows], [slope.astype(logits.dtype)])
    scale = weights[:, None].astype(rows.dtype)
    return (losses * weights).sum(), scale * gradients[0], (picked == likeliest).squeeze(-1)
