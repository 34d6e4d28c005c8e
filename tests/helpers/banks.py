"""A model directory that knows what trained it, and commands of mlx_hmem.bank run on it."""

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_hmem.bank import Bank
from mlx_hmem.bank.documents import Document
from mlx_hmem.bank_tools.command import main
from mlx_hmem.config import HmemConfig
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.model.load import load
from mlx_hmem.retriever import ClusterTree
from tests.conftest import MEMORY, save_bank
from tests.helpers import programs
from tests.helpers.write_bank import write_bank


def document(text: str, paths, model) -> Document:
    words = tuple(sorted(set(re.findall("[a-z]{5,}", text.lower())))[:8])
    sha = hashlib.sha256(text.encode()).hexdigest()
    return Document(sha, text[:20], len(model.tokenizer.encode(text)), tuple(paths), words)


def write_colleague(model_folder: Path, texts: list[str], folder: Path) -> Path:
    """A model of the same anchor and encoder, with a tree and a bank of another shape."""
    shutil.copytree(model_folder, folder)
    hmem = HmemConfig.from_file(folder / "hmem.json")
    file = folder / "retriever" / "tree.safetensors"
    encoder = load(model_folder).retriever.encoder
    ClusterTree.fit(encoder.encode(texts[:3]), branching=(2,)).save(file, encoder.fingerprint)
    memory = replace(MEMORY, r=(5,), branching=(2,))
    retriever = replace(hmem.retriever, tree_hash=fingerprint(file))
    save_bank(folder / "bank", memory, hmem.anchor_hash, retriever.tree_hash)
    write_atomic(folder / "hmem.json", replace(hmem, memory=memory, retriever=retriever).to_json())
    return folder


def said(capsys, *words) -> str:
    main([str(word) for word in words])
    return capsys.readouterr().out


def refused(*words) -> str:
    return programs.refused("", main, [str(word) for word in words])


def blocks_of(bank: Bank) -> dict[tuple[int, int], np.ndarray]:
    keys = [(level.level, cluster) for level in bank.manifest.all_levels
            for cluster in range(sum(s.num_clusters for s in level.shards))]  # fmt: skip
    return {key: np.array(bank.blocks([key])[0]) for key in keys}


Change = Callable[[int, int, np.ndarray], np.ndarray]


def rewrite(folder: Path, change: Change = lambda level, cluster, block: block, **options) -> None:
    """Writes the bank of a model anew, each block as ``change(level, cluster, block)`` gives it."""
    with Bank.open(folder / "bank") as bank:
        config, old = bank.config, blocks_of(bank)
        options = {"anchor_hash": bank.anchor_hash, "tree_hash": bank.tree_hash} | options
    new = {key: change(*key, block) for key, block in old.items()}
    shutil.rmtree(folder / "bank")
    sizes = enumerate(zip(config.r, config.num_clusters, strict=True), 1)
    levels = [[new[n, c] for c in range(count)] if r else None for n, (r, count) in sizes]
    write_bank(folder / "bank", config, levels, new[0, 0], dtype="float32", **options)


def flip_block(folder: Path) -> None:
    """Another block of level 1, cluster 0, with its checksum."""
    more = np.float32(0.5)
    rewrite(folder, lambda n, c, block: block + more if (n, c) == (1, 0) else block)
