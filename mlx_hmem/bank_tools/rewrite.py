"""``add``, ``split`` and ``merge``: new model directories of the parts of others.

What they are made of stays as it is.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.bank import Bank, Manifest
from mlx_hmem.bank.documents import Document, read_documents, write_documents
from mlx_hmem.bank.format import GENERIC
from mlx_hmem.bank.views import VIEWS, Barred, Views, check_name, of_bank, write_views
from mlx_hmem.bank.writer import Given, rewrite_bank, stored_bytes
from mlx_hmem.bank_tools.compare import unlike
from mlx_hmem.bank_tools.contents import OpenBank, views_of
from mlx_hmem.bank_tools.folders import BANK, MEMORY, TREE, link_model
from mlx_hmem.config import ClusterPath, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.folders import whole_folder
from mlx_hmem.memory import initial_block
from mlx_hmem.model.find import BANK_FOLDER, BESIDE
from mlx_hmem.model.load import check_beside
from mlx_hmem.retriever import ClusterTree


def add(folder: Path, banks: Sequence[OpenBank], other: OpenBank, name: str, out: Path) -> str:
    """``folder`` with the bank ``other`` beside its own, under ``name``, in the new folder ``out``.

    Views that exist do not see it until they are unblocked.
    """
    name = check_name(name, "bank")
    if any(each.name == name for each in banks):
        raise UserError("a bank of this name is there already", name, "choose another --name")
    check_beside(banks[0].hmem, other.hmem, f"the bank in {other.folder}")
    views = views_of(folder, banks)
    with whole_folder(out) as part:
        link_model(folder, part, but=[f"{BANK_FOLDER}/{VIEWS}"] if views else [])
        link_model(other.folder, part / BESIDE / name, only=MEMORY)
        if views:
            write_views(
                part / BANK_FOLDER, {view: [*barred, (name,)] for view, barred in views.items()}
            )
    seen = f"; the views {', '.join(views)} do not see it until unblock" if views else ""
    return f"{out} has the bank {name} beside its own{seen}"


def split(folder: Path, opened: OpenBank, views: Views, path: ClusterPath, out: Path) -> str:
    """A model of the anchor in ``folder`` with the subtree at ``path`` alone, numbered anew."""
    bank = opened.bank
    path = bank.config.check_path(path, whole=False)
    if not opened.tree.counts[len(path) - 1][path[-1]]:
        raise UserError(
            "no text reaches this cluster", path, "choose another; mlx_hmem.bank inspect names them"
        )
    old = bank.config
    width = (1,) * len(path) + old.branching[len(path) :]
    config = replace(old, branching=width)
    with whole_folder(out) as part:
        link_model(folder, part, but=["hmem.json", f"{BANK_FOLDER}/*", f"{BESIDE}/*", TREE])
        tree = part / TREE
        _subtree(opened.tree, old, path, width).save(tree, str(opened.tree.encoder_hash))
        tree_hash = fingerprint(tree)
        manifest = _write_subtree(opened, path, config, tree_hash, part / BANK_FOLDER)
        retriever = replace(opened.hmem.routed, tree_hash=tree_hash)
        names = _names_below(opened, path)
        hmem = replace(opened.hmem, memory=config, retriever=retriever, names=names)
        write_atomic(part / "hmem.json", hmem.to_json())
        if views:
            write_views(part / BANK_FOLDER, _views_below(opened, views, path))
        documents = list(_documents_below(opened, path))
        if documents:
            write_documents(part / BANK_FOLDER, documents)
    count = f"{len(manifest.shards)} files; {len(documents)} documents"
    return f"{out} has the subtree {path} alone, in {count}"


def _subtree(
    tree: ClusterTree, config: MemoryConfig, path: ClusterPath, width: tuple[int, ...]
) -> ClusterTree:
    """The tree of the subtree; ``config``: that of the whole bank, ``width``: the new branching."""
    total = tree.counts[len(path) - 1][path[-1]]
    centroids, counts = [], []
    for level in range(1, len(width) + 1):
        rows = np.array(config.clusters_on(path, level))
        centroids.append(tree.centroids[level - 1][rows])
        own = tree.counts[level - 1][rows]
        counts.append(np.full_like(own, total) if level < len(path) else own)
    return ClusterTree(width, centroids, counts, tree.seed)


def _write_subtree(
    opened: OpenBank, path: ClusterPath, config: MemoryConfig, tree_hash: str, target: Path
) -> Manifest:
    bank, old = opened.bank, opened.bank.manifest

    def block(level: int, cluster: int) -> Given:
        if level == GENERIC:
            return "keep"
        return stored_bytes(bank, level, bank.config.clusters_on(path, level)[cluster])

    hashes = (bank.anchor_hash, tree_hash)
    planned = Manifest.planned(config, old.dtype, old.quantization, *hashes)
    return rewrite_bank(target, planned, block, opened.folder / BANK_FOLDER)


def _documents_below(opened: OpenBank, path: ClusterPath) -> Iterator[Document]:
    """The documents that trained leaves of the subtree, with those leaves as they are called now;
    of their tokens the share of these leaves."""
    for document in read_documents(opened.folder / BANK_FOLDER, opened.bank.config):
        leaves = [leaf for leaf in document.clusters if leaf[: len(path)] == path]
        if leaves:
            moved = {_moved(opened, path, leaf): document.taught.get(leaf) for leaf in leaves}
            share = round(document.tokens * len(leaves) / len(document.clusters))
            yield replace(document.of_leaves(moved), tokens=share)


def _moved(opened: OpenBank, path: ClusterPath, cluster: ClusterPath) -> ClusterPath:
    """The path to a cluster above or below ``path`` as it is called in that subtree alone."""
    starts = (opened.bank.config.clusters_on(path, n)[0] for n in range(1, len(cluster) + 1))
    return tuple(c - start for c, start in zip(cluster, starts, strict=True))


def _names_below(opened: OpenBank, path: ClusterPath) -> dict[str, ClusterPath] | None:
    """The names of memories in the subtree, None without any."""
    names = (opened.hmem.names or {}).items()
    return {n: _moved(opened, path, own) for n, own in names if own[: len(path)] == path} or None


def _views_below(opened: OpenBank, views: Views, path: ClusterPath) -> Views:
    """What each view bars of the subtree, as its clusters are called now."""

    def moved(barred: Sequence[Barred]) -> list[Barred]:
        paths = of_bank(barred, opened.name)
        if paths is None:
            return [(0,)]  # all of that bank
        near = [p for p in paths if all(a == b for a, b in zip(p, path, strict=False))]
        return [_moved(opened, path, each) for each in near]

    return {name: moved(barred) for name, barred in views.items()}


def merge(first: OpenBank, second: OpenBank, out: Path) -> str:
    """One model of two whose banks have the same anchor and tree, and trained other subtrees.

    Of each block that one has trained and the other not, the trained one is taken. Raises UserError
    where both have trained a block and differ.
    """
    for what, mine, theirs in unlike(first, second):
        raise UserError(
            f"the two banks have another {what}",
            f"{mine} and {theirs}",
            "merge banks of one anchor and tree; add puts others side by side",
        )
    choice = _choose(first.bank, second.bank)

    def block(level: int, cluster: int) -> Given:
        taken = (level, cluster) in choice
        return stored_bytes(second.bank, level, cluster) if taken else "keep"

    with whole_folder(out) as part:
        link_model(first.folder, part, but=BANK)
        old = first.folder / BANK_FOLDER
        rewrite_bank(part / BANK_FOLDER, first.bank.manifest, block, old)
        documents = _all_documents(first, second)
        if documents:
            write_documents(part / BANK_FOLDER, documents)
    return f"{out}: {len(choice)} blocks of {second.folder}, all others of {first.folder}"


def _choose(first: Bank, second: Bank) -> set[tuple[int, int]]:
    """The blocks to take from the second bank. What differs is read, nothing else."""
    taken, conflicts = set(), []
    for mine, theirs in zip(first.manifest.levels, second.manifest.levels, strict=True):
        pairs = zip(mine.checksums, theirs.checksums, strict=True)
        differ = [(cluster, a, b) for cluster, (a, b) in enumerate(pairs) if a != b]
        silent = silent_values(first.config, mine.level)
        for cluster, a, b in tqdm(differ, desc=f"level {mine.level}", unit="block", delay=2):
            key = (mine.level, cluster)
            if b == mine.zeros or _is_untrained(second, key, silent):
                continue
            if a != mine.zeros and not _is_untrained(first, key, silent):
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


def _all_documents(first: OpenBank, second: OpenBank) -> list[Document]:
    found: dict[str, Document] = {}
    for opened in (first, second):
        for document in read_documents(opened.folder / BANK_FOLDER, opened.bank.config):
            before = found.get(document.sha256, document)
            clusters = dict.fromkeys((*before.clusters, *document.clusters))
            known = document.taught | before.taught
            found[document.sha256] = before.of_leaves({path: known.get(path) for path in clusters})
    return list(found.values())
