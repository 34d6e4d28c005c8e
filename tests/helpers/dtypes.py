"""In which numbers a step computes on Metal, and how far those of 16 bits may be from float32.

On a CPU MLX makes a norm, RoPE, attention or a softmax of many operations, some of them in float32
as the one kernel has it inside. Operations that take and give the same dtypes stand in for them, so
that float32 in a graph is float32 that Metal would move through memory.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from math import sqrt
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hmem.anchors import attach
from tests.helpers.graphs import Step
from tests.helpers.tiny_anchors import LAYERS, make_anchor
from train.step import gradient

HALVES = (mx.bfloat16, mx.float16)
UNIT = {mx.bfloat16: 2**-8, mx.float16: 2**-11}  # the most that a number is rounded by, of it
# On the way of the residual stream through a layer: two norms, seven projections, RoPE, two
# products and the softmax of attention, an activation, its product, two sums; the memory's three.
# Then the embeddings, the last norm, the head.
ROUNDINGS = 20 * LAYERS + 3
# Errors that know nothing of each other add up as the root of their number. Back through it every
# operation has two products where it had one.
FORWARD, BACK = sqrt(ROUNDINGS), 2 * sqrt(3 * ROUNDINGS)


def half_anchor(name: str, dtype: mx.Dtype, wide: bool = False) -> nn.Module:
    """An anchor in ``dtype``; ``wide``: the same numbers in float32."""
    anchor = make_anchor(name)
    anchor.set_dtype(dtype)
    if wide:
        anchor.set_dtype(mx.float32)
    mx.eval(anchor.parameters())
    return anchor


def distance(found: mx.array, wanted: mx.array) -> float:
    """|found - wanted| ÷ |wanted|."""
    a, b = (array.astype(mx.float32).flatten() for array in (found, wanted))
    return float(np.array(mx.linalg.norm(a - b) / mx.linalg.norm(b)))


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    return mx.tanh(x) if weight is None else mx.tanh(x) * weight


def layer_norm(x: mx.array, weight: mx.array | None, bias: mx.array | None, eps: float) -> mx.array:
    x = rms_norm(x, weight, eps)
    return x if bias is None else x + bias


def rope(a: mx.array, dims: int, **options: Any) -> mx.array:
    return -a


def softmax(a: mx.array, axis: Any = None, **options: Any) -> mx.array:
    return mx.sigmoid(a)


def scaled_dot_product_attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, **options: Any
) -> mx.array:
    k, v = (mx.repeat(array, q.shape[1] // array.shape[1], axis=1) for array in (k, v))
    scores = scale * q @ k.swapaxes(-1, -2)
    if isinstance(mask, mx.array):
        looks = mask.dtype == mx.bool_
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min) if looks else scores + mask
    return softmax(scores) @ v


FAST = (rms_norm, layer_norm, rope, scaled_dot_product_attention)


def custom_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """With the gradient that MLX makes of it: no graph with one of its own can be exported."""
    function.vjp = lambda own: own  # type: ignore[attr-defined]
    return function


def unstack(group: mx.array) -> list[mx.array]:
    return [group[..., place, :, :, :] for place in range(group.shape[-4])]


def blocks_of(blocks: mx.array, index: mx.array) -> mx.array:
    return blocks[index]


@contextmanager
def as_on_metal() -> Iterator[None]:
    """Within it graphs are built that can be walked; their numbers are others."""
    places: list[tuple[Any, str, Any]] = [(mx.fast, f.__name__, f) for f in FAST]
    places += [(mx, f.__name__, f) for f in (softmax, custom_function)]
    places += [(attach, "_unstack", unstack), (gradient, "blocks_of", blocks_of)]
    with ExitStack() as stack:
        for place in places:
            stack.enter_context(patch.object(*place))
        mx.disable_compile()
        stack.callback(mx.enable_compile)
        yield


def shapes_in_other_floats(steps: Iterable[Step], dtype: mx.Dtype) -> set[tuple[str, Any, bool]]:
    """Of floats in another dtype than ``dtype``, single numbers left out: that dtype, their shape,
    and whether a matrix product has to do with them."""
    return {
        (str(own).rpartition(".")[2], shape, "MM" in step.name.upper().replace("MATMUL", "MM"))
        for step in steps
        for shape, own in zip(step.inputs + step.outputs, step.takes + step.gives, strict=True)
        if mx.issubdtype(own, mx.floating) and own != dtype and any(n > 1 for n in shape)
    }
