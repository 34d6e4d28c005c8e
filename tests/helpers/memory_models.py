"""An anchor's folder with a memory of any kind, and what it says with a memory attached."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from mlx_hmem.anchors.attach import attach_memory, memory_config
from mlx_hmem.anchors.load import (
    anchor_hash,
    anchor_of_config,
    load_anchor,
    read_config,
    text_hashes,
)
from mlx_hmem.bank import Bank
from mlx_hmem.config import HmemConfig
from tests.conftest import MEMORY, save_bank

PATH, BRANCHING = (2, 5, 11), MEMORY.branching
PROMPT, COUNT = [3, 1, 41, 5, 9, 26], 12


def add_memory(
    folder: Path,
    trained: Path,
    kind: str,
    layers: Sequence[int] | None = None,
    targets: tuple[str, ...] | None = None,
    **options: Any,
) -> Path:
    """Puts a random memory into an anchor's folder, with the retriever of the model ``trained``."""
    anchor = anchor_of_config(read_config(folder))
    config = memory_config(anchor, (4, 0, 3), BRANCHING, kind, layers, targets)
    hmem = HmemConfig.from_file(trained / "hmem.json")
    hmem = replace(hmem, memory=config, anchor_hash=anchor_hash(folder), tokenizer_hash=None)
    hmem = replace(hmem, **text_hashes(folder))
    shutil.copytree(trained / "retriever", folder / "retriever")
    tree = hmem.retriever.tree_hash
    save_bank(folder / "bank", config, hmem.anchor_hash, tree, **{"size": 0.3} | options)
    (folder / "hmem.json").write_text(hmem.to_json())
    return folder


def attached(folder: Path, path: Sequence[int] | None = PATH) -> tuple[Any, Any, Any]:
    """The anchor, the slot that it reads its memory from, and the rows of a path for it."""
    anchor, _ = load_anchor(folder)
    with Bank.open(folder / "bank") as bank:
        memory = bank.generic() if path is None else bank.fetch(tuple(path))
        slot = attach_memory(anchor, bank.config)
    return anchor, slot, memory.rows


def attached_logits(folder: Path, ids: mx.array, path: Sequence[int] | None = PATH) -> np.ndarray:
    anchor, slot, rows = attached(folder, path)
    with slot.using(rows):
        return np.array(anchor(ids).astype(mx.float32))


def attached_tokens(folder: Path) -> list[int]:
    """The likeliest tokens that follow the prompt, with the memory of PATH attached."""
    anchor, slot, rows = attached(folder)
    ids = list(PROMPT)
    with slot.using(rows):
        for _ in range(COUNT):
            ids.append(int(mx.argmax(anchor(mx.array([ids]))[0, -1]).item()))
    return ids[len(PROMPT) :]


def tokens_of_mlx_lm(folder: Path) -> list[int]:
    """As mlx-lm generates them with the model that it reads from a folder."""
    model, _ = load_model(folder)
    steps = generate_step(mx.array(PROMPT), model, max_tokens=COUNT)
    return [int(token) for token, _ in steps]
