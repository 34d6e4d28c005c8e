"""Random anchors and memories for the checks: no file, no download."""

from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_hmem.anchors.attach import MemorySlot, attach_memory, memory_config
from mlx_hmem.anchors.openlm import PRESETS, Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.memory import Floats, Rows, join_blocks

SMALL = replace(
    PRESETS["openlm-410m"], hidden_size=256, num_hidden_layers=4, intermediate_size=704,
    num_attention_heads=4, head_dim=64, vocab_size=1024,
)  # fmt: skip
LARGE = PRESETS["openlm-160m"]
PAPER = (256, 64, 16, 0)  # r of the 160M's levels (paper, section 6): 18M fetched parameters


class WithMemory(NamedTuple):
    anchor: Model
    config: MemoryConfig
    slot: MemorySlot

    def logits(self, ids: mx.array, rows: Rows | None) -> mx.array:
        with self.slot.using(rows):
            return self.anchor(ids)


def make(args: ModelArgs, kind: str, r: tuple[int, ...], dtype: mx.Dtype) -> WithMemory:
    """The same weights for the same sizes, on every device."""
    mx.random.seed(0)
    with mx.stream(mx.cpu):
        anchor = Model(args)
        anchor.update(tree_map(lambda array: array.astype(dtype), anchor.parameters()))
        mx.eval(anchor.parameters())
    targets = ("query", "down") if kind == "lora" else None
    config = memory_config(anchor, r, (2,) * len(r), kind, targets=targets)
    return WithMemory(anchor, config, attach_memory(anchor, config))


def blocks(config: MemoryConfig, seed: int, dtype: mx.Dtype) -> list[mx.array]:
    """One block for each level that has any, large enough to change what the anchor says."""
    rng = np.random.default_rng(seed)
    shapes = [config.shape_of(r) for r in config.r if r]
    return [mx.array(0.15 * rng.standard_normal(s, np.float32)).astype(dtype) for s in shapes]


def rows(config: MemoryConfig, seed: int, dtype: mx.Dtype) -> Floats:
    return join_blocks(blocks(config, seed, dtype), config)


def is_gpu() -> bool:
    return bool(mx.default_device().type == mx.gpu)


def native() -> mx.Dtype:
    """In which models run on this device."""
    return mx.bfloat16 if is_gpu() else mx.float32
