"""One row of a batch: how its tokens are chosen, and the text that comes of them."""

import math
import secrets
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_repetition_penalty

from mlx_hmem.generation.ending import Held
from mlx_hmem.model.stream import LEAST, ending
from mlx_hmem.model.tokenizer import Pieces
from mlx_hmem.server.asked import Asked, Logprob, Piece


class Sampling:
    """mlx-lm's sampling with random numbers of its own: what a row says does not depend on the rows
    beside it. Nothing is compiled, as mlx-lm's is, anew for each number that somebody sends."""

    def __init__(self, asked: Asked, number: int):
        """``number``: of the answer among those of the request."""
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        self._key = mx.random.key((seed + number) % (1 << 64))
        self._asked = asked

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Tokens (rows,) of log-probabilities (rows, vocabulary)."""
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(self.likely(logprobs) / self._asked.temperature, key=key)

    def likely(self, logprobs: mx.array) -> mx.array:
        """Minus infinity for what ``top_p``, ``top_k`` or ``min_p`` leaves out."""
        asked, most = self._asked, logprobs.shape[-1]
        if asked.top_p >= 1 and asked.min_p == 0 and not 0 < asked.top_k < most:
            return logprobs
        ordered = -mx.sort(-logprobs.astype(mx.float32), axis=-1)
        shares = mx.exp(ordered)
        before = mx.cumsum(shares, axis=-1) - shares
        kept = before < asked.top_p * shares.sum(axis=-1, keepdims=True)
        if asked.min_p > 0:
            kept = kept & (ordered >= ordered[..., :1] + math.log(asked.min_p))
        if asked.top_k > 0:
            kept = kept & (mx.arange(most) < asked.top_k)
        kept = kept | (mx.arange(most) == 0)
        least = mx.where(kept, ordered, mx.inf).min(axis=-1, keepdims=True)
        return mx.where(logprobs < least, -mx.inf, logprobs)


def options_of(asked: Asked, number: int, ends: Sequence[int]) -> dict[str, list[Any]]:
    """A row's own ``samplers`` and ``logits_processors`` for mlx-lm's BatchGenerator; greedy rows
    share the generator's, which then serves all of them at once."""
    sampler = ending(Sampling(asked, number), ends) if asked.temperature >= LEAST else None
    penalty = asked.repetition_penalty
    processors = [] if penalty == 1 else [make_repetition_penalty(penalty)]
    return {"samplers": [sampler], "logits_processors": [processors]}


class Row:
    """What one row has said so far. ``held``: its blocks, until it has begun to use them;
    ``num_reused``: of its prompt's tokens those that were read before."""

    def __init__(self, asked: Asked, index: int, tokenizer: Any, held: Any, num_reused: int):
        self.index, self.num_tokens, self.held = index, 0, held
        self._num_reused = num_reused
        self._tokenizer, self._before, self._logprobs = tokenizer, list[int](), asked.logprobs
        self._pieces, self._stops = Pieces(tokenizer._tokenizer), Held(asked.stop)
        self._said, self._sent = 0, 0  # characters
        self._waiting: list[tuple[int, Logprob]] = []  # each with where its text begins
        self._kept: list[Piece] | None = None if asked.stream else []

    def add(self, token: int, logprobs: mx.array, reason: str | None) -> Piece:
        """The piece of text that a token, the last one if there is a ``reason``, makes sure. The
        row has ended where the piece says so; that of a row which is no stream has all its text."""
        self.held = None
        if reason != "stop":
            self.num_tokens += 1
            if self._logprobs is not None:
                self._waiting.append((self._said, self._logprob(token, logprobs)))
            self._pieces.add_token(token)
            self._before = [token]
        if reason is not None:
            self._pieces.finalize()
        new = self._pieces.last_segment
        self._said += len(new)
        text, stopped = self._stops.add(new, reason is not None)
        self._sent += len(text)
        reason = "stop" if stopped else reason
        free = [each for start, each in self._waiting if start < self._sent or reason == "length"]
        self._waiting = self._waiting[len(free) :]
        piece = Piece(self.index, text, free, reason, self.num_tokens, self._num_reused)
        if self._kept is not None:
            self._kept.append(piece)
            if reason is not None:
                piece.text = "".join(each.text for each in self._kept)
                piece.logprobs = [one for each in self._kept for one in each.logprobs]
        return piece

    def _logprob(self, token: int, logprobs: mx.array) -> Logprob:
        count, top = self._logprobs or 0, []
        if count:
            likeliest = mx.argpartition(-logprobs, kth=count - 1)[:count]
            values: Any = mx.take(logprobs, likeliest).tolist()
            pairs = sorted(zip(values, _ints(likeliest), strict=True), reverse=True)
            top = [(self._text(other), value) for value, other in pairs]
        return Logprob(self._text(token), logprobs[token].item(), top)  # type: ignore[arg-type]

    def _text(self, token: int) -> str:
        """What a token says behind the one before it in the answer: alone, as in front of all, it
        may lose its space."""
        decode = self._tokenizer.decode
        known, said = decode(self._before), decode([*self._before, token])
        return said[len(known) :] if said.startswith(known) else decode([token])


def _ints(array: mx.array) -> list[int]:
    return array.tolist()  # type: ignore[return-value]
