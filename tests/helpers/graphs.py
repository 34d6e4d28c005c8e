"""What MLX will launch and in which numbers, read in the graph of an array not computed yet."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

# What gives another view of an array, and launches nothing.
VIEWS = {
    "Broadcast", "BroadcastAxes", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape",
    "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten",
}  # fmt: skip


def operations(*arrays: mx.array) -> Counter[str]:
    """The operations by name, views among them."""
    text = io.StringIO()
    mx.export_to_dot(text, *arrays)
    return Counter(re.findall(r'label ="([^"]+)", shape=rectangle', text.getvalue()))


def launches(*arrays: mx.array) -> Counter[str]:
    """The operations that launch a kernel."""
    found = operations(*arrays)
    return Counter({name: n for name, n in found.items() if name not in VIEWS})


class Step(NamedTuple):
    """One operation of a traced function: shapes and dtypes of what goes in and comes out."""

    name: str
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    takes: list[mx.Dtype]
    gives: list[mx.Dtype]


def traced(function: Callable[..., Any], *arguments: mx.array) -> list[Step]:
    """All operations of a function, those of its compiled parts one by one."""
    found: list[dict[str, Any]] = []
    mx.disable_compile()
    try:
        mx.export_function(found.append, function, *arguments)
    finally:
        mx.enable_compile()
    return _steps(found)


def leading_to(*arrays: mx.array) -> list[Step]:
    """All operations that will compute arrays, which were built with ``mx.disable_compile()``."""
    found: list[dict[str, Any]] = []
    mx.export_function(found.append, lambda: arrays)
    return _steps(found)


@contextmanager
def computed() -> Iterator[list[Step]]:
    """All operations that lead to what ``mx.eval`` and ``mx.async_eval`` compute within, those of
    compiled parts one by one."""
    steps, before = list[Step](), (mx.eval, mx.async_eval)

    def watched(evaluate: Callable[..., None]) -> Callable[..., None]:
        def call(*trees: Any) -> None:
            leaves: Any = tree_flatten(trees)
            arrays = [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]
            if arrays:
                steps.extend(leading_to(*arrays))
            evaluate(*trees)

        return call

    mx.disable_compile()
    mx.eval, mx.async_eval = map(watched, before)
    try:
        yield steps
    finally:
        mx.eval, mx.async_eval = before
        mx.enable_compile()


def _steps(events: list[dict[str, Any]]) -> list[Step]:
    sides = ("inputs", "outputs")
    return [
        Step(event["name"], *([a[i] for a in event[side]] for i in (1, 2) for side in sides))
        for event in events
        if event["type"] == "primitive"
    ]
