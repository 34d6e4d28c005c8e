"""Adapters beside one anchor as the blocks of a memory bank of one level, kind ``lora``.

The bank's patches are the union of the adapters', its rank is the greatest: what an adapter lacks
is zeros, which add nothing. A bank adds 2 · B A (docs/bank_format.md), so B is stored times half of
the adapter's own scale.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np

from mlx_hmem.anchors.attach import memory_config
from mlx_hmem.anchors.load import anchor_hash, anchor_of_config, read_config, text_hashes
from mlx_hmem.bank import Manifest, rewrite_bank
from mlx_hmem.bank.format import GENERIC
from mlx_hmem.bank.writer import planned_bytes
from mlx_hmem.bank_tools.folders import ANCHOR, model_files
from mlx_hmem.config import FORMAT_VERSION, PROJECTIONS, ClusterPath, HmemConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import link_or_copy, write_atomic
from mlx_hmem.folders import copy_missing
from mlx_hmem.memory import group_shapes, whole_block
from mlx_hmem.memory.lora import ALPHA
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.retriever import ClusterTree, load_encoder
from mlx_hmem.retriever.encoder import STATIC_FOLDER

from ..anchors.weights import Conversion
from ..memory.model import write_retriever
from ..memory.tensors import DTYPES
from .reading import Adapter, read_adapter


def from_adapters(
    folders: Mapping[str, Path], anchor: Path, texts: Mapping[str, Sequence[str]]
) -> Conversion:
    """Adapters by name on the anchor in a folder, as a model directory; headers alone are read.

    Args:
        texts: of each adapter, texts that belong to it, by which a prompt is routed; empty: the
            memories are chosen by name alone.

    Raises:
        UserError: an adapter that does not fit the anchor, or has what a patch cannot hold.
    """
    config = read_config(anchor)
    own = anchor_of_config(config)
    adapters = {name: read_adapter(folder, own) for name, folder in folders.items()}
    memory = _memory(own, list(adapters.values()))
    dtype, notes = _dtype(adapters)
    names: dict[str, ClusterPath] = {name: (cluster,) for cluster, name in enumerate(adapters)}
    files = {file: anchor / file for file in model_files(anchor, only=ANCHOR)}
    sources = [*files.values(), *(file for each in adapters.values() for file in each.sources)]

    def write(part: Path) -> None:
        (part / BANK_FOLDER).mkdir(exist_ok=True)  # else the anchor would load alone
        copy_missing(files, part, link_or_copy)
        tree = _tree(memory, list(texts.values())) if texts else None
        retriever = None if tree is None else write_retriever(None, tree, STATIC_FOLDER, part)
        hmem = HmemConfig(
            FORMAT_VERSION, memory, retriever, anchor_hash(part), **text_hashes(part), names=names
        )
        planned = Manifest.planned(memory, dtype, None, hmem.anchor_hash, hmem.tree_hash)
        by_cluster = list(adapters.values())

        def block(level: int, cluster: int) -> np.ndarray | None:
            given = level != GENERIC and cluster < len(by_cluster)
            return block_of(by_cluster[cluster], memory) if given else None

        rewrite_bank(part / BANK_FOLDER, planned, block)
        write_atomic(part / "hmem.json", hmem.to_json())

    need = planned_bytes(Manifest.planned(memory, dtype, None, "", ""))
    need += sum(file.stat().st_size for file in files.values()) + (8 << 20)
    how = "routed by texts, or chosen" if texts else "chosen"
    made = (
        f"{len(adapters)} adapters of rank {memory.r[0]} on {', '.join(memory.patched)} in {dtype}"
    )
    made += f", {how} by name: {', '.join(names)}"
    return Conversion(sources, need, notes, write, made, config)


def _memory(anchor: nn.Module, adapters: Sequence[Adapter]) -> MemoryConfig:
    used = {key for adapter in adapters for key in adapter.patches}
    layers = sorted({layer for layer, _ in used})
    return memory_config(
        anchor,
        r=[max(adapter.rank for adapter in adapters)],
        branching=[len(adapters)],
        kind="lora",
        layers=None if len(layers) == len(anchor.layers) else layers,
        targets=[name for name in PROJECTIONS if any(name == target for _, target in used)],
    )


def _dtype(adapters: Mapping[str, Adapter]) -> tuple[str, list[str]]:
    """The dtype in which every adapter is what it is, and what a user should know of it."""
    patches = [patch for each in adapters.values() for patch in each.patches.values()]
    found = {DTYPES.get(half.dtype, "float32") for p in patches for half in (p.a, p.b)}
    factors = {patch.scale / ALPHA for patch in patches}
    notes = [note for each in adapters.values() for note in each.notes]
    rounded = sorted(f for f in factors if f and abs(math.frexp(f)[0]) != 0.5)
    if rounded:
        shown = ", ".join(f"{factor:g}" for factor in rounded[:5])
        notes.append(f"B times {shown}, no power of two, is rounded to float32")
    # Half of a float16 is not always one.
    exact = len(found) == 1 and not rounded and (found != {"float16"} or factors == {1.0})
    return (found.pop() if exact else "float32"), notes


def block_of(adapter: Adapter, memory: MemoryConfig) -> np.ndarray:
    """The adapter as a float32 block."""
    groups = [np.zeros(shape, np.float32) for shape in group_shapes(memory, memory.r[0])]
    places = {
        name: (group, place)
        for group, names in zip(groups, memory.matrices.values(), strict=True)
        for place, name in enumerate(names)
    }
    layers = {index: place for place, index in enumerate(memory.memory_layers)}
    for (layer, target), (a, b, scale) in adapter.patches.items():
        for name, tensor, factor in (("a", a, 1.0), ("b", b, scale / ALPHA)):
            group, place = places[f"{target}_{name}"]
            rows = tensor.numbers().astype(np.float32)
            if not np.isfinite(rows).all():
                what = f"the adapter {adapter.folder.name} has numbers that are not finite"
                raise UserError(what, f"{name} of {target}, layer {layer}", "train it again")
            group[layers[layer], place, : len(rows)] = rows * np.float32(factor)
    return whole_block(groups)


def _tree(memory: MemoryConfig, texts: Sequence[Sequence[str]]) -> ClusterTree:
    """A tree of one level whose centroids are the means of each adapter's texts."""
    encoder = load_encoder("static")
    centroids = np.zeros((memory.branching[0], encoder.dim), np.float32)
    counts = np.zeros(memory.branching[0], np.int64)
    for cluster, own in enumerate(texts):
        centroids[cluster] = encoder.encode(own, progress=True).mean(axis=0)
        counts[cluster] = len(own)
    return ClusterTree(memory.branching, [centroids], [counts], 0)


def check_texts(name: str, texts: Sequence[str]) -> list[str]:
    """Those that are not empty; UserError where there is none."""
    found = [text for text in texts if text.strip()]
    if not found:
        raise UserError("no texts to route by", name, "give files with texts, or leave --texts out")
    return found
