"""``mlx_hmem.forget MODEL DOCUMENT… --out NEW_DIR``: takes documents out again.

Every cluster of level 1 that a document trained is trained again from its start without it, by the
same program on the same seed and tree. So its blocks are the bits that they would be had the
document never been there; all other blocks stay. Every bank of the model is seen to, for a document
may stand in several.

The old model and its runs are left as they are until the new ones are whole, and then it is for you
to delete them: they hold the document.
"""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.bank.documents import Document, write_documents
from mlx_hmem.bank.format import GENERIC, Key, Manifest
from mlx_hmem.bank.writer import Given, rewrite_bank
from mlx_hmem.bank_tools.folders import MEMORY, TREE, link_model
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import own_files
from mlx_hmem.errors import ArgumentParser, UserError, printable
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.folders import RECORD, whole_folder
from mlx_hmem.model.find import BANK_FOLDER, BESIDE
from mlx_hmem.model.load import load
from mlx_hmem.retriever import ClusterTree

from ..corpus.own import OwnDocument, read_folder
from ..stages import alone
from .blocks import Trainer, subtrees_of, trained_blocks
from .check import check
from .export import Base, open_bases, text_of, write_card
from .forgetting.choice import chosen_documents, other_names
from .forgetting.page import check_page, write_page
from .proof import proof, report_lines
from .rest import RESTORE, Rest, Taught, begin_rest, documents_left, made
from .restate import restated
from .run import SETTINGS, run_folder, vectors_of
from .sync.swap import make_up

DONE = "forgotten.json"


def place_of(name: str) -> Path:
    """Where a bank lies in its model's folder."""
    return Path(BESIDE) / name if name else Path()


def check_changed(base: Base, new: Manifest, documents: Collection[Document]) -> None:
    """Raises UserError if a block that one of the documents trained is the same in ``new``."""
    assert base.manifest is not None
    levels = {level.level for level in new.levels}
    for document in documents:
        for level, cluster in sorted(document.keys):
            if level not in levels or new.is_zeros(level, cluster):
                continue
            if new.checksum(level, cluster) == base.manifest.checksum(level, cluster):
                what = f"a block of {document.name} has not changed"
                raise UserError(what, f"level {level}, cluster {cluster}", RESTORE)


def joined(tree: ClusterTree, rests: Sequence[Rest]) -> ClusterTree:
    """The tree of a bank with the clusters of some runs as they are now."""
    centroids = [np.array(level) for level in tree.centroids]
    counts = [np.array(level) for level in tree.counts]
    for rest in rests:
        for level, first in enumerate(rest.settings.offsets):
            rows = slice(first, first + len(rest.tree.counts[level]))
            centroids[level][rows] = rest.tree.centroids[level]
            counts[level][rows] = rest.tree.counts[level]
    return ClusterTree(tree.branching, centroids, counts, tree.seed)


def write_bank(
    base: Base, rests: Sequence[Rest], documents: Sequence[Document], target: Path
) -> Manifest:
    """The bank ``base`` in ``target`` with its tree and what ties them, as the runs are now."""
    old, hmem = base.manifest, base.hmem
    assert old is not None
    assert hmem is not None
    assert base.tree is not None
    blocks: dict[Key, mx.array] = {}
    for rest in rests:
        again = sorted(rest.touched & set(subtrees_of(rest.paths)))
        blocks |= trained_blocks(rest.target, again)
    anew = {number + rest.settings.first for rest in rests for number in rest.touched}

    def block(level: int, cluster: int) -> Given:
        first = cluster // math.prod(old.memory.branching[1:level])
        return blocks.get((level, cluster)) if level != GENERIC and first in anew else "keep"

    joined(base.tree, rests).save(target / TREE, hmem.routed.encoder_hash)
    retriever = replace(hmem.routed, tree_hash=fingerprint(target / TREE))
    hashes = (old.anchor_hash, retriever.tree_hash)
    planned = Manifest.planned(old.memory, old.dtype, old.quantization, *hashes)
    manifest = rewrite_bank(target / BANK_FOLDER, planned, block, base.folder / BANK_FOLDER)
    write_documents(target / BANK_FOLDER, documents)
    write_atomic(target / "hmem.json", replace(hmem, retriever=retriever).to_json())
    return manifest


def of_banks(rests: Sequence[Rest]) -> dict[str, list[Rest]]:
    """What has changed of each bank that has changed."""
    names = dict.fromkeys(name for rest in rests for name in rest.banks)
    return {name: [rest for rest in rests if name in rest.banks] for name in names}


def write_model(
    bases: Mapping[str, Base],
    rests: Sequence[Rest],
    documents_of: Callable[[Base], list[Document]],
    out: Path,
    gone: Collection[str] = (),
) -> None:
    """The model whose banks the runs have made, whole or not at all. ``documents_of``: what each
    bank knows now; ``gone``: of which documents no block may be as it was."""
    changed = of_banks(rests)
    parts = [(place_of(name) / each).as_posix() for name in changed for each in MEMORY]
    with whole_folder(out) as part:
        link_model(bases[""].folder, part, but=[*parts, "README.md"])
        for name, own in changed.items():
            base = bases[name]
            manifest = write_bank(base, own, documents_of(base), part / place_of(name))
            check_changed(base, manifest, [d for d in base.documents if d.sha256 in gone])
        write_card(bases[""], part)


def is_made(
    bases: Mapping[str, Base], rests: Sequence[Rest], gone: Collection[str], out: Path
) -> bool:
    """Whether ``out`` is whole already: a kill came after it. UserError if it is another model."""
    if not out.exists() or (out / RECORD).exists():
        return False
    found = open_bases(str(out))
    for name, own in of_banks(rests).items():
        same = found[name].documents == documents_left(bases[name], gone)
        if not same or not all(made(found[name], rest.settings, rest.tree) for rest in own):
            raise UserError("the destination exists", out, "choose another")
    return True


def controls(folder: Path | None, known: Collection[str]) -> list[OwnDocument]:
    """Documents that the model has never seen, from a folder; ``known``: hashes of others."""
    if folder is None:
        return []
    faults = Faults()
    found = read_folder(own_files(folder, faults), known, faults).documents
    faults.print()
    if not found:
        raise UserError("no control document is left", folder, "give documents never remembered")
    return found


def targets_of(out: Path, count: int) -> Iterator[Path]:
    """Where the runs are kept of a model that ``count`` runs have taught."""
    yield run_folder(out, None)
    yield from (run_folder(out, Path(f"{out}.{number}.run")) for number in range(2, count + 1))


def runs_of(model: str | Path) -> list[Path]:
    """The runs beside a model, as :func:`targets_of` calls them."""
    runs = [Path(f"{model}.run")]
    while (more := Path(f"{model}.{len(runs) + 1}.run")).exists():
        runs.append(more)
    return runs


def forget(
    folder: Path,
    names: Sequence[str],
    runs: Sequence[Path],
    out: Path,
    control: Path | None,
    page: Path | None = None,
) -> list[str]:
    """Makes the model ``out`` and its runs without these documents; the report, line by line, which
    is also written as a ``page``."""
    for each in runs:
        make_up(folder, each)
    bases = open_bases(str(folder))
    first = bases[""]
    taught = [Taught.open(run, bases) for run in runs]
    chosen = chosen_documents(bases, taught, names)
    gone = {document.sha256 for document in chosen}
    unseen = controls(control, {d.sha256 for base in bases.values() for d in base.documents})
    taught = [run for run in taught if gone & {*run.known, *(d.sha256 for d in run.documents)}]
    given = []
    for run in taught:
        text, tokenizer = text_of(first, run.documents, restated(run.folder))
        given.append((run, text, run.paths(text, bases), tokenizer))
    targets = list(targets_of(out, len(taught)))
    if page is not None:
        check_page(page, [out, *targets])
    if out.exists() and not (targets[0] / SETTINGS).exists():
        raise UserError("the destination exists", out, "choose another")
    with ExitStack() as held:
        for target in targets:
            held.enter_context(alone("train forget", target))
        rests = []
        for target, (run, text, paths, tokenizer) in zip(targets, given, strict=True):
            encode = partial(vectors_of, encoder=first.encoder, tokenizer=tokenizer)
            rests.append(begin_rest(run, target, text, paths, gone, encode))
        if not is_made(bases, rests, gone, out):
            for rest, (*_, tokenizer) in zip(rests, given, strict=True):
                anchor, _ = load_anchor(first.folder)  # each run's memory is joined to its own
                trainer = Trainer(anchor, rest.settings, tokenizer)
                trainer.train(rest.target, rest.text, rest.paths)
            write_model(bases, rests, partial(documents_left, gone=gone), out, gone)
        forgotten = {d.sha256: d for run in taught for d in run.documents if d.sha256 in gone}
        forgotten = {d.sha256: forgotten[d.sha256] for d in chosen if d.sha256 in forgotten}
        result = proof(load(first.folder), load(out), [*forgotten.values()], unseen)
        anew = {n + rest.settings.first for rest in rests for n in rest.touched}
        result["retrained_clusters_of_level_1"] = sorted(anew)
        write_atomic(targets[0] / DONE, json.dumps(result, indent=2) + "\n")
    also = other_names(taught)
    if page is not None:
        documents = {d: also.get(d.sha256, []) for d in chosen if d.sha256 in forgotten}
        write_page(page, documents, result, first.folder, out)
    called = (" = ".join([d.name, *also.get(d.sha256, [])]) for d in chosen)
    lines = [f"forgot {', '.join(called)}: {out}", *report_lines(result)]
    lines.append(f"figures in {targets[0] / DONE}")
    olds = ", ".join(map(str, (first.folder, *(run.folder for run in taught))))
    return [*lines, f"{olds} still hold the documents: delete them"]


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.forget",
        description="Makes a model forget documents: what they trained is trained anew without "
        "them."
        "\n\nMakes NEW_DIR, a model directory without them, and says what is left. The old one "
        "stays, for you to delete. Stopped, it goes on with the same command.",
    )
    parser.add_argument("model", type=Path, metavar="DIR", help="made by mlx_hmem.remember")
    parser.add_argument(
        "documents", nargs="+", metavar="DOCUMENT", help="a name, a folder as letters/, a pattern "
        "as 'letters/*.txt', or six digits of a hash",
    )  # fmt: skip
    parser.add_argument(
        "--run", type=Path, action="append", help="the folder of a remembering (default: DIR.run, "
        "DIR.2.run … beside it); once for each that taught the documents, in whichever bank",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="NEW_DIR", help="the model to make")
    parser.add_argument(
        "--check", action="store_true", help="DOCUMENTs are files: search model and runs for them, "
        "and make again what the runs made, which takes as long as remembering",
    )  # fmt: skip
    parser.add_argument(
        "--control", type=Path, metavar="FOLDER", help="documents it has never seen, to compare"
    )
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="write the report as a page to hand on; it names "
        "what was forgotten",
    )  # fmt: skip
    args = parser.parse_args(words)
    runs = args.run or runs_of(args.model)
    if args.check == (args.out is not None):
        parser.error("it takes --out or --check, one of the two")
    if args.check:
        lines, clean = check(args.model, args.documents, runs)
        print("\n".join(map(printable, lines)))
        raise SystemExit(not clean)
    lines = forget(args.model, args.documents, runs, args.out, args.control, args.html)
    print("\n".join(map(printable, lines)))
