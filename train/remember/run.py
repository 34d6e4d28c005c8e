"""The folder of ``train remember``: the documents' text, their tree, and the blocks they trained.

It lies beside the model directory, never in it, for it holds private text: ``settings.json``,
``documents.jsonl``, ``tree.safetensors`` (of these documents alone), ``paths.npy`` (the leaf of
each window in it), ``restated.jsonl`` where restatements were asked for, ``known.jsonl`` where
documents were among the files that the model knew already, and ``subtrees/N`` with the trained
blocks of each cluster of level 1. Tokens follow from the text and are cut anew. Of a
model that had a memory before, the new clusters come behind the old ones on every level, so all
clusters here are counted from the first new one.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from mlx_hmem.bank.documents import Document
from mlx_hmem.config import JsonConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file, write_atomic
from mlx_hmem.folders import lies_in
from mlx_hmem.reading import check_version, read_sealed, read_sealed_lines, sealed
from mlx_hmem.retriever import ClusterTree, Encoder

from ..corpus.own import OwnDocument, typical_words
from ..data.arrays import load_mapped, save_array
from ..data.taken_tokenizer import TakenTokenizer, embedded
from ..data.windows import Windows, cut_windows
from ..tree.stage import distinct

FORMAT_VERSION = 5  # what blocks follow from is part of it: blocks are made again from the text
SETTINGS = "settings.json"
KNOWN = "known.jsonl"
LONGEST = 512  # tokens of a window
RESTORE = "restore the folder as the remembering left it"
OTHER_RUN = "give another --out or --run, or go on with what it was begun with"


@dataclass(frozen=True)
class Settings(JsonConfig):
    """What a run's blocks follow from, beside its documents.

    ``memory``: of the model to be made; ``first``: its clusters of level 1 that were there before;
    ``source``: the folder as it was read; ``training``: of :class:`.TrainerConfig`;
    ``step_tokens``: of a step, about; ``part_tokens``: worked on at a time; ``passes``: over the
    text, None for what each cluster needs, or less of it if it is to be ``quick``; ``restate``:
    restatements of each passage.
    """

    format_version: int
    source: str
    anchor_hash: str
    encoder_hash: str
    seed: int
    context: int
    begin: tuple[int, ...]
    memory: MemoryConfig
    first: int
    training: dict[str, Any]
    step_tokens: int
    part_tokens: int
    passes: int | None = None
    quick: bool = False
    restate: int = 0

    @property
    def branching(self) -> tuple[int, ...]:
        """Of the tree of these documents alone."""
        return (self.memory.branching[0] - self.first, *self.memory.branching[1:])

    @property
    def offsets(self) -> tuple[int, ...]:
        """The first new cluster of each level."""
        deeper = (1, *self.memory.branching[1:])
        return tuple(self.first * int(n) for n in np.cumprod(deeper))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Those of a run's folder; UserError if it is none."""
        path = folder / SETTINGS
        if not path.exists():
            raise UserError("not the folder of a train remember", folder, "give it with --run")
        values = read_sealed(path, "restore the file")
        check_version(values, FORMAT_VERSION, path, "remember the documents again")
        values["memory"] = MemoryConfig.from_dict(values.get("memory"), f"{path} (memory)")
        return cls.from_dict(values, str(path))

    def save(self, folder: Path) -> None:
        values = json.loads(json.dumps(self.to_dict()))
        write_atomic(folder / SETTINGS, json.dumps(sealed(values), indent=2) + "\n")


@dataclass(frozen=True)
class OwnText:
    """The documents as windows. ``owner`` is each window's document, and ``added`` whether it is a
    restatement of it."""

    documents: list[OwnDocument]
    windows: Windows
    owner: np.ndarray
    added: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """Windows and tokens."""
        return len(self.windows), len(self.windows.tokens)

    @property
    def tokens_of(self) -> list[int]:
        """The tokens of each document, beginnings of windows among them; restatements are not."""
        counts = np.zeros(len(self.documents), np.int64)
        np.add.at(counts, self.owner, np.where(self.added, 0, np.diff(self.windows.offsets)))
        return [int(n) for n in counts]


def context_of(config: dict[str, Any]) -> int:
    """Tokens of a window for an anchor with this ``config.json``."""
    return min(config.get("max_position_embeddings") or LONGEST, LONGEST)


def cut_text(
    documents: list[OwnDocument],
    tokenizer: TakenTokenizer,
    config: dict[str, Any],
    restated: Mapping[str, Sequence[str]],
) -> OwnText:
    """Windows, for an anchor with this ``config.json``, document by document; ``restated``: of
    each by its hash, a window each."""
    begin = tokenizer.begin()

    def cut(texts: Sequence[str]) -> Windows:
        return cut_windows(texts, tokenizer, context_of(config), begin, embedded(config))

    parts, owner, added = list[Windows](), list[int](), list[bool]()
    for number, document in enumerate(documents):
        own, more = cut([document.text]), cut(restated.get(document.sha256, ()))
        parts += [own, more]
        owner += [number] * (len(own) + len(more))
        added += [False] * len(own) + [True] * len(more)
    tokens = np.concatenate([np.empty(0, np.uint16), *(part.tokens for part in parts)])
    sizes = [np.diff(part.offsets) for part in parts]
    offsets = np.cumsum(np.concatenate([[0], *sizes]).astype(np.int64))
    windows = Windows(tokens, offsets, begin)
    return OwnText(documents, windows, np.array(owner, np.int64), np.array(added, bool))


def vectors_of(windows: Windows, encoder: Encoder, tokenizer: TakenTokenizer) -> np.ndarray:
    """The vector of each window, (windows, dim) float16."""
    texts = list(windows.texts(tokenizer))
    return encoder.encode(texts, progress=len(texts) > 5000).astype(np.float16)


def leaves_of(
    folder: Path, settings: Settings, encoder: Encoder, text: OwnText, tokenizer: TakenTokenizer
) -> np.ndarray:
    """The leaf of each window in the tree of these documents, (windows, levels); both are made and
    kept in ``folder`` unless they are there."""
    file, tree_file = folder / "paths.npy", folder / "tree.safetensors"
    if not file.exists():
        vectors = vectors_of(text.windows, encoder, tokenizer)
        rows = distinct(vectors)
        tree = ClusterTree.fit(vectors, settings.branching, seed=settings.seed, rows=rows)
        tree.save(tree_file, encoder.fingerprint)
        save_array(file, tree.route_batch(vectors))
    return load_mapped(file)


def whole_paths(settings: Settings, paths: np.ndarray) -> np.ndarray:
    """Paths in the tree of these documents as they are called in the model."""
    return (paths + np.array(settings.offsets)).astype(np.int32)


def provenance(text: OwnText, settings: Settings, paths: np.ndarray) -> list[Document]:
    """What ``bank/documents.jsonl`` says of these documents."""
    leaves: list[dict[tuple[int, ...], None]] = [{} for _ in text.documents]
    for owner, path in zip(text.owner, whole_paths(settings, paths).tolist(), strict=True):
        leaves[owner][tuple(path)] = None
    words = typical_words(text.documents)
    each = zip(text.documents, text.tokens_of, leaves, words, strict=True)
    return [Document(d.sha256, d.name, n, tuple(own), terms) for d, n, own, terms in each]


def run_folder(out: Path, run: Path | None) -> Path:
    """Where the private part of a model is kept: beside the model unless it is said."""
    run = Path(f"{out}.run") if run is None else run
    if lies_in(run, out):
        raise UserError(
            "the run's folder lies in the model directory", run, "it holds your text: keep it apart"
        )
    return run


def begin_run(
    folder: Path,
    settings: Settings,
    documents: list[OwnDocument],
    known: Mapping[str, Collection[str]],
) -> None:
    """Writes what a run begins with; the settings come last. ``known``: by what names documents
    were read that the model had from elsewhere, by their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "documents.jsonl", map(asdict, documents))
    if known:
        lines = ({"sha256": sha256, "names": [*names]} for sha256, names in known.items())
        write_lines(folder / KNOWN, lines)
    settings.save(folder)


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, each with its checksum, whole or not at all."""
    with atomic_file(path) as file:
        for line in lines:
            file.write((json.dumps(sealed(line), ensure_ascii=False) + "\n").encode())


def documents_of(folder: Path) -> list[OwnDocument]:
    """What :func:`begin_run` wrote; UserError unless each text is the one that was read."""
    found, path = list[OwnDocument](), folder / "documents.jsonl"
    for number, line in enumerate(read_sealed_lines(path, RESTORE), 1):
        try:
            made = OwnDocument(**line | {"also": tuple(line.get("also", ()))})
            if hashlib.sha256(made.text.encode()).hexdigest() != made.sha256:
                raise ValueError("another text than its hash says")
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}, is damaged", error, RESTORE) from None
        found.append(made)
    return found


def known_names(folder: Path) -> dict[str, tuple[str, ...]]:
    """By what names a run has read documents that it has not taught, by their hashes."""
    path = folder / KNOWN
    lines = read_sealed_lines(path, RESTORE) if path.exists() else []
    return {line["sha256"]: tuple(line["names"]) for line in lines}


def check_same(found: Settings, folder: Path, **wanted: Any) -> None:
    """Raises UserError unless a run that has begun is the one that is asked for."""
    changed = [name for name, value in wanted.items() if getattr(found, name) != value]
    if changed:
        raise UserError(
            f"{folder} was begun with something else", f"changed: {', '.join(changed)}", OTHER_RUN
        )
