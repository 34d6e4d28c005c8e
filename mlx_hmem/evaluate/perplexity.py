"""Perplexity of a model over documents.

A document that does not fit the context is cut into windows of about equal length, as in
training; each starts anew from the end-of-text token, so nothing carries over between windows but,
where the whole document routes them, the choice of the memory.
All tokens of a text are predicted, the first from end-of-text alone; end-of-text itself is not.
Windows of about one length share a batch, padded on the right, which a causal model cannot see.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import Candidate, longest_sequence, one_by_one, score_candidates
from mlx_hmem.model.model import MemoryModel

ROUTE_BY = ("window", "document", "first_sentence")


@dataclass(frozen=True)
class Perplexity(JsonConfig):
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


@dataclass(frozen=True)
class DocumentLosses:
    """Of each document with text its summed cross-entropy in nats, its tokens and its bytes, (n,)
    each, float64: what :class:`Perplexity` sums up, and what pairs two models by document."""

    nats: np.ndarray
    tokens: np.ndarray
    bytes: np.ndarray


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
    **options: Any,
) -> Perplexity:
    """Perplexity of ``model`` over ``texts``, with the options of :func:`document_losses`."""
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
    """The loss of each of ``texts``.

    ``memory`` is "fetched", "generic" or "none"; ``route_by`` says what routes a window: "window",
    its own text, as in training; "document", the whole document (the paper, section 2; the same
    where it fits one window); or "first_sentence", that of the window. ``context`` is the longest
    window in tokens; that of the anchor, at most 2,048, unless given.
    """
    if route_by not in ROUTE_BY:
        raise UserError("unknown route_by", repr(route_by), f"use one of {ROUTE_BY}")
    context = longest_sequence(model, context)
    if context < 2:
        raise UserError("a context needs 2 tokens or more", context, "give a longer one")
    owners, questions, routed = list[int](), list[list[Candidate]](), list[str]()
    for document, text in enumerate(texts):
        for ids, window in windows(model, text, context):
            owners.append(document)
            questions.append([Candidate(ids[:1], ids[1:])])
            known = {"window": window, "document": text}
            routed.append(known.get(route_by) or first_sentence(window))
    if not questions:
        raise UserError("there is no text to score", f"{len(texts)} documents", "give some text")
    paths = route_texts(model, routed, memory, progress)
    losses, counts = np.zeros(len(texts)), np.zeros(len(texts))
    batches = score_candidates(model, questions, memory, paths, tokens_per_batch)
    desc = f"perplexity, {memory}"
    for i, (score,) in one_by_one(batches, len(questions), desc, "window", progress):
        losses[owners[i]] += score.nats
        counts[owners[i]] += score.tokens
    sizes = np.array([len(t.encode()) for t in texts], dtype=np.float64)
    scored = counts > 0
    return DocumentLosses(losses[scored], counts[scored], sizes[scored])


def windows(model: MemoryModel, text: str, context: int) -> Iterator[tuple[list[int], str]]:
    """Parts of a text of at most ``context`` ids, end-of-text in front, each with its own text."""
    if not text.strip():
        return
    start, *tokens = model.tokenizer.encode(text)
    count = max(1, -(-len(tokens) // (context - 1)))
    size = max(1, -(-len(tokens) // count))
    for i in range(0, len(tokens), size):
        part = tokens[i : i + size]
        own = text if len(part) == len(tokens) else model.tokenizer.decode(part)
        # A window of spaces has no route of its own.
        yield [start, *part], own if own.strip() else text


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
