"""What an instruct anchor is asked: a conversation in its tokenizer's chat template.

A template is a program that came with a model. It runs in Jinja's sandbox, for so many seconds and
within so much memory; what was said reaches it as text in which no control token is whole.
"""

import contextlib
import ctypes
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_hmem.budget.resident import resident_bytes
from mlx_hmem.errors import UserError, foreign
from mlx_hmem.model.tokenizer import ModelTokenizer, mark_for

SECONDS = 10.0
MOST_MEMORY = 1 << 30  # bytes that rendering may take
CHECKS = 0.02  # seconds between two looks at both


class OverBoundsError(BaseException):
    """A template takes too long, or too much memory. No Exception: Jinja lets those of constants
    pass, and computes them again."""


def chat_ids(
    tokenizer: TokenizerWrapper,
    system: str | None,
    turns: Sequence[tuple[str, str]],
    text: str,
    **options: Any,
) -> list[int]:
    """The ids of a conversation up to where the answer to ``text`` begins.

    ``system``: how the anchor is to behave, None to leave that to the template. ``turns``: what was
    said before, and what was answered. ``options``: what else the template may look at.

    Raises:
        UserError: the template does not take it, as Gemma's takes no system prompt, or is beyond
            its bounds.
    """
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, answer in turns:
        messages.append({"role": "user", "content": said})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": text})
    if not isinstance(tokenizer, ModelTokenizer):
        tokenizer = ModelTokenizer.of(tokenizer, None)
    mark = mark_for(each["content"] for each in messages)
    remedy = "restore it" if system is None else "leave the system prompt out"
    with foreign("the model's chat template fails", remedy):
        for each in messages:
            each["content"] = tokenizer.cut(each["content"], mark)
        held = any(mark in each["content"] for each in messages)
        with _bounded():
            made = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=not held, **options
            )
        ids = tokenizer.rendered_ids(made, mark) if held else list(made)
        if not ids:
            raise ValueError("it makes no text of it")
    return tokenizer.checked(ids)


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Stops what runs inside by a ValueError when it takes too long or too much memory."""
    thread, over = threading.get_ident(), threading.Event()
    end, most = time.monotonic() + SECONDS, resident_bytes() + MOST_MEMORY

    def watch() -> None:
        while not over.wait(CHECKS):
            if time.monotonic() > end or resident_bytes() > most:
                error = ctypes.py_object(OverBoundsError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        try:
            with _address_space(MOST_MEMORY), _alarm(SECONDS + 1):
                yield
        finally:  # the watcher's may come as late as here
            over.set()
            watcher.join()
    except OverBoundsError:
        bounds = f"{SECONDS:g} seconds, or {MOST_MEMORY >> 20} MB"
        raise ValueError(f"it takes more than {bounds}") from None


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """An OverBoundsError after so long, too, while one operation on large numbers keeps the
    interpreter's lock, so that no thread sees the time. Only the main thread is told of signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: Any) -> None:
        raise OverBoundsError

    handler = signal.signal(signal.SIGALRM, ring)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def _address_space(more: int) -> Iterator[None]:
    """So much more of it, and a MemoryError beyond: one operation on a text can take gigabytes, and
    no exception comes in between. macOS has no such limit; there the exception comes behind it."""
    if sys.platform != "linux":
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    limit = most if soft == resource.RLIM_INFINITY else min(soft, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check_system(tokenizer: TokenizerWrapper, system: str | None) -> None:
    """Raises UserError for a system prompt where no template has a place for it."""
    if system is not None and not tokenizer.has_chat_template:
        raise UserError(
            "a system prompt needs a chat template, and this model has none",
            repr(system)[:40],
            "write it into the prompt",
        )
