"""Makes an index of documents for ``--rag``: ``mlx_hmem.evaluate index --model MODEL --text
CORPUS --out INDEX``.

CORPUS is a file or a folder: ``text`` of each object of ``*.jsonl``, or the articles of ``*.txt``
and ``*.md``, gzip or not. The vectors are of the model's own encoder and the clusters those of its
tree. The index grows in ``INDEX.part``, a batch of documents at a time, and is renamed when it is
whole; a run that was stopped goes on where it was.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import ArgumentParser, UserError, first_as_model
from mlx_hmem.evaluate.paper.counting import RECORDS, corpus_files, states
from mlx_hmem.evaluate.rag.document_index import MANIFEST, finish
from mlx_hmem.evaluate.texts import read_articles, records
from mlx_hmem.files import sync, write_atomic
from mlx_hmem.folders import whole_folder
from mlx_hmem.model.find import MODEL_FILES, find_model
from mlx_hmem.model.load import open_encoder, open_tree
from mlx_hmem.reading import read_json
from mlx_hmem.retriever import Retriever

BATCH = 1024  # documents
CHARACTERS = 1 << 24  # or fewer documents, of so many characters
PROGRESS = "progress.json"  # what the growing files held when a batch was whole
GROWING = ("vectors.f16", "leaves.i32", "texts.utf8", "ends.i64")


def build_index(model: str | Path, corpus: Path, out: Path, progress: bool = True) -> int:
    """Makes the index ``out`` of the documents of ``corpus`` that have text; their number.

    Nothing is done where it is there already. UserError if ``out`` is something else.
    """
    folder = find_model(model, MODEL_FILES)
    if not (folder / "hmem.json").exists():
        remedy = "an index needs its encoder and its tree: name a model with memory"
        raise UserError("a model without memory", folder, remedy)
    hmem = HmemConfig.from_file(folder / "hmem.json")
    retriever = Retriever(open_encoder(folder, hmem), open_tree(folder, hmem))
    files = corpus_files(corpus)
    identity = {
        "tree_hash": hmem.routed.tree_hash,
        "encoder_hash": hmem.routed.encoder_hash,
        "corpus": states(files),
    }
    if _is_there(out, identity):
        return os.path.getsize(out / "leaves.i32") // 4
    with whole_folder(out, {"version": 1} | identity) as part:
        documents = _fill(part, files, retriever, progress)
        if not documents:
            shutil.rmtree(part)
            raise UserError("a corpus without text", corpus, "give one that has some")
        finish(part, identity, retriever.encoder.dim, retriever.tree.branching)
        (part / PROGRESS).unlink()
    return documents


def _is_there(out: Path, identity: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    found: Any = None
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((out / MANIFEST).read_text())
    if isinstance(found, dict) and all(found.get(key) == identity[key] for key in identity):
        return True
    raise UserError("something else lies where the index is to be", out, "choose another --out")


def _fill(part: Path, files: Sequence[Path], retriever: Retriever, progress: bool) -> int:
    """Adds all documents behind those that are there; the number of all."""
    at: Any = {"file": 0, "seen": 0, "documents": 0, "bytes": dict.fromkeys(GROWING, 0)}
    if (part / PROGRESS).exists():
        at = read_json(part / PROGRESS)
    documents: int = at["documents"]
    with contextlib.ExitStack() as stack:
        grown = {name: stack.enter_context(open(part / name, "ab")) for name in GROWING}
        for name, file in grown.items():
            file.truncate(at["bytes"][name])
            file.seek(0, os.SEEK_END)
        bar = stack.enter_context(
            tqdm(initial=documents, desc="index", unit="doc", disable=not progress)
        )
        for number in range(at["file"], len(files)):
            bar.set_postfix_str(f"file {number + 1} of {len(files)}")
            begin = at["seen"] if number == at["file"] else 0
            for texts, passed in _batches(_texts(files[number]), begin):
                _append(grown, texts, retriever)
                documents += len(texts)
                sizes = {name: file.tell() for name, file in grown.items()}
                now = {"file": number, "seen": passed, "documents": documents, "bytes": sizes}
                write_atomic(part / PROGRESS, json.dumps(now))
                bar.update(len(texts))
    return documents


def _texts(file: Path) -> Iterator[str]:
    return records(file) if file.name.endswith(RECORDS) else iter(read_articles(file))


def _batches(texts: Iterator[str], begin: int) -> Iterator[tuple[list[str], int]]:
    """Texts that are not empty, from number ``begin`` on, and how many of all have passed."""
    batch: list[str] = []
    passed = size = 0
    for passed, text in enumerate(texts, 1):
        if passed <= begin or not text.strip():
            continue
        batch.append(text.encode("utf-8", "replace").decode())  # a file holds no lone surrogate
        size += len(text)
        if len(batch) == BATCH or size >= CHARACTERS:
            yield batch, passed
            batch, size = [], 0
    if batch:
        yield batch, passed


def _append(grown: Mapping[str, BinaryIO], texts: list[str], retriever: Retriever) -> None:
    vectors = retriever.vectors(texts)
    data = [text.encode() for text in texts]
    start = grown["texts.utf8"].tell()
    ends = start + np.cumsum([len(text) for text in data], dtype=np.int64)
    grown["vectors.f16"].write(vectors.astype(np.float16).tobytes())
    leaves = retriever.tree.route_batch(vectors)[:, -1]
    grown["leaves.i32"].write(leaves.astype(np.int32).tobytes())
    grown["texts.utf8"].write(b"".join(data))
    grown["ends.i64"].write(ends.tobytes())
    for file in grown.values():
        sync(file)


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.evaluate index",
        description="Makes an index of documents for mlx_hmem.evaluate --rag, with the encoder and "
        "the clusters of a model."
        "\n\nMakes the folder OUT. Stopped, it goes on with the same command.",
    )
    parser.add_argument("--model", default="demo", help="folder or Hub id (default: demo)")
    parser.add_argument("--text", type=Path, required=True, help="a file or folder of documents")
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    args = parser.parse_args(first_as_model(words))
    documents = build_index(args.model, args.text, args.out)
    print(f"index: {documents} documents in {args.out}")
