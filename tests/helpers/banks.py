"""A model directory that knows what trained it, and commands of mlx_hmem.bank run on it."""

import hashlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlx_hmem.bank import Bank, write_bank
from mlx_hmem.bank.documents import Document
from mlx_hmem.bank_tools.command import main
from mlx_hmem.errors import UserError
from tests.conftest import MEMORY


def document(text: str, paths, model) -> Document:
    words = tuple(sorted(set(re.findall("[a-z]{5,}", text.lower())))[:8])
    sha = hashlib.sha256(text.encode()).hexdigest()
    return Document(sha, text[:20], len(model.tokenizer.encode(text)), tuple(paths), words)


def said(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(*words) -> str:
    with pytest.raises(UserError) as error:
        main([str(word) for word in words])
    assert "\n" not in str(error.value)
    return str(error.value)


def blocks_of(bank: Bank) -> dict[tuple[int, int], np.ndarray]:
    keys = [(level.level, cluster) for level in bank.manifest.all_levels
            for cluster in range(sum(s.num_clusters for s in level.shards))]  # fmt: skip
    return {key: np.array(bank.blocks([key])[0]) for key in keys}


def flip_block(folder: Path, model) -> None:
    """Another block of level 1, cluster 0, with its checksum."""
    with Bank.open(folder / "bank") as bank:
        blocks, hashes = blocks_of(bank), (bank.anchor_hash, bank.tree_hash)
    blocks[1, 0] = blocks[1, 0] + np.float32(0.5)
    shutil.rmtree(folder / "bank")
    levels = [[blocks[n, c] for c in range(count)] if MEMORY.r[n - 1] else None
              for n, count in enumerate(MEMORY.num_clusters, 1)]  # fmt: skip
    write_bank(folder / "bank", MEMORY, levels, blocks[0, 0], dtype="float32",
               anchor_hash=hashes[0], tree_hash=hashes[1])  # fmt: skip
