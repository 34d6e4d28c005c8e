"""``mlx_hmem.forget MODEL DOCUMENT… --out NEW_DIR``: takes documents out again.

Every cluster of level 1 that a document trained is trained again from its start without it, by the
same program on the same seed and tree. So its blocks are the bits that they would be had the
document never been there; all other blocks stay. What remains of it: the cluster tree was fitted to
its vectors among the others' and stays as it is.

The old model and its run are left as they are until the new ones are whole, and then it is for you
to delete them: they hold the document.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.bank.documents import Document, find_document, write_documents
from mlx_hmem.bank.format import GENERIC, Key
from mlx_hmem.bank.writer import Given, rewrite_bank
from mlx_hmem.bank_tools.folders import BANK, link_model
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.files import link_or_copy, write_atomic
from mlx_hmem.folders import whole_folder
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.model.load import load
from mlx_hmem.retriever import ClusterTree

from ..corpus.readers import Faults
from ..corpus.readers_files import own_files
from ..data.arrays import load_mapped, save_array
from ..stages import alone
from .blocks import Trainer, subtree_folder, subtrees_of, trained_blocks
from .command import run_folder, text_of
from .export import Base, open_base, write_card
from .proof import proof, report_lines
from .restate import restated, restated_without
from .run import OwnText, Settings, begin_run, check_same, documents_of, without
from .text import OwnDocument, read_folder


def check_run(base: Base, run: Path) -> Settings:
    """The settings of the run whose clusters the model has; UserError if it has others."""
    settings = Settings.load(run)
    own = ClusterTree.load(run / "tree.safetensors")
    assert base.tree is not None
    levels = zip(base.tree.centroids, own.centroids, settings.offsets, strict=False)
    same = all(np.array_equal(np.asarray(a)[n : n + len(b)], b) for a, b, n in levels)
    if settings.anchor_hash != base.anchor_hash or not same:
        remedy = "give its own with --run"
        raise UserError("this run did not make the model's clusters", run, remedy)
    return settings


def begin_without(
    run: Path, target: Path, settings: Settings, text: OwnText, paths: np.ndarray, gone: set[str]
) -> tuple[Settings, OwnText, np.ndarray, set[int]]:
    """A run without the documents ``gone``, begun in ``target`` or found there, with all that they
    have not touched; its settings, text and paths, and the clusters of level 1 to train anew."""
    owned = [text.documents[i].sha256 in gone for i in text.owner]
    touched = set(subtrees_of(paths[np.array(owned)]))
    rest, rest_paths = without(text, paths, gone)
    source = hashlib.sha256(repr((settings.source, sorted(gone))).encode()).hexdigest()
    new = replace(settings, source=source)
    if (target / "settings.json").exists():
        check_same(Settings.load(target), target, source=source)
        return new, rest, rest_paths, touched
    shutil.rmtree(target / "subtrees", ignore_errors=True)
    for number in set(subtrees_of(paths)) - touched:
        for name in ("blocks.safetensors", "done.json"):
            link_or_copy(subtree_folder(run, number) / name, subtree_folder(target, number) / name)
    save_array(target / "paths.npy", rest_paths)
    shutil.copyfile(run / "tree.safetensors", target / "tree.safetensors")
    restated_without(run, target, gone)
    begin_run(target, new, rest.documents)
    return new, rest, rest_paths, touched


def write_model(
    base: Base,
    settings: Settings,
    touched: set[int],
    blocks: dict[Key, mx.array],
    documents: list[Document],
    out: Path,
) -> None:
    """The model with the new ``blocks`` in the subtrees ``touched``, whole or not at all."""
    manifest, bank = base.manifest, base.folder / BANK_FOLDER
    assert manifest is not None

    def block(level: int, cluster: int) -> Given:
        below = math.prod(settings.memory.branching[1:level])
        if level != GENERIC and cluster // below - settings.first in touched:
            return blocks.get((level, cluster))
        return "keep"

    with whole_folder(out) as part:
        link_model(base.folder, part, but=[*BANK, "README.md"])
        rewrite_bank(part / BANK_FOLDER, manifest, block, bank)
        write_documents(part / BANK_FOLDER, documents)
        write_card(base, part)


def controls(folder: Path | None, known: Sequence[Document]) -> list[OwnDocument]:
    """Documents that the model has never seen, from a folder."""
    if folder is None:
        return []
    faults = Faults()
    found = read_folder(own_files(folder), {d.sha256 for d in known}, faults).documents
    faults.print()
    if not found:
        raise UserError("no control document is left", folder, "give documents never remembered")
    return found


def forget(
    base: Base, names: Sequence[str], run: Path, out: Path, control: Path | None
) -> list[str]:
    """Makes the model ``out`` and its run without these documents; the report, line by line."""
    known = base.documents
    chosen = [find_document(known, name) for name in names]
    gone = {document.sha256 for document in chosen}
    unseen, settings = controls(control, known), check_run(base, run)
    documents = documents_of(run)
    forgotten = [d for d in documents if d.sha256 in gone]
    if missing := gone - {d.sha256 for d in forgotten}:
        named = ", ".join(d.name for d in chosen if d.sha256 in missing)
        raise UserError("another run has taught these documents", named, "give that with --run")
    text, _ = text_of(base, documents, restated(run))
    target = run_folder(out, None)
    with alone("train forget", target):
        paths = load_mapped(run / "paths.npy")
        new, rest, rest_paths, touched = begin_without(run, target, settings, text, paths, gone)
        anchor, _ = load_anchor(base.folder)
        Trainer(anchor, new).train(target, rest, rest_paths)
        again = sorted(touched & set(subtrees_of(rest_paths)))
        left = [d for d in known if d.sha256 not in gone]
        write_model(base, new, touched, trained_blocks(target, again), left, out)
        result = proof(load(base.folder), load(out), forgotten, unseen)
        result["retrained_clusters_of_level_1"] = sorted(n + settings.first for n in touched)
        result["all_clusters_of_level_1"] = settings.memory.branching[0]
        write_atomic(target / "forgotten.json", json.dumps(result, indent=2) + "\n")
    lines = [f"forgot {', '.join(d.name for d in chosen)}: {out}", *report_lines(result)]
    lines.append(f"figures in {target / 'forgotten.json'}")
    return [*lines, f"{base.folder} and {run} still hold the documents: delete them"]


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.forget",
        description="Makes a model forget documents: what they trained is trained anew without "
        "them."
        "\n\nMakes NEW_DIR, a model directory without them, and says what is left. The old one "
        "stays, for you to delete. Stopped, it goes on with the same command.",
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="made by mlx_hmem.remember")
    parser.add_argument("documents", nargs="+", metavar="DOCUMENT", help="a name or a hash")
    parser.add_argument("--run", type=Path, help="of the remembering (default: DIR.run)")
    parser.add_argument("--out", type=Path, required=True, metavar="NEW_DIR")
    parser.add_argument(
        "--control", type=Path, metavar="FOLDER", help="documents it has never seen, to compare"
    )
    args = parser.parse_args(words)
    if args.out.exists():
        raise UserError("the destination exists", args.out, "choose another")
    base = open_base(str(args.model))
    if base.hmem is None:
        raise UserError("a model without memory knows no document", args.model, "name another")
    run = Path(f"{args.model}.run") if args.run is None else args.run
    print("\n".join(forget(base, args.documents, run, args.out, args.control)))
