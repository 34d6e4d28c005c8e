"""A trained run becomes a model directory: the base model's, with new clusters behind its own.

Files that do not change are hard links, or copies where the file system has none. Blocks that no
text has touched are zeros: where they are fetched the level above speaks alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_hmem.anchors.load import anchor_hash, read_config, text_hashes
from mlx_hmem.bank.documents import Document, read_documents, write_documents
from mlx_hmem.bank.format import MANIFEST, Key, Manifest
from mlx_hmem.bank.views import read_views, write_views
from mlx_hmem.bank.writer import Given, rewrite_bank
from mlx_hmem.bank_tools.folders import TREE, link_model
from mlx_hmem.config import FORMAT_VERSION, ClusterPath, HmemConfig, RetrieverConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.folders import whole_folder
from mlx_hmem.model.find import BANK_FILES, BANK_FOLDER, BESIDE, MODEL_FILES, find_model
from mlx_hmem.model.load import added_banks, open_encoder, open_tree, read_hmem
from mlx_hmem.retriever import ClusterTree, Encoder, load_encoder
from mlx_hmem.retriever.words import words_of

from ..corpus.own import OwnDocument
from ..data.taken_tokenizer import TakenTokenizer
from ..export import place_encoder
from ..step.start import sound_anchor
from .run import OwnText, Settings, cut_text, provenance, whole_paths

CARD = """# A model with remembered documents

{anchor} as the anchor, and a memory bank in which {count} documents were remembered with
`mlx_hmem.remember`. `bank/documents.jsonl` names them.

The weights hold what these documents say: pass them on only where you would pass on the documents.
"""


@dataclass(frozen=True)
class Base:
    """The model that is to remember; ``hmem``, ``tree`` and ``manifest`` where it has a memory."""

    folder: Path
    hmem: HmemConfig | None
    tree: ClusterTree | None
    manifest: Manifest | None
    encoder: Encoder
    anchor_hash: str

    @cached_property
    def anchor(self) -> tuple[nn.Module, dict[str, Any]]:
        """The anchor and its config, loaded when first asked for; UserError if it is not finite."""
        return sound_anchor(self.folder), read_config(self.folder)

    @property
    def first(self) -> int:
        return self.hmem.memory.branching[0] if self.hmem is not None else 0

    @property
    def documents(self) -> list[Document]:
        return read_documents(self.folder / BANK_FOLDER) if self.hmem is not None else []


def open_base(path_or_repo: str) -> Base:
    """A folder or Hub id, with its memory if it has one; UserError where the parts do not fit."""
    folder = find_model(path_or_repo, (*MODEL_FILES, *BANK_FILES))
    read_config(folder)
    hmem = read_hmem(folder)
    if hmem is None:
        return Base(folder, None, None, None, load_encoder("static"), anchor_hash(folder))
    manifest = Manifest.from_file(folder / BANK_FOLDER / MANIFEST)
    tree, encoder = open_tree(folder, hmem), open_encoder(folder, hmem)
    return Base(folder, hmem, tree, manifest, encoder, hmem.anchor_hash)


def open_bases(path_or_repo: str) -> dict[str, Base]:
    """All banks of a model by name, "" being its own; UserError if it has none."""
    first = open_base(path_or_repo)
    if first.hmem is None:
        raise UserError("a model without memory knows no document", path_or_repo, "name another")
    found = {"": first}
    for name, hmem in added_banks(first.folder, first.hmem).items():
        folder = first.folder / BESIDE / name
        manifest = Manifest.from_file(folder / BANK_FOLDER / MANIFEST)
        parts = (folder, hmem, open_tree(folder, hmem), manifest)
        found[name] = Base(*parts, first.encoder, first.anchor_hash)
    return found


def joined_tree(base: ClusterTree | None, own: ClusterTree) -> ClusterTree:
    """The clusters of ``own`` behind those of ``base``: old ones keep their numbers."""
    if base is None:
        return own
    branching = (base.branching[0] + own.branching[0], *base.branching[1:])
    pairs = zip(base.centroids, own.centroids, strict=True)
    centroids = [np.concatenate([np.asarray(a), np.asarray(b)]) for a, b in pairs]
    counts = [np.concatenate(pair) for pair in zip(base.counts, own.counts, strict=True)]
    return ClusterTree(branching, centroids, counts, base.seed)


def text_of(
    base: Base, documents: list[OwnDocument], restated: Mapping[str, Sequence[str]] | None = None
) -> tuple[OwnText, TakenTokenizer]:
    """The documents in the model's tokens, with what was restated of each, and its tokenizer."""
    tokenizer = TakenTokenizer(base.folder)
    return cut_text(documents, tokenizer, read_config(base.folder), restated or {}), tokenizer


def with_words(
    documents: list[Document],
    text: OwnText,
    paths: np.ndarray,
    settings: Settings,
    encoder: Encoder,
    tokenizer: TakenTokenizer,
) -> list[Document]:
    """The documents with the words of their windows in each leaf, by which a question finds it;
    ``paths`` are those of :func:`.run.leaves_of`."""
    found: list[dict[ClusterPath, set[str]]] = [{} for _ in documents]
    places = zip(text.owner, whole_paths(settings, paths).tolist(), strict=True)
    for (owner, path), window in zip(places, text.windows.texts(tokenizer), strict=True):
        words = words_of(encoder.tokenizer, window)
        found[owner].setdefault(tuple(path), set()).update(words)
    return [
        document.of_leaves({path: " ".join(sorted(own[path])) for path in document.clusters})
        for document, own in zip(documents, found, strict=True)
    ]


def knowledge(
    base: Base, settings: Settings, text: OwnText, paths: np.ndarray, tokenizer: TakenTokenizer
) -> list[Document]:
    """What ``bank/documents.jsonl`` says of the documents of a run."""
    known = provenance(text, settings, paths)
    return with_words(known, text, paths, settings, base.encoder, tokenizer)


def export(
    base: Base,
    settings: Settings,
    own_tree: ClusterTree,
    blocks: dict[Key, mx.array],
    documents: list[Document],
    out: Path,
) -> None:
    """Writes the model directory ``out``, whole or not at all."""
    with whole_folder(out) as part:
        changed = ["README.md", "hmem.json", TREE]
        link_model(base.folder, part, but=[*changed, f"{BANK_FOLDER}/*"] if base.hmem else changed)
        tree_file = part / TREE
        tree_file.parent.mkdir(exist_ok=True)
        joined_tree(base.tree, own_tree).save(tree_file, settings.encoder_hash)
        known = RetrieverConfig(
            base.hmem.routed.encoder if base.hmem else place_encoder("static", part),
            settings.encoder_hash,
            fingerprint(tree_file),
        )
        _write_bank(base, settings, blocks, known.tree_hash, part / BANK_FOLDER)
        write_documents(part / BANK_FOLDER, [*base.documents, *documents])
        _bar_in_views(base, settings, part / BANK_FOLDER)
        hmem = HmemConfig(
            FORMAT_VERSION, settings.memory, known, base.anchor_hash, **text_hashes(part),
            names=base.hmem.names if base.hmem else None,
        )  # fmt: skip
        write_atomic(part / "hmem.json", hmem.to_json())
        write_card(base, part)


def write_card(base: Base, part: Path) -> None:
    count = len(read_documents(part / BANK_FOLDER))
    anchor = read_config(base.folder)["model_type"]
    write_atomic(part / "README.md", CARD.format(anchor=f"A {anchor} model", count=count))


def _write_bank(
    base: Base, settings: Settings, blocks: dict[Key, mx.array], tree_hash: str, target: Path
) -> None:
    """The old shards as they are, then those of the new clusters."""
    old = base.manifest
    form = ("float16", None) if old is None else (old.dtype, old.quantization)
    planned = Manifest.planned(settings.memory, *form, base.anchor_hash, tree_hash)
    firsts = (1, *settings.offsets)

    def block(level: int, cluster: int) -> Given:
        kept = old is not None and cluster < firsts[level]
        return "keep" if kept else blocks.get((level, cluster))

    rewrite_bank(target, planned, block, None if old is None else base.folder / BANK_FOLDER)


def _bar_in_views(base: Base, settings: Settings, target: Path) -> None:
    """Views that exist do not see the new clusters until they are unblocked."""
    if base.hmem is None:
        return
    beside = {name: each.memory for name, each in added_banks(base.folder, base.hmem).items()}
    views = read_views(base.folder / BANK_FOLDER, {"": base.hmem.memory} | beside)
    new = [(n,) for n in range(settings.first, settings.memory.branching[0])]
    if views:
        write_views(target, {name: itertools.chain(barred, new) for name, barred in views.items()})
