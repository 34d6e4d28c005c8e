"""What lies in which cluster of a bank: examples, documents, tokens, words, bytes.

All of it comes from the manifest, the cluster tree and ``documents.jsonl``; no block is read.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mlx_hmem.bank import Bank
from mlx_hmem.bank.documents import MAX_TERMS, Document, read_documents
from mlx_hmem.bank.format import Key
from mlx_hmem.bank.views import Views, read_views
from mlx_hmem.config import ClusterPath, HmemConfig, MemoryConfig, not_routed
from mlx_hmem.errors import UserError
from mlx_hmem.model.find import BANK_FILES, BANK_FOLDER, BESIDE, MODEL_FILES, find_model
from mlx_hmem.model.load import added_banks, open_bank, open_tree
from mlx_hmem.retriever import ClusterTree


class OpenBank(NamedTuple):
    """A bank of a model directory, opened; ``folder`` holds its ``hmem.json``."""

    name: str  # "" for the first
    folder: Path
    hmem: HmemConfig
    bank: Bank
    own_tree: ClusterTree | None  # None where memories are chosen by name alone

    @property
    def tree(self) -> ClusterTree:
        """The cluster tree; UserError without one."""
        if self.own_tree is None:
            raise not_routed(self.hmem.names or ())
        return self.own_tree


def model_folder(path_or_repo: str | Path) -> Path:
    """A model directory with a memory, here or on the Hub."""
    wanted = (*MODEL_FILES, *BANK_FILES, "bank/*.jsonl", f"{BESIDE}/*/bank/*.jsonl")
    folder = find_model(path_or_repo, wanted)
    if not (folder / "hmem.json").is_file():
        raise UserError("not a model directory with a memory: no hmem.json", folder, "name one")
    return folder


def open_banks(folder: Path) -> list[OpenBank]:
    """The banks of a model directory, the first one first; whoever calls closes them."""
    hmem = HmemConfig.from_file(folder / "hmem.json")
    found = []
    for name, each in {"": hmem, **added_banks(folder, hmem)}.items():
        where = folder / BESIDE / name if name else folder
        bank = open_bank(where, each, cache_bytes=0)
        tree = None if each.retriever is None else open_tree(where, each)
        found.append(OpenBank(name, where, each, bank, tree))
    return found


def configs_of(banks: Collection[OpenBank]) -> dict[str, MemoryConfig]:
    """By the names of the banks."""
    return {each.name: each.bank.config for each in banks}


def views_of(folder: Path, banks: Collection[OpenBank]) -> Views:
    """The views of a model directory."""
    return read_views(folder / BANK_FOLDER, configs_of(banks))


def stored_as(bank: Bank, level: int) -> str:
    """How the blocks of a level are stored, in words."""
    how = bank.manifest.quantization_of(level)
    if not bank.config.r[level - 1]:
        return "no memory"
    return bank.dtype if how is None else f"{how.mode} {how.bits} bits"


@dataclass
class Cluster:
    """What lies below a cluster. Of a document as much as of its leaves do."""

    examples: int  # that the tree was fitted to
    documents: dict[int, float] = field(default_factory=dict)  # number: share that lies here
    tokens: float = 0.0
    terms: list[str] = field(default_factory=list)
    empty: bool = False  # its block is zeros


class Contents:
    """What lies in one bank: ``clusters`` by (level, cluster), that texts or names reach."""

    def __init__(self, opened: OpenBank):
        self.opened, self.config = opened, opened.bank.config
        self.documents = read_documents(opened.folder / BANK_FOLDER, self.config)
        names = opened.hmem.names or {}
        self.clusters = {key: Cluster(0) for path in names.values() for key in enumerate(path, 1)}
        self.clusters |= {
            (level, cluster): Cluster(count)
            for level, counts in enumerate(opened.own_tree.counts if opened.own_tree else (), 1)
            for cluster, count in enumerate(counts.tolist())
            if count
        }
        for number, document in enumerate(self.documents):
            self._add(number, document)
        self._find_terms()
        for key in empty_blocks(opened.bank):
            if key in self.clusters:
                self.clusters[key].empty = True

    def below(self, path: ClusterPath) -> Iterator[Key]:
        """The cluster at a path and all under it, level by level."""
        for level in range(len(path), self.config.num_levels + 1):
            found = self.config.clusters_on(path, level)
            yield from ((level, c) for c in found if (level, c) in self.clusters)

    def _add(self, number: int, document: Document) -> None:
        leaves = set(document.clusters)
        for path in leaves:
            for key in enumerate(path, 1):
                cluster = self.clusters.setdefault(key, Cluster(0))
                before = cluster.documents.get(number, 0.0)
                cluster.documents[number] = before + 1 / len(leaves)
                cluster.tokens += document.tokens / len(leaves)

    def _find_terms(self) -> None:
        """The words that much of a cluster has and little else."""
        everywhere = Counter(term for d in self.documents for term in set(d.terms))
        for cluster in self.clusters.values():
            scores: dict[str, float] = defaultdict(float)
            for number, share in cluster.documents.items():
                for term in set(self.documents[number].terms):
                    rarity = math.log(1 + len(self.documents) / everywhere[term])
                    scores[term] += share * rarity
            ranked = sorted(scores, key=lambda term: (-scores[term], term))
            cluster.terms = ranked[:MAX_TERMS]


def empty_blocks(bank: Bank) -> Iterator[Key]:
    """The blocks that are zeros, by their checksums."""
    for level in bank.manifest.levels:
        for cluster, checksum in enumerate(level.checksums):
            if checksum == level.zeros:
                yield level.level, cluster
