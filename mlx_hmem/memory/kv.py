"""KV memory: r learned key-value pairs per layer that every query attends to (paper, section 3).

No causal mask, no positional encoding; the result is added to the attention's own output, before
the output projection. Left open by the paper, chosen here: the queries are those before RoPE, but
after a query norm where the anchor has one; scores are scaled as the anchor scales its own; with
grouped queries each query head has its own pairs, which makes 2 · r · layers · heads · head_dim
parameters for every anchor.
"""

import threading
from collections.abc import Callable

import mlx.core as mx

from mlx_hmem.memory.layer import (
    AnchorLayer,
    AttentionLayer,
    LayerMemory,
    MemoryKind,
    extend,
    random_but_the_last,
)
from mlx_hmem.memory.packed import cast, floats


def kv_memory(queries: mx.array, rows: mx.array, num_heads: int, scale: float) -> mx.array:
    """What the queries find in one layer's memory, (batch, time, heads × head_dim).

    Args:
        queries: (batch, time, heads × head_dim).
        rows: keys and values, (2, R, heads × head_dim) or (batch, 2, R, heads × head_dim). Of a
            batch, a pair whose key is zero throughout is not there: no query attends to it.
    """
    batch, time, width = queries.shape
    queries = queries.reshape(batch, time, num_heads, -1).transpose(0, 2, 1, 3)
    pairs = rows.reshape(-1, 2, rows.shape[-2], num_heads, width // num_heads)
    pairs = mx.broadcast_to(pairs, (batch, *pairs.shape[1:])).swapaxes(2, 3)
    mask = _there(rows[:, 0])[:, None, None] if rows.ndim == 4 else None
    found = mx.fast.scaled_dot_product_attention(
        queries, pairs[:, 0], pairs[:, 1], scale=scale, mask=mask
    )
    return found.transpose(0, 2, 1, 3).reshape(batch, time, width)


def _there(keys: mx.array) -> mx.array:
    """0 for each key (..., R, width); what takes all weight from one that is all zeros.
    Finite: a row that has none finds the zeros that are its values."""
    there, not_there = (mx.array(number, keys.dtype) for number in (0, -1e4))
    return mx.where((keys != 0).any(axis=-1), there, not_there)


def _attach(layer: AnchorLayer, memory: LayerMemory) -> None:
    attention = layer.attention
    assert isinstance(attention, AttentionLayer)
    query, seen = attention.query, threading.local()

    def query_call(before: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        output = before(x)
        seen.queries = output[..., query.start : query.start + query.size]
        return output

    def output_call(before: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        rows, queries = memory(x), _normed(seen.__dict__.pop("queries"), attention)
        if rows is None:
            return before(x)
        pairs = floats(cast(rows[0], x.dtype))
        return before(x + kv_memory(queries, pairs, attention.num_heads, attention.scale))

    extend(query.module, query_call)
    extend(attention.output.module, output_call)


def _normed(queries: mx.array, attention: AttentionLayer) -> mx.array:
    """The queries as the anchor norms them: all heads at once, or each by itself."""
    norm = attention.query_norm
    if norm is None:
        return queries
    if norm.weight.size == queries.shape[-1]:
        return norm(queries)
    heads = queries.reshape(*queries.shape[:-1], attention.num_heads, -1)
    return norm(heads).reshape(queries.shape)


KV = MemoryKind(("attention",), random_but_the_last, _attach)  # a value is the last
