"""``python -m benchmarks.kinds [--json]``: every architecture with every kind of memory.

Tiny random anchors of mlx-lm's own classes, float32. For each the greatest difference in the
logits: the memory at its start against the anchor alone, a random memory against the anchor whose
weights or attention were changed by hand, a row of a batch with memories of its own against the row
alone; and the gradient of the memory against finite differences in float64, as a ratio.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx_hmem  # noqa: F401  (before mlx.core)

# isort: split
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.errors import ArgumentParser, run_program
from mlx_hmem.memory import initial_block, join_blocks
from tests.helpers.references import (
    PAIRS,
    apply_reference,
    config_of,
    gradient_errors,
    make_ids,
    random_rows,
    switch_rope_off,
)
from tests.helpers.tiny_anchors import EXPERTS, make_anchor


@contextmanager
def replacing() -> Iterator[Callable[..., None]]:
    """A function that sets attributes; they are put back at the end."""
    before: list[tuple[Any, str, Any]] = []

    def replace(target: Any, name: str, value: Any) -> None:
        before.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    try:
        yield replace
    finally:
        for target, name, value in reversed(before):
            setattr(target, name, value)


def furthest(a: mx.array, b: mx.array) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def measure(name: str, kind: str) -> dict[str, float | None]:
    ids, anchor, other = make_ids(), make_anchor(name), make_anchor(name)
    if kind == "kv":
        switch_rope_off(anchor)
        switch_rope_off(other)
    alone, config = anchor(ids), config_of(anchor, kind)
    mx.eval(alone)
    slot = attach_memory(anchor, config)
    start = [mx.array(initial_block(config, r, np.random.default_rng(r))) for r in (4, 3)]
    memories = [random_rows(config, seed, size=0.15) for seed in range(2)]
    together = tuple(mx.stack(list(groups)) for groups in zip(*memories, strict=True))
    with slot.using(join_blocks(start, config)):
        at_start = anchor(ids)
    with slot.using(memories[0]):
        attached = anchor(ids)
    with slot.using(together):
        batch = anchor(ids)
    with slot.using(memories[1]):
        second = anchor(ids[1:])
    mx.eval(at_start, attached, batch, second)
    with replacing() as replace:
        apply_reference(other, name, kind, memories[0], replace)
        reference = other(ids)
        mx.eval(reference)
    return {
        "start": furthest(at_start, alone),
        "patched": furthest(attached, reference),
        "batch_row": max(furthest(batch[:1], attached[:1]), furthest(batch[1:], second)),
        # Experts know float32 only.
        "gradient": None if name in EXPERTS else max(gradient_errors(name, kind)),
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.kinds", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args()
    results = [
        {"architecture": name, "kind": kind, **measure(name, kind)} for name, kind in tqdm(PAIRS)
    ]
    if args.json:
        print(json.dumps(results))
        return
    print("| architecture | kind | start | patched | batch row | gradient |")
    print("|---|---|---|---|---|---|")
    for result in results:
        shares = [result[key] for key in ("start", "patched", "batch_row", "gradient")]
        cells = ["–" if share is None else f"{share:.1e}" for share in shares]
        print(f"| {result['architecture']} | {result['kind']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_program(main)
