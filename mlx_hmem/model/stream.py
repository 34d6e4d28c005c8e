"""Text from an anchor with memory attached, over mlx-lm's own generation.

Knows the anchor and its memory slot only; routing and fetching are done before.
"""

import atexit
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import GenerationResponse, stream_generate
from mlx_lm.sample_utils import Sampler, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_hmem.anchors.attach import ArrivingRows, MemorySlot
from mlx_hmem.budget.resident import OverBudgetError
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Rows
from mlx_hmem.model.tokenizer import ModelTokenizer

LEAST = 1e-20  # temperature and top_p: float32 has none of below 1e-38, and 1 / 0 is no number
MOST_TEMP = 1e6

_threads = set[int]()  # that have called an anchor, beside the main one


@atexit.register
def _outlive_threads() -> None:
    """A thread that has ended, and been joined, may still be letting go of what MLX compiled in it,
    for which it takes the interpreter's lock. In a program that ends meanwhile that is a SIGABRT;
    from Python 3.13 on, joining waits for it. A second at most, and all of it on macOS before."""
    end = time.monotonic() + 1
    while time.monotonic() < end and any(map(_runs, _threads)):
        time.sleep(0.005)


def _runs(thread: int) -> bool:
    """Whether a thread is there; where the system does not say (macOS), it may be."""
    tasks = Path("/proc/self/task")
    return (tasks / str(thread)).exists() if tasks.exists() else sys.version_info < (3, 13)


class AnchorWithMemory:
    """An anchor bound to one fetched memory, usable wherever mlx-lm takes a model.

    The slot is set for the length of each call only, so streams with different memories can take
    turns on one anchor.
    """

    def __init__(
        self,
        anchor: nn.Module,
        slot: MemorySlot | None,
        rows: Rows | ArrivingRows | None,
        watch: Callable[[], None] | None = None,
    ):
        """``watch`` is called before each call, to see whether a memory budget is kept."""
        self._anchor, self._slot, self._rows, self._watch = anchor, slot, rows, watch
        self._cut = threading.local()  # what is not computed yet is for one thread

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        if threading.current_thread() is not threading.main_thread():
            _threads.add(threading.get_native_id())
        if self._watch is not None:
            self._watch()
        if self._slot is None:
            return self._anchor(*args, **kwargs)
        rows: Any = self._rows
        if isinstance(rows, tuple):  # once for all tokens: of each it took 2 ms of 35 layers
            if not hasattr(self._cut, "rows"):
                self._cut.rows = self._slot.cut(rows)
            rows = self._cut.rows
        with self._slot.using(rows):
            return self._anchor(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._anchor, name)


def prompt_ids(tokenizer: TokenizerWrapper, prompt: str, context: int | None) -> list[int]:
    """The prompt's token ids, checked to leave room for one more token in ``context``."""
    if not prompt.strip():
        raise UserError("the prompt is empty", repr(prompt), "give it some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # a command line may hold any bytes
        raise UserError("the prompt is not UTF-8 text", error, "convert it") from None
    if isinstance(tokenizer, ModelTokenizer):
        prompt = tokenizer.without_bos(prompt)
    return check_length(list(tokenizer.encode(prompt)), context)


def check_length(ids: list[int], context: int | None) -> list[int]:
    """``ids``, if they leave room for one more token in ``context``."""
    if context is not None and len(ids) >= context:
        raise UserError(
            "the prompt is longer than the context",
            f"{len(ids)} tokens",
            f"shorten it to less than {context} tokens",
        )
    return ids


def stream_text(
    model: AnchorWithMemory,
    tokenizer: TokenizerWrapper,
    ids: list[int],
    max_tokens: int,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    **options: Any,
) -> Iterator[GenerationResponse]:
    """mlx-lm's pieces of text as they come; greedy at ``temp`` 0. UserError at the first logits
    that are not finite.

    ``top_k`` and ``min_p`` 0 leave all tokens to ``top_p``. ``options`` go to mlx-lm's
    ``generate_step`` (``prompt_cache``, ``kv_bits``, ...).
    """
    check_options(max_tokens, temp, top_p, top_k, min_p, seed)
    if seed is not None:
        mx.random.seed(seed)
    top_k = top_k if top_k < len(tokenizer) else 0  # mlx-lm refuses more than there are
    temp, top_p = temp if temp >= LEAST else 0.0, max(top_p, LEAST)
    ends = tokenizer.eos_token_ids
    sampler = ending(make_sampler(temp=temp, top_p=top_p, top_k=top_k, min_p=min_p), ends)
    anchor: Any = model  # not an nn.Module, but all that mlx-lm asks of one
    return _finite(
        stream_generate(anchor, tokenizer, ids, max_tokens=max_tokens, sampler=sampler, **options),
        ends,
    )


def _finite(
    pieces: Iterator[GenerationResponse], ends: Collection[int]
) -> Iterator[GenerationResponse]:
    for piece in pieces:
        check_finite(piece.token, piece.logprobs, ends)
        yield piece


def ending(sampler: Sampler, ends: Collection[int]) -> Sampler:
    """``sampler``, which ends the text where the logits are not finite. That is found on the device
    and costs no wait; :func:`check_finite` then says why the text has ended."""

    def sample(logprobs: mx.array) -> mx.array:
        tokens = sampler(logprobs)  # (rows,) of (rows, vocabulary)
        chosen = mx.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        return mx.where(mx.isfinite(chosen), tokens, min(ends))

    return sample if ends else sampler


def check_finite(token: int, logprobs: mx.array, ends: Collection[int]) -> None:
    """Raises UserError where a token that ends a text (any, if none does) was chosen from logits
    that are not finite: one NaN among them makes all log-probabilities NaN."""
    if (not ends or token in ends) and not mx.isfinite(logprobs[token]).item():
        raise not_finite()


def not_finite() -> UserError:
    return UserError(
        "the model's logits are not finite",
        "NaN or infinity",
        "restore the anchor and its memory; mlx_hmem.bank verify looks for a damaged block",
    )


def check_options(
    max_tokens: int,
    temp: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    seed: int | None = None,
    **options: Any,
) -> None:
    """Raises UserError for a value that :func:`stream_text` cannot take."""
    if max_tokens < 1:
        raise UserError("max_tokens is not positive", max_tokens, "ask for 1 or more")
    if not temp >= 0:
        raise UserError("temp is negative", temp, "use 0 for greedy, 0.7 for variety")
    if temp > MOST_TEMP:
        raise UserError("temp is too large", temp, f"use {MOST_TEMP} or less")
    if not 0 < top_p <= 1:
        raise UserError("top_p is out of range", top_p, "use a number above 0 and up to 1")
    if top_k < 0:
        raise UserError("top_k is negative", top_k, "use 0 for all tokens, or a number of them")
    if not 0 <= min_p <= 1:
        raise UserError("min_p is out of range", min_p, "use a number from 0 to 1")
    if seed is not None and not 0 <= seed < 1 << 64:
        raise UserError("seed is out of range", seed, "use a whole number of 0 or more")


def first_or(
    stream: Iterator[GenerationResponse], otherwise: Callable[[], Iterator[GenerationResponse]]
) -> Iterator[GenerationResponse]:
    """``stream``; ``otherwise()`` where that fails before its first piece, its memory damaged."""
    try:
        first = next(stream)
    except OverBudgetError:
        raise
    except (UserError, OSError):
        stream = otherwise()
        first = next(stream)
    yield first
    yield from stream


def num_held(cache: Iterable[Any]) -> int | None:
    """How many tokens a prompt cache holds; None where its layers differ or do not say."""
    offsets = {getattr(layer, "offset", None) for layer in cache}
    return offsets.pop() if len(offsets) == 1 else None
