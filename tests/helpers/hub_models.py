"""A model cut into many shards, and what the tests of the Hub ask of it."""

from pathlib import Path

import numpy as np

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.bank.format import PAGE
from mlx_hmem.config import HmemConfig
from mlx_hmem.model.model import MemoryModel
from tests.conftest import save_anchor
from tests.helpers.banks import rewrite

REPO = "user/tiny"
BASE = {
    "config.json", "hmem.json", "model.safetensors", "retriever/tree.safetensors", "bank/bank.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
}  # fmt: skip
BLOCKS_PER_SHARD = 2
FIRST, LAST = (0, 0, 0), (2, 5, 11)  # two paths without a shard in common
SHARDS = {
    FIRST: {"bank/level-1.00000.safetensors", "bank/level-3.00000.safetensors"},
    LAST: {"bank/level-1.00001.safetensors", "bank/level-3.00005.safetensors"},
}


def cut_bank(folder: Path, blocks_per_shard: int) -> None:
    """Writes the bank of a model anew, cut into small shards."""
    rewrite(folder, shard_bytes=PAGE * (1 + blocks_per_shard))


def blocks(model: MemoryModel, path: tuple[int, ...]) -> list[np.ndarray]:
    return [np.array(block) for block in model.bank.fetch(path).blocks if block is not None]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def other_model(directory: Path) -> None:
    """Makes another model of a directory: other weights, another bank."""
    save_anchor(directory, seed=9)
    hmem = HmemConfig.from_file(directory / "hmem.json")
    rng = np.random.default_rng(9)
    rewrite(
        directory, lambda n, c, block: rng.normal(0, 1, block.shape).astype(np.float32),
        anchor_hash=anchor_hash(directory), shard_bytes=PAGE * (1 + BLOCKS_PER_SHARD),
    )  # fmt: skip
    text = (directory / "hmem.json").read_text()
    text = text.replace(hmem.anchor_hash, anchor_hash(directory))
    (directory / "hmem.json").write_text(text)
