"""How an answer ends: at a stop text, at the end of the context, or before it begins."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_hmem.errors import UserError


def check_stops(stops: Sequence[str]) -> Sequence[str]:
    """``stops``; UserError for an empty one, which would end every answer at once."""
    if "" in stops:
        raise UserError("a stop text is empty", "''", "give it some text")
    return stops


class Held:
    """Text that may be the beginning of one of the texts ``stops``, until what follows decides."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._text = stops, ""

    def add(self, text: str, last: bool) -> tuple[str, bool]:
        """What is free once ``text`` has come, all of it if it is the ``last``, and whether a stop
        text ends it there."""
        held = self._text + text
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            return held[: min(found)], True
        open_ends = [] if last else [_begun(held, stop) for stop in self._stops]
        end = len(held) - max(open_ends, default=0)
        self._text = held[end:]
        return held[:end], False


def until(
    pieces: Iterator[GenerationResponse], stops: Sequence[str]
) -> Iterator[GenerationResponse]:
    """``pieces`` up to the first of the texts ``stops``, which is no part of them.

    What may be the beginning of one is held back until the pieces after it have decided. The piece
    in which a text is whole is the last, with ``finish_reason`` "stop".
    """
    held = Held(stops)
    for piece in pieces:
        text, stopped = held.add(piece.text, piece.finish_reason is not None)
        if stopped:
            yield replace(piece, text=text, finish_reason="stop")
            return
        yield replace(piece, text=text)


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``."""
    most = min(len(stop) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)


def ids_said(
    tokenizer: TokenizerWrapper, text: str, tokens: Sequence[int], last: GenerationResponse
) -> tuple[int, ...]:
    """The ids of an answer ``text``: ``tokens``, unless they have a stop text among them."""
    if last.finish_reason == "stop" and last.token not in tokenizer.eos_token_ids:
        return tuple(tokenizer.encode(text, add_special_tokens=False))
    return tuple(tokens)


def said_of(text: str, last: GenerationResponse, max_tokens: int) -> str | None:
    """What one should know of an answer ``text`` that ended with the piece ``last``, in a line."""
    if not text.strip():
        return "the answer is empty: it ended before its first word"
    if last.finish_reason == "length" and last.generation_tokens < max_tokens:
        return "the answer ends here because the context is full"
    return None
