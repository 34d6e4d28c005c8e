"""What MLX will launch, counted in the graph of an array that is not computed yet."""

import io
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

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
    """One operation of a traced function, and the shapes of what goes in and comes out."""

    name: str
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]


def traced(function: Callable[..., Any], *arguments: mx.array) -> list[Step]:
    """All operations of a function, those of its compiled parts one by one."""
    found: list[dict[str, Any]] = []
    mx.disable_compile()
    try:
        mx.export_function(found.append, function, *arguments)
    finally:
        mx.enable_compile()
    return [
        Step(step["name"], *([shape for _, shape, _ in step[k]] for k in ("inputs", "outputs")))
        for step in found
        if step["type"] == "primitive"
    ]
