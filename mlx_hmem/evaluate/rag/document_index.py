"""An index of documents: the vector, the leaf and the text of each, in files that are mapped.

    index.json   what it was made of: tree, encoder, corpus; sizes and fingerprint of the others
    vectors.f16  (documents, dim), as the model's encoder gives them
    leaves.i32   (documents,), the leaf that each is routed to, which determines its cluster path
    texts.utf8   the texts one after the other, and ends.i64 (documents,), where each ends there
    order.i64    (documents,), their numbers sorted by leaf
    starts.i64   (leaves + 1,), where in this order each leaf begins: a cluster of any level is a
                 run of leaves, so its documents are one slice

The texts are copied because a compressed corpus cannot be read from its middle. A search reads the
vectors of one cluster, of any file size.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, fingerprint, write_atomic
from mlx_hmem.reading import check_version, read_json

FORMAT_VERSION = 1
MANIFEST = "index.json"
TYPES = {"vectors.f16": np.float16, "leaves.i32": np.int32, "texts.utf8": np.uint8,
         "ends.i64": np.int64, "order.i64": np.int64, "starts.i64": np.int64}  # fmt: skip
REMEDY = "make the index again in another folder"
AT_ONCE = 1 << 14  # documents compared with a group of questions
QUESTIONS = 1 << 10


@dataclass(frozen=True)
class IndexManifest(JsonConfig):
    """``index.json``. ``corpus``: of each file its path, bytes and time of change."""

    format_version: int
    tree_hash: str
    encoder_hash: str
    corpus: tuple[Any, ...]
    documents: int
    dim: int
    branching: tuple[int, ...]
    sizes: dict[str, int]
    fingerprint: str

    def __post_init__(self) -> None:
        counts = (self.documents, self.dim, *self.branching)
        if not all(type(n) is int and n > 0 for n in counts):
            raise UserError("an index needs whole numbers above 0", counts, REMEDY)
        entries = dict.fromkeys(TYPES, self.documents)
        entries["vectors.f16"] *= self.dim
        entries["starts.i64"] = int(np.prod(self.branching)) + 1
        wanted = {name: n * np.dtype(TYPES[name]).itemsize for name, n in entries.items()}
        if self.sizes != wanted | {"texts.utf8": self.sizes.get("texts.utf8")}:
            raise UserError("the sizes of an index do not agree", self.sizes, REMEDY)


@dataclass(frozen=True)
class Found:
    """The nearest document of a question, and whether it is of the question's leaf or, that having
    none, of the deepest cluster above that has."""

    document: int
    in_leaf: bool


class DocumentIndex:
    """An index that :mod:`mlx_hmem.evaluate.rag.index` has made."""

    def __init__(self, folder: Path, tree_hash: str):
        """Maps the index in ``folder``; UserError unless it is whole and was made by the tree with
        this fingerprint. Of a large file 256 pieces are compared with what was written."""
        if not (folder / MANIFEST).is_file():
            command = "mlx_hmem.evaluate index --model MODEL --text CORPUS --out INDEX"
            raise UserError("no index of documents", folder, f"make one: {command}")
        values = read_json(folder / MANIFEST)
        check_version(values, FORMAT_VERSION, folder / MANIFEST, "make the index again")
        manifest = IndexManifest.from_dict(values, str(folder / MANIFEST))
        if manifest.tree_hash != tree_hash:
            raise UserError(
                f"the index {folder} belongs to another cluster tree",
                f"{manifest.tree_hash}, not {tree_hash}",
                "make one with this model",
            )
        for name, size in manifest.sizes.items():
            found = (folder / name).stat().st_size if (folder / name).is_file() else -1
            if found != size:
                what = "missing" if found < 0 else f"{found} bytes, not {size}"
                raise UserError(f"{folder / name} is not whole", what, REMEDY)
        if fingerprint(*(folder / name for name in TYPES)) != manifest.fingerprint:
            raise UserError("the index is damaged", folder, REMEDY)
        arrays: Any = {name: np.memmap(folder / name, of, "r") for name, of in TYPES.items()}
        self.manifest, self.fingerprint = manifest, manifest.fingerprint
        self._vectors = arrays["vectors.f16"].reshape(manifest.documents, manifest.dim)
        self._ends, self._texts = arrays["ends.i64"], arrays["texts.utf8"]
        self._order, self._starts = arrays["order.i64"], arrays["starts.i64"]

    def __len__(self) -> int:
        return self.manifest.documents

    def text(self, document: int) -> str:
        start = int(self._ends[document - 1]) if document else 0
        return self._texts[start : int(self._ends[document])].tobytes().decode()

    def nearest(self, vectors: np.ndarray, leaves: Sequence[int]) -> list[Found]:
        """The document with the highest cosine to each of ``vectors`` (n, dim) among those of its
        leaf, or of the deepest cluster above it that has any; the first of equals."""
        found: list[Found] = [Found(-1, False)] * len(leaves)
        groups: dict[int, list[int]] = {}
        for number, leaf in enumerate(leaves):
            groups.setdefault(int(leaf), []).append(number)
        for leaf, numbers in groups.items():
            level, rows = self.cluster(leaf)
            for start in range(0, len(numbers), QUESTIONS):
                some = numbers[start : start + QUESTIONS]
                best = self._nearest(np.asarray(vectors[some], np.float32), rows)
                for number, document in zip(some, best, strict=True):
                    found[number] = Found(document, level == len(self.manifest.branching))
        return found

    def cluster(self, leaf: int) -> tuple[int, np.ndarray]:
        """The deepest level at which the leaf's cluster has documents, and their numbers; level 0
        is the whole index."""
        below = 1
        for level in range(len(self.manifest.branching), -1, -1):
            first = leaf // below * below
            start, end = int(self._starts[first]), int(self._starts[first + below])
            if end > start:
                return level, self._order[start:end]
            below *= self.manifest.branching[level - 1]
        raise AssertionError("an index has a document")

    def _nearest(self, vectors: np.ndarray, rows: np.ndarray) -> list[int]:
        best = np.full(len(vectors), -np.inf, np.float32)
        document = np.full(len(vectors), -1, np.int64)
        for start in range(0, len(rows), AT_ONCE):
            numbers = rows[start : start + AT_ONCE]
            block = self._vectors[numbers].astype(np.float32)
            lengths = np.maximum(np.linalg.norm(block, axis=1), 1e-12)
            cosines = vectors @ (block / lengths[:, None]).T
            at = cosines.argmax(axis=1)
            value = cosines[np.arange(len(vectors)), at]
            document = np.where(value > best, numbers[at], document)
            best = np.maximum(value, best)
        return document.tolist()


def finish(folder: Path, identity: dict[str, Any], dim: int, branching: Sequence[int]) -> None:
    """Sorts the documents in ``folder`` by leaf and writes the manifest, the last of its files.

    In memory are about 20 bytes of each document.
    """
    leaves = np.fromfile(folder / "leaves.i32", np.int32)
    order = np.argsort(leaves, kind="stable").astype(np.int64, copy=False)
    starts = np.searchsorted(leaves[order], np.arange(np.prod(branching) + 1)).astype(np.int64)
    for name, array in (("order.i64", order), ("starts.i64", starts)):
        with atomic_file(folder / name) as file:
            file.write(array.data)
    manifest = IndexManifest(
        format_version=FORMAT_VERSION,
        **identity,
        documents=len(leaves),
        dim=dim,
        branching=tuple(branching),
        sizes={name: os.path.getsize(folder / name) for name in TYPES},
        fingerprint=fingerprint(*(folder / name for name in TYPES)),
    )
    write_atomic(folder / MANIFEST, json.dumps(manifest.to_dict(), indent=2) + "\n")
