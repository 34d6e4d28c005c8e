"""``mlx_hmem.remember DOCUMENTS --model MODEL --out DIR``: a model learns your documents, and is
brought up to date with them when they have changed.

The anchor stays as it is; the text goes into blocks of memory: into a bank of its own, or, where
the model has one, into new clusters behind those that are there. See docs/own_documents.md.
"""

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.tables import Records
from mlx_hmem.errors import ArgumentParser, UserError, printable
from mlx_hmem.folders import RECORD
from mlx_hmem.model.load import load

from ..corpus.own import Reading
from ..data.taken_tokenizer import TakenTokenizer
from ..stages import alone
from .blocks import Trainer
from .export import export, open_base, text_of
from .plan import PASSES, QUICK, check_size, found_lines, make_settings, plan_lines, text_bytes
from .proof import look
from .restate import Writer
from .run import SETTINGS, Settings, begin_run, check_same, documents_of, leaves_of, run_folder
from .sync.folder import files_of, read_new, source_of
from .sync.learn import Learned, learn
from .sync.swap import ANEW, NEXT, clear, put_in_place, settle
from .sync.update import Update, check_base
from .sync.watch import watch


class Remembering:
    """What a command line asks for, and the folder as it is now. ``asked``: settings that were
    given."""

    def __init__(self, args: Any):
        self.out, self.run = args.out, run_folder(args.out, args.run)
        self.own_run = args.run is None
        self.faults, self.every = Faults(), args.passed_over
        self.files, self.most_bytes = files_of(args.documents, self.faults), args.max_bytes
        self.records = Records(args.text_key)
        self.given = ", ".join(map(str, args.documents))
        self.source = source_of(self.files, self.most_bytes, self.records)
        self.asked = {
            name: value
            for name in ("passes", "restate")
            if (value := getattr(args, name)) is not None
        }
        self.dry_run, self.new_tree, self.look = args.dry_run, args.new_tree, args.look
        self.base = open_base(args.model)

    @property
    def whole(self) -> bool:
        """Whether the model is there, and no step of writing it is left."""
        return self.out.exists() and not (self.out / RECORD).exists()

    def go(self) -> None:
        """Makes the model or brings it up to date, and says what it did."""
        began = self.run.exists()
        try:
            with alone("train remember", self.run):
                settle(self.out, self.run)
                self._go()
        finally:
            if not began and not (self.run / SETTINGS).exists():
                shutil.rmtree(self.run, ignore_errors=True)

    def _go(self) -> None:
        if not (self.run / SETTINGS).exists():
            if self.out.exists():
                raise UserError("the destination exists", self.out, "choose another")
            return self._make(self.run)
        found = Settings.load(self.run)
        if not self.new_tree:
            check_same(found, self.run, **self.asked)
        check_base(found, self.base, self.out, None)
        same = found.source == self.source
        if self.new_tree:
            return self._make(self.run / ANEW)
        if same and not self.whole:
            return self._make(self.run)
        if same:
            return self._say("up to date")
        if not self.out.exists() and not self.own_run:  # it may be another model's
            check_same(found, self.run, source=self.source)
        if not self.out.exists() and not (self.run / "paths.npy").exists():  # nothing to keep
            if not self.dry_run:
                clear(self.run)
            return self._make(self.run)
        return self._update()

    def _make(self, run: Path) -> None:
        """Remembers the folder from its beginning in ``run``."""
        trainer = self._begin(run)
        if trainer is None:
            return
        leaves = partial(leaves_of, run, trainer.settings, self.base.encoder)
        learned = learn(self.base, run, trainer, leaves)
        del trainer
        said = learned.said()
        if run == self.run:
            self._export(learned, self.out)
        else:
            put_in_place(self.out, self.run, run, partial(self._export, learned))
        self._say(said)

    def _begin(self, run: Path) -> Trainer | None:
        """Begins a run after its plan, or finds the one that was begun; what trains it comes back,
        or None where only the plan is wanted."""
        base = self.base
        if (run / SETTINGS).exists() and Settings.load(run).source == self.source:
            print(f"goes on with {run}")
            found = Settings.load(run)
            check_same(found, run, **self.asked)
            check_base(found, base, self.out, None)
            tokenizer = TakenTokenizer(base.folder)
            return None if self.dry_run else Trainer(base.anchor[0], found, tokenizer)
        size = text_bytes(self.files)
        check_size(base, min(size, self.most_bytes or size), [self.run])
        reading, said = self._read()
        text, tokenizer = text_of(base, reading.documents)
        wanted = {"passes": PASSES, "restate": 0} | self.asked
        settings = make_settings(base, text, tokenizer, source=self.source, seed=0, **wanted)
        cost = None
        if settings.restate:
            cost = Writer.open(base, settings.restate, settings.seed).reckon(reading.documents)
        trainer = Trainer(base.anchor[0], settings, tokenizer)
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=self.run.parent) as work:
            seconds = trainer.seconds(text, Path(work))
        lines = plan_lines(base, text, settings, f"{said}, from {self.given}", seconds, cost)
        self._print_plan(lines)
        if self.dry_run:
            return None
        for other in {run, self.run / NEXT, self.run / ANEW} - {self.run}:
            shutil.rmtree(other, ignore_errors=True)
        begin_run(run, settings, reading.documents, reading.known)
        return trainer

    def _read(self) -> tuple[Reading, str]:
        """The documents, and in words what was found; what was passed over is named."""
        try:
            return read_new(self.base, self.files, self.most_bytes, self.records, self.faults)
        finally:
            self.faults.print(self.every)

    def _print_plan(self, lines: Iterable[str]) -> None:
        first, *others = lines
        said = (first, *found_lines(self.faults), *others)
        print("\n".join(map(printable, said)), flush=True)

    def _export(self, learned: Learned, folder: Path) -> None:
        tree, documents = learned.tree, learned.documents
        export(self.base, learned.settings, tree, learned.blocks, documents, folder)

    def _update(self) -> None:
        """Remembers what has changed, and forgets what is gone."""
        update = Update(self.base, self.out, self.run)
        if update.is_begun(self.source) and not self.dry_run:
            print(f"goes on with {update.next}")
        else:
            reading, said = self._read()
            if self.whole and update.is_known(reading):
                if not self.dry_run:
                    update.note(self.source)
                return self._say("up to date")
            self._print_plan(update.plan(reading, f"{said}, from {self.given}"))
            if self.dry_run:
                return None
            shutil.rmtree(self.run / ANEW, ignore_errors=True)
            update.begin(reading, self.source)
        self._say(update.make())
        return None

    def _say(self, what: str) -> None:
        """The last lines: ``what`` has become of the model, and what it says if that is wanted."""
        print(f"{what}: {self.out}; your text is in {self.run}")
        if self.look and not self.dry_run:
            del self.base  # the anchor is loaded anew
            print("\n".join(map(printable, look(load(self.out), documents_of(self.run)))))


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.remember",
        description="Teaches a model your documents: text of any kind, web pages, PDF, Word, "
        "books, tables, mail, JSON. The model that you give stays as it is."
        "\n\nPrints a plan, then makes DIR, a model directory that knows them. Where DIR exists "
        "it is brought up to date: what is new or has changed is learned, what is gone is "
        "forgotten. Stopped, it goes on with the same command.",
    )
    parser.add_argument(
        "documents", type=Path, nargs="+", metavar="DOCUMENTS",
        help="a file, or a folder of them, whose hidden files are passed over; or several",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="a model directory, a Hub id, or demo")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="the model directory to make, or to bring up to date",
    )  # fmt: skip
    parser.add_argument(
        "--run", type=Path, help="what is needed to forget again, your text among it, which does "
        "not belong into a model that you pass on (default: DIR.run)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and change nothing")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="do it again "
        "whenever the documents have changed and rested for so long (default: %(const)g)",
    )  # fmt: skip
    parser.add_argument(
        "--new-tree", action="store_true", help="remember all anew in clusters that fit the text "
        "as it is now, where DIR exists",
    )  # fmt: skip
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="where a JSON object has its text "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--passed-over", action="store_true", help="name every file that is not read, also those "
        "of kinds that hold no text",
    )  # fmt: skip
    parser.add_argument("--max-bytes", type=int, metavar="N", help="read no more text than that")
    parser.add_argument(
        "--passes", type=int, metavar="N", help="over the text, more of them for more of it by "
        f"heart (default: {PASSES}, or those of DIR)",
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
    if args.watch is None:
        Remembering(args).go()
        return
    if args.dry_run or args.new_tree:
        parser.error("--watch goes with neither --dry-run nor --new-tree")
    watch(args.documents, args.watch, lambda: Remembering(args).go())
