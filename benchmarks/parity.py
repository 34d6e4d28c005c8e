"""How far we are from numbers made elsewhere, and from ourselves computed another way: the figures
of docs/parity.md. ``python -m benchmarks.parity [--fixtures FOLDER] [--json]``

FOLDER is one with ``openlm_tiny_*.npz`` and ``minilm_golden.*``: the largest absolute
differences from what PyTorch and sentence-transformers made. Without it only the second part:

Every architecture with every kind of memory, tiny random anchors of mlx-lm's own classes, float32.
For each the greatest difference in the logits: the memory at its start against the anchor alone, a
random memory against the anchor whose weights or attention were changed by hand, a row of a batch
with memories of its own against the row alone; the gradient of the memory against finite
differences in float64, as a ratio; and what the random memory changes in the logits.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tqdm import tqdm

from benchmarks.common.show import Result, benchmark
from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.config import KINDS
from mlx_hmem.errors import UserError
from mlx_hmem.memory import initial_block, join_blocks
from mlx_hmem.retriever import load_encoder
from tests.helpers.references import (
    PAIRS,
    apply_reference,
    config_of,
    difference,
    gradient_errors,
    make_ids,
    minilm_differences,
    openlm_differences,
    random_rows,
    switch_rope_off,
)
from tests.helpers.tiny_anchors import EXPERTS, make_anchor


def openlm(folder: Path, head: str) -> dict[str, float]:
    """Logits, loss and every gradient of a tiny OpenLM against PyTorch's."""
    path = folder / f"openlm_tiny_ln_{head}.npz"
    if not path.exists():
        raise UserError("no golden numbers", path, "name the folder that holds them")
    return openlm_differences(path, tied=head == "tied")


def minilm(folder: Path) -> dict[str, float]:
    """Token ids and vectors of MiniLM against sentence-transformers'."""
    _, found = minilm_differences(load_encoder("minilm"), folder / "minilm_golden.npz")
    return found


def attached(name: str, kind: str) -> dict[str, float | None]:
    ids, anchor, other = make_ids(), make_anchor(name), make_anchor(name)
    if kind == "kv":
        switch_rope_off(anchor)
        switch_rope_off(other)
    alone, config = np.array(anchor(ids)), config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    start = [mx.array(initial_block(config, r, np.random.default_rng(r))) for r in (4, 3)]
    memories = [random_rows(config, seed, size=0.15) for seed in range(2)]
    together = tuple(mx.stack(list(groups)) for groups in zip(*memories, strict=True))

    def logits(rows: Any, ids: mx.array = ids) -> np.ndarray:
        with slot.using(rows):
            return np.array(anchor(ids))

    first, second, batch = logits(memories[0]), logits(memories[1], ids[1:]), logits(together)
    with pytest.MonkeyPatch.context() as patch:
        apply_reference(other, name, kind, memories[0], patch.setattr)
        reference = np.array(other(ids))
    return {
        "start": difference(logits(join_blocks(start, config)), alone),
        "patched": difference(first, reference),
        "batch_row": max(difference(batch[:1], first[:1]), difference(batch[1:], second)),
        # Experts know float32 only.
        "gradient": None if name in EXPERTS else max(gradient_errors(name, kind)),
        "changes": difference(first, alone),
    }


def measure(fixtures: Path | None = None) -> Result:
    result: Result = {}
    if fixtures is not None:
        heads = {f"{head} head": openlm(fixtures, head) for head in ("tied", "sep")}
        result["OpenLM against PyTorch"] = heads
        result["MiniLM against sentence-transformers"] = minilm(fixtures)
    found = {(name, kind): attached(name, kind) for name, kind in tqdm(PAIRS)}
    result["memory"] = {f"{name}, {kind}": row for (name, kind), row in found.items()}
    result["the largest"] = {
        kind: {
            column: max(row[column] or 0.0 for (_, k), row in found.items() if k == kind)
            for column in ("start", "patched", "batch_row", "gradient")
        }
        for kind in KINDS
    }
    return result


if __name__ == "__main__":
    benchmark(__doc__, measure)
