"""``mlx_hmem.remember DOCUMENTS --model MODEL --out NEW_DIR``: a model learns your documents.

The anchor stays as it is; the text goes into blocks of memory: into a bank of its own, or, where
the model has one, into new clusters behind those that are there. See docs/own_documents.md.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import read_config
from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.errors import ArgumentParser, UserError, printable
from mlx_hmem.model.load import load
from mlx_hmem.retriever import ClusterTree

from ..corpus.files import CorpusFile, Faults
from ..corpus.own import OwnDocument, Reading, read_folder
from ..corpus.readers_files import own_files
from ..data.taken_tokenizer import TakenTokenizer
from ..stages import alone
from .blocks import Trainer, results_of, subtrees_of, trained_blocks
from .export import Base, export, open_base, with_words
from .plan import MEMORY_PER_BYTE, PASSES, QUICK, check_size, make_settings, plan_lines, text_bytes
from .proof import look
from .restate import Writer, restate, restated
from .run import (
    OwnText,
    Settings,
    begin_run,
    check_same,
    cut_text,
    documents_of,
    leaves_of,
    provenance,
)


def source_of(files: list[CorpusFile], most_bytes: int | None) -> str:
    """What names the folder as it is now: names, sizes and times of its files."""
    seen = [(file.name, *file.state) for file in files]
    return hashlib.sha256(repr((seen, most_bytes)).encode()).hexdigest()


def run_folder(out: Path, run: Path | None) -> Path:
    """Where the private part of a model is kept: beside the model unless it is said."""
    run = Path(f"{out}.run") if run is None else run
    if run.absolute().is_relative_to(out.absolute()):
        raise UserError(
            "the run's folder lies in the model directory", run, "it holds your text: keep it apart"
        )
    return run


def text_of(
    base: Base, documents: list[OwnDocument], restated: Mapping[str, Sequence[str]] | None = None
) -> tuple[OwnText, TakenTokenizer]:
    """The documents in the model's tokens, with what was restated of each, and its tokenizer."""
    tokenizer = TakenTokenizer(base.folder)
    return cut_text(documents, tokenizer, read_config(base.folder), restated or {}), tokenizer


def read_new(base: Base, files: list[CorpusFile], most_bytes: int | None) -> tuple[Reading, str]:
    """The documents to remember, and in words what was found; UserError if there is none."""
    faults, known = Faults(), {document.sha256 for document in base.documents}
    most = most_bytes or machine_bytes() // MEMORY_PER_BYTE
    reading = read_folder(files, known, faults, most)
    faults.print()
    if reading.more_left and most_bytes is None:
        what = "the files unpack to more text than this machine can hold"
        remedy = f"give --max-bytes {most} or less, or a folder with less text"
        raise UserError(what, f"more than {bytes_text(most)}", remedy)
    counts = {
        "duplicates": reading.duplicates,
        "known already": sum(map(len, reading.known.values())),
        "passed over": sum(faults.counts.values()),
    }
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    if reading.more_left:
        notes.append(f"the rest left out by --max-bytes {most_bytes}")
    if not reading.documents:
        raise UserError("there is nothing to remember", ", ".join(notes) or "0", "give more text")
    said = f"{len(reading.documents):,}" + (f" ({', '.join(notes)})" if notes else "")
    return reading, said


def prepare(
    base: Base,
    given: Path,
    files: list[CorpusFile],
    run: Path,
    most_bytes: int | None,
    **wanted: Any,
) -> Trainer:
    """Begins a run after its plan, or finds the one that was begun; what trains it comes back.
    ``given``: where the ``files`` lie. ``wanted``: settings that were asked for."""
    source = source_of(files, most_bytes)
    if (run / "settings.json").exists():
        found = Settings.load(run)
        wanted |= {"anchor_hash": base.anchor_hash, "first": base.first}
        check_same(found, run, source=source, **wanted)
        print(f"goes on with {run}")
        return Trainer(base.anchor[0], found, TakenTokenizer(base.folder))
    size = text_bytes(files)
    check_size(base, min(size, most_bytes or size), [run])
    reading, said = read_new(base, files, most_bytes)
    documents = reading.documents
    text, tokenizer = text_of(base, documents)
    settings = make_settings(base, text, tokenizer, source=source, seed=0, **wanted)
    cost = None
    if settings.restate:
        cost = Writer.open(base, settings.restate, settings.seed).reckon(documents)
    trainer = Trainer(base.anchor[0], settings, tokenizer)
    with tempfile.TemporaryDirectory(prefix=".plan-", dir=run.parent) as work:
        seconds = trainer.seconds(text, Path(work))
    said = f"{said}, from {given}"
    lines = plan_lines(base, text, settings, said, seconds, cost)
    print("\n".join(map(printable, lines)), flush=True)
    begin_run(run, settings, documents, reading.known)
    return trainer


def remember(base: Base, run: Path, trainer: Trainer, out: Path) -> None:
    """Trains what is not trained yet, and writes the model directory."""
    settings, documents = trainer.settings, documents_of(run)
    if settings.restate:
        writer = Writer.open(base, settings.restate, settings.seed)
        print(restate(run, writer, documents))
    text, tokenizer = text_of(base, documents, restated(run))
    paths = leaves_of(run, text, settings, base.encoder, tokenizer)
    trainer.train(run, text, paths)
    numbers = subtrees_of(paths)
    known = provenance(text, settings, paths)
    known = with_words(known, text, paths, settings, base.encoder, tokenizer)
    tree = ClusterTree.load(run / "tree.safetensors")
    export(base, settings, tree, trained_blocks(run, numbers), known, out)
    results = results_of(run, numbers)
    sentences, ended = (sum(r[name] for r in results) for name in ("sentences", "known"))
    share = f"{ended / sentences:.0%}" if sentences else ""
    ends = share and f", of whose {sentences} sentences it can end {share}"
    print(f"remembered {len(documents)} documents{ends}: {out}; your text is in {run}")


def show(wanted: bool, out: Path, run: Path) -> None:
    """What the model says now, if that is ``wanted``."""
    if wanted:
        print("\n".join(map(printable, look(load(out), documents_of(run)))))


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.remember",
        description="Teaches a model your documents: text, Markdown, HTML, PDF and JSON lines. The "
        "model that you give stays as it is."
        "\n\nPrints a plan, then makes NEW_DIR, a model directory that knows them. Stopped, it "
        "goes on with the same command.",
    )
    parser.add_argument(
        "documents", type=Path, metavar="DOCUMENTS",
        help="a file, or a folder of them, whose hidden files are passed over",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="a model directory, a Hub id, or demo")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="NEW_DIR", help="the model directory to make"
    )
    parser.add_argument(
        "--run", type=Path, help="what is needed to forget again, your text among it, which does "
        "not belong into a model that you pass on (default: NEW_DIR.run)",
    )  # fmt: skip
    parser.add_argument("--max-bytes", type=int, metavar="N", help="read no more text than that")
    parser.add_argument(
        "--passes", type=int, metavar="N", default=PASSES, help="over the text, more of them for "
        "more of it by heart (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", dest="passes", action="store_const", const=QUICK, help=f"{QUICK} passes: the "
        "gist of it, in a fraction of the time",
    )  # fmt: skip
    parser.add_argument(
        "--look", action="store_true", help="print the first halves of three sentences, and what "
        "the model says then",
    )  # fmt: skip
    parser.add_argument(
        "--restate", type=int, metavar="N", help="let the anchor write N questions with answers on "
        "each passage, and learn them too",
    )  # fmt: skip
    args = parser.parse_args(words)
    for name in ("max_bytes", "passes", "restate"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is not 1 or more", value, "give a number")
    run, files = run_folder(args.out, args.run), own_files(args.documents)
    base = open_base(args.model)
    wanted = {"passes": args.passes, "restate": args.restate or 0}
    if args.out.exists():
        if args.run is not None or not (run / "settings.json").exists():
            raise UserError("the destination exists", args.out, "choose another")
        same = {"source": source_of(files, args.max_bytes), "first": base.first, **wanted}
        check_same(Settings.load(run), run, anchor_hash=base.anchor_hash, **same)
        print(f"remembered before: {args.out}; your text is in {run}")
        show(args.look, args.out, run)
        return
    began = run.exists()
    try:
        with alone("train remember", run):
            trainer = prepare(base, args.documents, files, run, args.max_bytes, **wanted)
            remember(base, run, trainer, args.out)
            del base, trainer  # the anchor is loaded anew to look
            show(args.look, args.out, run)
    finally:
        if not began and not (run / "settings.json").exists():
            shutil.rmtree(run, ignore_errors=True)
