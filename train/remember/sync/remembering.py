"""What ``mlx_hmem.remember`` does, once: a model is made, or brought up to date."""

import json
import shutil
import tempfile
from collections.abc import Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import read_config
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.tables import Records
from mlx_hmem.errors import UserError, printable
from mlx_hmem.files import write_atomic
from mlx_hmem.folders import RECORD
from mlx_hmem.generation.template import chat_ids
from mlx_hmem.model.load import load
from mlx_hmem.model.tokenizer import read_tokenizer

from ...corpus.own import Reading
from ...data.taken_tokenizer import TakenTokenizer
from ...stages import alone
from ..blocks import Trainer
from ..export import export, open_base, text_of
from ..plan import check_size, found_lines, make_settings, plan_lines, text_bytes
from ..proof import look
from ..restate import Writer
from ..run import SETTINGS, Settings, begin_run, check_same, documents_of, leaves_of, run_folder
from .folder import read_new
from .learn import Learned, learn
from .listed import CHECKED, files_of, source_of, stamp
from .renewal import is_begun
from .swap import ANEW, NEXT, check_free, clear, put_in_place, settle
from .update import Update, check_base


class Remembering:
    """What a command line asks for, and the folder as it is now. ``asked``: settings that were
    given."""

    def __init__(self, args: Any):
        self.args, self.out, self.run = args, args.out, run_folder(args.out, args.run)
        self.own_run = args.run is None
        self.faults, self.records = Faults(), Records(args.text_key)
        self.files, self.most_bytes = files_of(args.documents, self.faults), args.max_bytes
        self.given = ", ".join(map(str, args.documents))
        self.source = source_of(self.files, self.most_bytes, self.records)
        asked = {"passes": args.passes, "quick": args.quick or None, "restate": args.restate}
        self.asked = {name: value for name, value in asked.items() if value is not None}
        self.dry_run, self.new_tree, self.look = args.dry_run, args.new_tree, args.look
        self.base = open_base(args.model)

    @property
    def whole(self) -> bool:
        """Whether the model is there, and no step of writing it is left."""
        return self.out.exists() and not (self.out / RECORD).exists()

    def go(self) -> None:
        """Makes the model or brings it up to date, and says what it did."""
        began = self.run.exists()
        if not (self.run / SETTINGS).exists():
            check_free(self.run)
        if self.dry_run and not began:
            return self._go()
        try:
            with alone("train remember", self.run):
                settle(self.out, self.run)
                self._go()
        finally:
            if not began and not (self.run / SETTINGS).exists():
                shutil.rmtree(self.run, ignore_errors=True)
        return None

    def _go(self) -> None:
        if not (self.run / SETTINGS).exists():
            if self.out.exists():
                remedy = f"choose another, or name its run (no {self.run / SETTINGS})"
                raise UserError("the destination exists", self.out, remedy)
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
            if self.args.passed_over:  # else it is said when they are read
                _ = self.reading
            return self._say("up to date")
        if not self.out.exists() and not self.own_run:  # it may be another model's
            check_same(found, self.run, source=self.source)
        if not self.out.exists() and not (self.run / "paths.npy").exists():  # nothing to keep
            print(f"begins anew: what was begun in {self.run} was of other documents")
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
        if is_begun(run, self.source):
            print(f"goes on with {run}")
            found = Settings.load(run)
            check_same(found, run, **self.asked)
            check_base(found, base, self.out, None)
            tokenizer = TakenTokenizer(base.folder)
            return None if self.dry_run else Trainer(base.anchor[0], found, tokenizer)
        if (chat := read_tokenizer(base.folder, read_config(base.folder))).has_chat_template:
            chat_ids(chat, None, [], "?")  # who could ask for what it will have learned?
        size = text_bytes(self.files)
        check_size(base, min(size, self.most_bytes or size), [self.run])
        reading, said = self.reading
        text, tokenizer = text_of(base, reading.documents)
        settings = make_settings(base, text, tokenizer, source=self.source, seed=0, **self.asked)
        cost = None
        if settings.restate:
            cost = Writer.open(base, settings.restate, settings.seed).reckon(reading.documents)
        trainer = Trainer(base.anchor[0], settings, tokenizer)
        beside = self.run.parent if self.run.exists() else None
        with tempfile.TemporaryDirectory(prefix=".plan-", dir=beside) as work:
            seconds = trainer.seconds(text, Path(work))
        lines = plan_lines(base, text, settings, f"{said}, from {self.given}", seconds, cost)
        self._print_plan(lines)
        if self.dry_run:
            return None
        for other in {run, self.run / NEXT, self.run / ANEW} - {self.run}:
            shutil.rmtree(other, ignore_errors=True)
        begin_run(run, settings, reading.documents, reading.known)
        return trainer

    @cached_property
    def reading(self) -> tuple[Reading, str]:
        """The documents, and in words what was found; what was passed over is named."""
        try:
            return read_new(self.base, self.files, self.most_bytes, self.records, self.faults)
        finally:
            self.faults.print(self.args.passed_over)

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
            reading, said = self.reading
            if self.whole and update.is_known(reading):
                if not self.dry_run:
                    update.note(self.source)
                return self._say("up to date")
            placed = update.place(reading)
            found = update.taught.settings
            # All is trained again, and there is nothing that a new tree would lose.
            if placed.share == 1 and update.is_plain and (why := placed.unfit(found)):
                print(f"remembers all anew in another tree: {why}")
                before = {name: getattr(found, name) for name in ("passes", "quick", "restate")}
                self.asked = before | self.asked
                return self._make(self.run / ANEW)
            self._print_plan(update.plan(reading, f"{said}, from {self.given}", placed))
            if self.dry_run:
                return None
            shutil.rmtree(self.run / ANEW, ignore_errors=True)
            update.begin(reading, self.source)
        self._say(update.make())
        return None

    def _say(self, what: str) -> None:
        """The last lines: ``what`` has become of the model, and what it says if that is wanted."""
        print(f"{what}: {self.out}; your text is in {self.run}")
        if not self.dry_run:
            checked = {"stamp": stamp(self.args, self.run, self.source)}
            write_atomic(self.run / CHECKED, json.dumps(checked) + "\n")
        if self.look and not self.dry_run:
            del self.base  # the anchor is loaded anew
            print("\n".join(map(printable, look(load(self.out), documents_of(self.run)))))
