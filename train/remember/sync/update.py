"""Brings a model up to date with the folder that it was taught, and says beforehand how.

The next run lies in ``next`` in the run's folder until the model is made. What is trained again,
and how the model is written, are the ways of :mod:`train.remember.forget`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mlx_hmem.bank.documents import Document
from mlx_hmem.bank.views import VIEWS
from mlx_hmem.errors import UserError
from mlx_hmem.model.find import BANK_FOLDER

from ...corpus.own import Reading
from ...data.arrays import load_mapped, save_array
from ...data.taken_tokenizer import TakenTokenizer
from ..blocks import Trainer, subtrees_of
from ..export import Base, export, open_bases, text_of
from ..forget import write_model
from ..rest import Rest, Taught
from ..restate import restated
from ..run import OwnText, Settings
from .changes import Changes
from .learn import learn
from .renewal import Placed, begin_next, is_begun, place, take_over, touched_by
from .swap import NEXT, put_in_place


class Update:
    """The model ``out`` and its run, which are to follow a folder; ``out`` may be missing.

    Raises UserError unless both were made from the model ``base``.
    """

    def __init__(self, base: Base, out: Path, run: Path):
        self.base, self.out, self.run, self.next = base, out, run, run / NEXT
        self.bases = open_bases(str(out)) if out.exists() else {}
        self.taught = Taught.open(run, self.bases)
        check_base(self.taught.settings, base, out, self.bases.get(""))

    @cached_property
    def before(self) -> tuple[OwnText, np.ndarray]:
        """The text that is known, and its paths."""
        text, _ = text_of(self.base, self.taught.documents, restated(self.run))
        return text, self.taught.paths(text, self.bases)

    @property
    def is_plain(self) -> bool:
        """Whether neither views nor banks were added to the model."""
        return len(self.bases) < 2 and not (self.out / BANK_FOLDER / VIEWS).exists()

    def place(self, reading: Reading) -> Placed:
        """Where the windows of the documents would lie."""
        text, tokenizer = text_of(self.base, reading.documents, restated(self.run))
        return place(self.taught, *self.before, text, self.base.encoder, tokenizer)

    def plan(self, reading: Reading, said: str, placed: Placed) -> Iterator[str]:
        """What has changed, and what that will take, for people."""
        changes = Changes.of(self.taught.documents, reading.documents)
        yield f"{'documents':<16}{said}: {changes.said()}"
        yield from changes.lines()
        count = len({*subtrees_of(placed.paths), *subtrees_of(self.before[1])})
        again = f"{len(placed.touched)} of {count} clusters of level 1"
        yield f"{'trained again':<16}{again}, {placed.share:.0%} of the text"
        yield f"{'tree':<16}{placed.said()}"
        if why := placed.unfit(self.taught.settings):
            yield f"{'':<16}it no longer fits: {why}; --new-tree remembers all anew in another"

    def is_known(self, reading: Reading) -> bool:
        """Whether all is known as it was read."""
        known = {sha256: tuple(names) for sha256, names in reading.known.items()}
        return reading.documents == self.taught.documents and known == self.taught.known

    def note(self, source: str) -> None:
        """The run is of the folder as it is now, whose files have changed but not what they say."""
        replace(self.taught.settings, source=source).save(self.run)

    def is_begun(self, source: str) -> bool:
        """Whether an update to this state of the folder was begun before."""
        return is_begun(self.next, source)

    def begin(self, reading: Reading, source: str) -> None:
        begin_next(self.taught, self.next, reading, source)

    def make(self) -> str:
        """Trains what is not trained yet, and puts the model in its place; in words what it is."""
        settings = Settings.load(self.next)
        trainer = Trainer(self.base.anchor[0], settings, TakenTokenizer(self.base.folder))
        learned = learn(self.base, self.next, trainer, self._leaves)
        own = {document.sha256 for document in self.taught.documents}

        def known_to(base: Base) -> list[Document]:
            others = [d for d in base.documents if d.sha256 not in own]
            return [*others, *learned.documents]

        def write(folder: Path) -> None:
            run, settings, text, paths, tree, documents = learned
            if not self.bases:
                export(self.base, settings, tree, learned.blocks, documents, folder)
                return
            touched = touched_by(*self.before, text, paths)
            rest = Rest(run, settings, text, paths, tree, touched, self.taught.banks)
            write_model(self.bases, [rest], known_to, folder)

        said = learned.said()
        put_in_place(self.out, self.run, self.next, write)
        return said

    def _leaves(self, text: OwnText, tokenizer: TakenTokenizer) -> np.ndarray:
        """Of the next run's windows, and what stays of the old one's blocks is taken over."""
        file = self.next / "paths.npy"
        if not file.exists():
            placed = place(self.taught, *self.before, text, self.base.encoder, tokenizer)
            placed.tree.save(self.next / "tree.safetensors", self.taught.settings.encoder_hash)
            save_array(file, placed.paths)
        paths = load_mapped(file)
        stay = set(subtrees_of(paths)) - touched_by(*self.before, text, paths)
        take_over(self.run, self.next, stay)
        return paths


def check_base(settings: Settings, base: Base, out: Path, own: Base | None) -> None:
    """Raises UserError unless a run, and the model ``own`` that it made, began from ``base``."""
    same = settings.anchor_hash == base.anchor_hash and settings.first == base.first
    if same and own is not None and own.tree is not None and base.tree is not None:
        pairs = zip(own.tree.centroids, base.tree.centroids, strict=True)
        same = all(np.array_equal(np.asarray(a)[: len(b)], np.asarray(b)) for a, b in pairs)
    if not same:
        remedy = "give the model that it was made from, or another --out"
        raise UserError(f"{out} was made from another model", base.folder, remedy)
