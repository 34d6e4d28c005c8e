"""Perplexity of a model over documents.

A document that does not fit the context is cut into windows of about equal length, as in
training; each starts anew from the end-of-text token, so nothing carries over between windows but,
where the whole document routes them, the choice of the memory.
All tokens of a text are predicted, the first from end-of-text alone; end-of-text itself is not.
Windows of about one length share a batch, padded on the right, which a causal model cannot see.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from tqdm import tqdm

from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import within_plan
from mlx_hmem.model.model import MemoryModel

ROUTE_BY = ("window", "document", "first_sentence")
LONGEST = 2048  # window, in tokens


@dataclass(frozen=True)
class Perplexity:
    """Perplexity per token and per byte with standard errors over documents.

    The bits per byte compare models of different tokenizers.
    """

    memory: str
    route_by: str
    documents: int
    tokens: int
    bytes: int
    per_token: float
    per_token_error: float
    per_byte: float
    bits_per_byte: float
    bits_per_byte_error: float

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class DocumentLosses:
    """Of each document with text its summed cross-entropy in nats, its tokens and its bytes, (n,)
    each, float64: what :class:`Perplexity` sums up, and what pairs two models by document."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


@dataclass(frozen=True)
class _Window:
    document: int
    tokens: list[int]  # with end-of-text in front
    text: str


def first_sentence(text: str) -> str:
    """``text`` up to its first end of a sentence or line; all of it when it has none."""
    text = text.strip()
    return re.split(r"(?<=[.!?])\s|\n", text, maxsplit=1)[0] or text


def perplexity(
    model: MemoryModel,
    texts: Sequence[str],
    memory: str = "fetched",
    *,
    route_by: str = "window",
    context: int | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = True,
) -> Perplexity:
    """Perplexity of ``model`` over ``texts``.

    ``memory`` is "fetched", "generic" or "none"; ``route_by`` says what routes a window: "window",
    its own text, as in training; "document", the whole document (the paper, section 2; the same
    where it fits one window); or "first_sentence", that of the window. ``context`` is the longest
    window in tokens; that of the anchor, at most 2,048, unless given.
    """
    options: Any = {"context": context, "tokens_per_batch": tokens_per_batch, "progress": progress}
    losses = document_losses(model, texts, memory, route_by=route_by, **options)
    return summed(losses, memory, route_by)


def document_losses(
    model: MemoryModel,
    texts: Sequence[str],
    memory: str = "fetched",
    *,
    route_by: str = "window",
    context: int | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = True,
) -> DocumentLosses:
    """What :func:`perplexity`, with the same arguments, is summed up from."""
    if route_by not in ROUTE_BY:
        raise UserError("unknown route_by", repr(route_by), f"use one of {ROUTE_BY}")
    context = min(model.context or LONGEST, context or LONGEST)
    if context < 2:
        raise UserError("a context needs 2 tokens or more", context, "give a longer one")
    windows = [w for i, text in enumerate(texts) for w in _windows(model, i, text, context)]
    if not windows:
        raise UserError("there is no text to score", f"{len(texts)} documents", "give some text")
    routed = [_routed_by(w, texts, route_by) for w in windows]
    paths = route_texts(model, routed, memory, progress)
    losses, counts = np.zeros(len(texts)), np.zeros(len(texts))
    with tqdm(
        total=len(windows), desc=f"perplexity, {memory}", unit="window", disable=not progress
    ) as bar:
        for rows in _batches(windows, *within_plan(model, memory, tokens_per_batch)):
            batch_paths = [paths[i] for i in rows] if paths else None
            batch = _losses(model, [windows[i].tokens for i in rows], batch_paths, memory)
            for i, loss in zip(rows, batch, strict=True):
                losses[windows[i].document] += loss
                counts[windows[i].document] += len(windows[i].tokens) - 1
            bar.update(len(rows))
    sizes = np.array([len(t.encode()) for t in texts], dtype=np.float64)
    scored = counts > 0
    return DocumentLosses(losses[scored], counts[scored], sizes[scored])


def _routed_by(window: _Window, texts: Sequence[str], route_by: str) -> str:
    if route_by == "document":
        return texts[window.document]
    return window.text if route_by == "window" else first_sentence(window.text)


def _windows(model: MemoryModel, document: int, text: str, context: int) -> Iterator[_Window]:
    if not text.strip():
        return
    start, *tokens = model.tokenizer.encode(text)
    count = max(1, -(-len(tokens) // (context - 1)))
    size = max(1, -(-len(tokens) // count))
    for i in range(0, len(tokens), size):
        part = tokens[i : i + size]
        part_text = text if len(part) == len(tokens) else model.tokenizer.decode(part)
        # A window of spaces has no route of its own.
        yield _Window(document, [start, *part], part_text if part_text.strip() else text)


def _batches(windows: list[_Window], tokens_per_batch: int, most_rows: int) -> Iterator[list[int]]:
    """Rows of windows, longest first, at most ``tokens_per_batch`` with padding (or one row)."""
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
    start = 0
    while start < len(order):
        rows = max(1, min(most_rows, tokens_per_batch // len(windows[order[start]].tokens)))
        yield order[start : start + rows]
        start += rows


def _losses(
    model: MemoryModel,
    rows: list[list[int]],
    paths: list[ClusterPath] | None,
    memory: str,
) -> list[float]:
    """Summed cross-entropy, in nats, of each row's tokens after the first."""
    longest = max(len(row) for row in rows)
    ids = mx.array([row + row[:1] * (longest - len(row)) for row in rows])
    scored = mx.arange(longest - 1)[None] < mx.array([[len(row) - 1] for row in rows])
    logits = model(ids[:, :-1], paths=paths, memory=memory).astype(mx.float32)
    losses = nn.losses.cross_entropy(logits, ids[:, 1:], reduction="none")
    sums: Any = mx.where(scored, losses, 0).sum(axis=1).tolist()
    return sums


def ratio_and_error(losses: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """sum(losses) / sum(sizes) and its standard error over documents (NaN for one document)."""
    n, ratio = len(losses), losses.sum() / sizes.sum()
    if n < 2:
        return float(ratio), math.nan
    residuals = losses - ratio * sizes
    return float(ratio), float(np.sqrt((residuals**2).sum() * n / (n - 1)) / sizes.sum())


def summed(losses: DocumentLosses, memory: str, route_by: str) -> Perplexity:
    """The perplexity that ``losses`` make, named after what they were scored with."""
    nats, nats_error = ratio_and_error(losses.nats, losses.tokens)
    byte_nats, byte_error = ratio_and_error(losses.nats, losses.bytes)
    return Perplexity(
        memory=memory,
        route_by=route_by,
        documents=len(losses.nats),
        tokens=int(losses.tokens.sum()),
        bytes=int(losses.bytes.sum()),
        per_token=math.exp(nats),
        per_token_error=math.exp(nats) * nats_error,
        per_byte=math.exp(byte_nats),
        bits_per_byte=byte_nats / math.log(2),
        bits_per_byte_error=byte_error / math.log(2),
    )
