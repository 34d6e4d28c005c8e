"""``add``, ``split`` and ``merge``: new model directories of the parts of others.

What they are made of stays as it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.bank import Bank, Manifest
from mlx_hmem.bank.documents import DOCUMENTS, Document, read_documents, write_documents
from mlx_hmem.bank.format import GENERIC, MANIFEST, Level, Shard
from mlx_hmem.bank.views import VIEWS, Barred, Views, check_name, of_bank, write_views
from mlx_hmem.bank.writer import Cut, checksum_of_zeros, shard_cuts, write_manifest
from mlx_hmem.bank_tools.contents import OpenBank, views_of
from mlx_hmem.bank_tools.folders import (
    added_folder,
    bytes_of,
    link_bank,
    link_model,
    write_level_shard,
)
from mlx_hmem.config import ClusterPath, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, link_or_copy, write_atomic
from mlx_hmem.folders import whole_folder
from mlx_hmem.memory import initial_block
from mlx_hmem.model.find import BANK_FOLDER, BESIDE
from mlx_hmem.model.load import check_beside
from mlx_hmem.retriever import ClusterTree


def add(folder: Path, banks: Sequence[OpenBank], other: OpenBank, name: str, out: Path) -> str:
    """``folder`` with the bank ``other`` beside its own, under ``name``, in the new folder ``out``.

    Views that exist do not see it until they are unblocked.
    """
    check_name(name, "bank")
    if any(each.name == name for each in banks):
        raise UserError("a bank of this name is there already", name, "choose another --name")
    check_beside(banks[0].hmem, other.hmem, f"the bank in {other.folder}")
    views = views_of(folder, banks)
    with whole_folder(out) as part:
        link_model(folder, part, but=[f"{BANK_FOLDER}/{VIEWS}"] if views else [])
        link_bank(other.folder, added_folder(part, name))
        if views:
            write_views(
                part / BANK_FOLDER, {view: [*barred, (name,)] for view, barred in views.items()}
            )
    seen = f"; the views {', '.join(views)} do not see it until unblock" if views else ""
    return f"{out} has the bank {name} beside its own{seen}"


def split(folder: Path, opened: OpenBank, views: Views, path: ClusterPath, out: Path) -> str:
    """A model of the anchor in ``folder`` with the subtree at ``path`` alone, numbered anew.

    Above the subtree each level has its one cluster and, since a tree has two at least, one that no
    text reaches and whose block is a hole.
    """
    bank = opened.bank
    path = bank.config.check_path(path, whole=False)
    if not opened.tree.counts[len(path) - 1][path[-1]]:
        raise UserError("no text reaches this cluster", path, "choose another; inspect names them")
    old = bank.config
    width = (2,) * len(path) + old.branching[len(path) :]
    config = replace(old, branching=width)
    with whole_folder(out) as part:
        link_model(
            folder,
            part,
            but=["hmem.json", BANK_FOLDER, BESIDE, "retriever/tree.safetensors"],
        )
        tree = part / "retriever" / "tree.safetensors"
        _subtree(opened.tree, old, path, width).save(tree, str(opened.tree.encoder_hash))
        tree_hash = fingerprint(tree)
        manifest = _write_subtree(opened, path, config, tree_hash, part / BANK_FOLDER)
        retriever = replace(opened.hmem.retriever, tree_hash=tree_hash)
        hmem = replace(opened.hmem, memory=config, retriever=retriever)
        write_atomic(part / "hmem.json", hmem.to_json())
        if views:
            write_views(part / BANK_FOLDER, _views_below(opened, views, path))
        documents = list(_documents_below(opened, path))
        if documents:
            write_documents(part / BANK_FOLDER, documents)
    count = sum(len(level.shards) for level in manifest.all_levels)
    return f"{out} has the subtree {path} alone, in {count} files; {len(documents)} documents"


def clusters_on(config: MemoryConfig, path: ClusterPath, level: int) -> range:
    """The clusters of ``level`` that lie on the path or below it; all of them for (); level 0 is
    the generic memory."""
    if level == GENERIC:
        return range(1)
    if not path:
        return range(config.num_clusters[level - 1])
    if level <= len(path):
        return range(path[level - 1], path[level - 1] + 1)
    count = int(np.prod(config.branching[len(path) : level]))
    return range(path[-1] * count, (path[-1] + 1) * count)


def _subtree(
    tree: ClusterTree, config: MemoryConfig, path: ClusterPath, width: tuple[int, ...]
) -> ClusterTree:
    """The tree of the subtree; ``config``: that of the whole bank, ``width``: the new branching."""
    total = tree.counts[len(path) - 1][path[-1]]
    centroids, counts = [], []
    for level in range(1, len(width) + 1):
        size = int(np.prod(width[:level]))
        rows = np.array(clusters_on(config, path, level))
        centroids.append(np.zeros((size, tree.dim), np.float32))
        centroids[-1][: len(rows)] = tree.centroids[level - 1][rows]
        counts.append(np.zeros(size, np.int64))
        counts[-1][: len(rows)] = total if level < len(path) else tree.counts[level - 1][rows]
    return ClusterTree(width, centroids, counts, tree.seed)


def _write_subtree(
    opened: OpenBank, path: ClusterPath, config: MemoryConfig, tree_hash: str, target: Path
) -> Manifest:
    bank, old = opened.bank, opened.bank.manifest
    levels: dict[int, Level] = {GENERIC: old.generic}
    link_or_copy(
        opened.folder / BANK_FOLDER / old.generic.shards[0].file,
        target / old.generic.shards[0].file,
    )
    for level in old.levels:
        clusters, number = clusters_on(bank.config, path, level.level), level.level

        def block(cluster: int, clusters: range = clusters, number: int = number) -> Any:
            if cluster >= len(clusters):
                return None
            return bytes_of(bank.stored(number, clusters[cluster]))

        layout = replace(level, shards=())
        cuts = tqdm(
            shard_cuts(layout, config.num_clusters[number - 1]),
            desc=f"level {number}", unit="file", delay=2,
        )  # fmt: skip
        shards = [write_level_shard(target, old, layout, cut, block) for cut in cuts]
        levels[number] = replace(layout, shards=tuple(shards))
    hashes = (bank.anchor_hash, tree_hash)
    return write_manifest(target, config, levels, old.dtype, old.quantization, *hashes)


def _documents_below(opened: OpenBank, path: ClusterPath) -> Iterator[Document]:
    """The documents that trained leaves of the subtree, with those leaves as they are called now;
    of their tokens the share of these leaves."""
    config = opened.bank.config
    for document in read_documents(opened.folder / BANK_FOLDER, config):
        leaves = [leaf for leaf in document.clusters if leaf[: len(path)] == path]
        if leaves:
            starts = [clusters_on(config, path, n)[0] for n in range(1, config.num_levels + 1)]
            moved = tuple(
                tuple(c - s for c, s in zip(leaf, starts, strict=True)) for leaf in leaves
            )
            share = round(document.tokens * len(leaves) / len(document.clusters))
            yield replace(document, clusters=moved, tokens=share)


def _views_below(opened: OpenBank, views: Views, path: ClusterPath) -> Views:
    """What each view bars of the subtree, as its clusters are called now."""
    config = opened.bank.config
    starts = [clusters_on(config, path, level)[0] for level in range(1, config.num_levels + 1)]

    def moved(barred: Sequence[Barred]) -> list[Barred]:
        paths = of_bank(barred, opened.name)
        if paths is None:
            return [(0,)]  # all of that bank
        return [
            tuple(c - s for c, s in zip(each, starts, strict=False))
            for each in paths
            if all(a == b for a, b in zip(each, path, strict=False))
        ]

    return {name: moved(barred) for name, barred in views.items()}


def merge(first: OpenBank, second: OpenBank, out: Path) -> str:
    """One model of two whose banks have the same anchor and tree, and trained other subtrees.

    Of each block that one has trained and the other not, the trained one is taken. Raises UserError
    where both have trained a block and differ.
    """
    _check_same(first, second)
    choice = _choose(first.bank, second.bank)
    with whole_folder(out) as part:
        link_model(
            first.folder,
            part,
            but=[
                f"{BANK_FOLDER}/{MANIFEST}",
                f"{BANK_FOLDER}/{DOCUMENTS}",
                *_shard_names(first.bank.manifest),
            ],
        )
        _write_merged(first, second, choice, part / BANK_FOLDER)
        documents = _all_documents(first, second)
        if documents:
            write_documents(part / BANK_FOLDER, documents)
    return f"{out}: {len(choice)} blocks of {second.folder}, all others of {first.folder}"


def _shard_names(manifest: Manifest) -> list[str]:
    return [f"{BANK_FOLDER}/{shard.file}" for level in manifest.levels for shard in level.shards]


def _check_same(first: OpenBank, second: OpenBank) -> None:
    for what, mine, theirs in (
        ("anchor", first.bank.anchor_hash, second.bank.anchor_hash),
        ("cluster tree", first.bank.tree_hash, second.bank.tree_hash),
        ("memory", first.bank.config, second.bank.config),
        ("dtype", first.bank.dtype, second.bank.dtype),
        ("quantisation", first.bank.manifest.quantization, second.bank.manifest.quantization),
    ):
        if mine != theirs:
            raise UserError(
                f"the two banks have another {what}",
                f"{mine} and {theirs}",
                "merge banks of one anchor and tree; add puts others side by side",
            )


def checksums(bank: Bank, level: Level) -> list[str]:
    """Of every block of a level, in order."""
    text = "".join(shard.xxh3 for shard in level.shards)
    return [text[at : at + 16] for at in range(0, len(text), 16)]


def _choose(first: Bank, second: Bank) -> set[tuple[int, int]]:
    """The blocks to take from the second bank. What differs is read, nothing else."""
    taken, conflicts = set(), []
    for mine, theirs in zip(first.manifest.levels, second.manifest.levels, strict=True):
        zeros = checksum_of_zeros(mine.block_bytes)
        pairs = zip(checksums(first, mine), checksums(second, theirs), strict=True)
        differ = [(cluster, a, b) for cluster, (a, b) in enumerate(pairs) if a != b]
        silent = silent_values(first.config, mine.level)
        for cluster, a, b in tqdm(differ, desc=f"level {mine.level}", unit="block", delay=2):
            key = (mine.level, cluster)
            if b == zeros or _is_untrained(second, key, silent):
                continue
            if a != zeros and not _is_untrained(first, key, silent):
                conflicts.append(key)
            taken.add(key)
    if conflicts:
        level, cluster = conflicts[0]
        raise UserError(
            f"{len(conflicts)} blocks were trained in both banks and differ",
            f"the first is level {level}, cluster {cluster}",
            "put one bank beside the other with add, or train them as one",
        )
    return taken


def silent_values(config: MemoryConfig, level: int) -> mx.array:
    """Which values of a block must be other than zero for it to have an effect on the anchor: those
    that are zero before training."""
    return mx.array(initial_block(config, config.r[level - 1], np.random.default_rng(0)) == 0)


def _is_untrained(bank: Bank, key: tuple[int, int], silent: mx.array) -> bool:
    (block,) = bank.blocks([key])
    return not mx.any(mx.where(silent, block, 0)).item()


def _write_merged(
    first: OpenBank, second: OpenBank, choice: set[tuple[int, int]], target: Path
) -> None:
    manifest = first.bank.manifest
    levels: dict[int, Level] = {GENERIC: manifest.generic}
    for level in manifest.levels:
        shards: list[Shard] = []
        bar = tqdm(level.shards, desc=f"level {level.level}", unit="file", delay=2)
        for index, shard in enumerate(bar):
            shards.append(_merged_shard(first, second, choice, level, index, shard, target))
        levels[level.level] = replace(level, shards=tuple(shards))
    hashes = (first.bank.anchor_hash, first.bank.tree_hash)
    write_manifest(
        target, first.bank.config, levels, manifest.dtype, manifest.quantization, *hashes
    )


def _merged_shard(
    first: OpenBank,
    second: OpenBank,
    choice: set[tuple[int, int]],
    level: Level,
    index: int,
    shard: Shard,
    target: Path,
) -> Shard:
    """A shard linked where none of its blocks is the second bank's, else written anew."""
    clusters = range(shard.first_cluster, shard.first_cluster + shard.num_clusters)
    if not any((level.level, cluster) in choice for cluster in clusters):
        link_or_copy(first.folder / BANK_FOLDER / shard.file, target / shard.file)
        return shard

    def block(cluster: int) -> list[memoryview]:
        key = (level.level, cluster)
        return bytes_of((second if key in choice else first).bank.stored(*key))

    cut = Cut(index, shard.first_cluster, shard.num_clusters)
    return write_level_shard(target, first.bank.manifest, replace(level, shards=()), cut, block)


def _all_documents(first: OpenBank, second: OpenBank) -> list[Document]:
    found: dict[str, Document] = {}
    for opened in (first, second):
        for document in read_documents(opened.folder / BANK_FOLDER, opened.bank.config):
            before = found.get(document.sha256, document)
            clusters = tuple(dict.fromkeys((*before.clusters, *document.clusters)))
            found[document.sha256] = replace(before, clusters=clusters)
    return list(found.values())
