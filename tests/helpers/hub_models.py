"""A model cut into many shards, and what the tests of the Hub ask of it."""

import shutil
from pathlib import Path

import numpy as np

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.bank import Bank, write_bank
from mlx_hmem.bank.format import PAGE
from mlx_hmem.config import HmemConfig
from mlx_hmem.model.model import MemoryModel
from tests.conftest import MEMORY, save_anchor

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
    with Bank.open(folder / "bank") as bank:
        levels = [
            None if not r else [np.array(bank.blocks([(n, c)])[0]) for c in range(count)]
            for n, (r, count) in enumerate(zip(MEMORY.r, MEMORY.num_clusters, strict=True), 1)
        ]
        generic = np.array(bank.blocks([(0, 0)])[0])
        hashes = {"anchor_hash": bank.anchor_hash, "tree_hash": bank.tree_hash}
    shutil.rmtree(folder / "bank")
    write_bank(
        folder / "bank", MEMORY, levels, generic, dtype="float32", **hashes,
        shard_bytes=PAGE * (1 + blocks_per_shard),
    )  # fmt: skip


def blocks(model: MemoryModel, path: tuple[int, ...]) -> list[np.ndarray]:
    assert model.bank is not None
    return [np.array(block) for block in model.bank.fetch(path).blocks if block is not None]


def same(found: list[np.ndarray], wanted: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


def other_model(directory: Path) -> None:
    """Makes another model of a directory: other weights, another bank."""
    save_anchor(directory, seed=9)
    hmem = HmemConfig.from_file(directory / "hmem.json")
    rng = np.random.default_rng(9)
    levels = [
        [rng.normal(0, 1, MEMORY.block_shape(n)).astype(np.float32) for _ in range(count)]
        if MEMORY.r[n - 1]
        else None
        for n, count in enumerate(MEMORY.num_clusters, 1)
    ]
    shutil.rmtree(directory / "bank")
    hashes = {"anchor_hash": anchor_hash(directory), "tree_hash": hmem.retriever.tree_hash}
    write_bank(
        directory / "bank", MEMORY, levels, None, dtype="float32", **hashes,
        shard_bytes=PAGE * (1 + BLOCKS_PER_SHARD),
    )  # fmt: skip
    text = (directory / "hmem.json").read_text()
    (directory / "hmem.json").write_text(text.replace(hmem.anchor_hash, hashes["anchor_hash"]))
