"""The export stage: a finished run becomes a model directory (``FOLDER/model``).

The anchor's parts are copied as they are, the trained blocks become a bank, and ``hmem.json`` ties
them together by their fingerprints.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from mlx_hmem.anchors.load import anchor_hash
from mlx_hmem.bank import write_bank
from mlx_hmem.config import FORMAT_VERSION, HmemConfig, RetrieverConfig
from mlx_hmem.files import fingerprint, sync_folder, write_atomic
from mlx_hmem.retriever import load_encoder
from train.arms import trained_blocks
from train.recipe import Recipe

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def run_export(recipe: Recipe, folder: Path) -> None:
    """Builds the model directory beside its place and renames it when it is whole."""
    target, part = folder / "model", folder / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    copy_anchor(folder / "anchor", folder / "tokenizer", part)
    (part / "retriever").mkdir()
    shutil.copyfile(folder / "tree" / "tree.safetensors", part / "retriever" / "tree.safetensors")
    hmem = HmemConfig(
        format_version=FORMAT_VERSION,
        memory=recipe.memory_config,
        retriever=RetrieverConfig(
            encoder=recipe.tree.encoder,
            encoder_hash=load_encoder(recipe.tree.encoder).fingerprint,
            tree_hash=fingerprint(part / "retriever" / "tree.safetensors"),
        ),
        anchor_hash=anchor_hash(part),
    )
    blocks = trained_blocks(folder / "memories")
    levels = [
        np.array(blocks[level]) if level in blocks else None
        for level in range(1, recipe.memory_config.num_levels + 1)
    ]
    generic = np.array(trained_blocks(folder / "generic")[1][0])
    write_bank(
        part / "bank",
        recipe.memory_config,
        levels,
        generic,
        dtype=recipe.export.dtype,
        anchor_hash=hmem.anchor_hash,
        tree_hash=hmem.retriever.tree_hash,
    )
    write_atomic(part / "hmem.json", hmem.to_json())
    shutil.rmtree(target, ignore_errors=True)
    os.rename(part, target)
    sync_folder(folder)
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"export: a model of {size / 1e6:.1f} MB in {target}")


def copy_anchor(anchor: Path, tokenizer: Path, target: Path) -> None:
    """An anchor with its tokenizer as a model directory of its own."""
    target.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(anchor / name, target / name)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer / name, target / name)
