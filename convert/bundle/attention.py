"""Attention in single operations, for functions that MLX 0.31 reads too.

On a GPU ``mx.fast.scaled_dot_product_attention`` is recorded as one operation, which MLX 0.32.4
writes with a byte more than 0.31.1 reads. On a CPU MLX records the operations below by itself.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx


def attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    *,
    scale: float,
    mask: mx.array | None = None,
    sinks: None = None,
) -> mx.array:
    """What MLX's function of that name computes, softmax in float32.

    Args:
        queries: (batch, heads, time, head_dim).
        keys, values: (batch, key-value heads, slots, head_dim); each serves as many query heads.
        mask: boolean, true where a query looks, or added to the scores; it must broadcast to
            (batch, heads, time, slots).
    """
    if sinks is not None or isinstance(mask, str):
        raise ValueError("attention with sinks, or a mask by name")
    batch, heads, time, width = queries.shape
    kv_heads, slots = keys.shape[1:3]
    queries = queries * scale
    if grouped := heads != kv_heads:
        queries = queries.reshape(batch, kv_heads, heads // kv_heads, time, width)
        keys, values = keys[:, :, None], values[:, :, None]
    scores = queries @ keys.swapaxes(-1, -2)
    if mask is not None:
        mask = mx.broadcast_to(mask, (batch, heads, time, slots)).reshape(scores.shape)
        lowest = mx.array(mx.finfo(scores.dtype).min, scores.dtype)
        looks = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, lowest) if looks else scores + mask.astype(scores.dtype)
    found = mx.softmax(scores, axis=-1, precise=True) @ values
    return found.flatten(1, 2) if grouped else found


@contextmanager
def single_operations() -> Iterator[None]:
    """Within it, whoever calls MLX's fused attention calls :func:`attention`."""
    fast: Any = mx.fast
    fused, fast.scaled_dot_product_attention = fast.scaled_dot_product_attention, attention
    try:
        yield
    finally:
        fast.scaled_dot_product_attention = fused
