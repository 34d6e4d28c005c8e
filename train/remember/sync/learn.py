"""A run's documents are trained, whichever way their leaves were found."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from mlx_hmem.bank.documents import Document
from mlx_hmem.bank.format import Key
from mlx_hmem.retriever import ClusterTree

from ...data.taken_tokenizer import TakenTokenizer
from ..blocks import Trainer, results_of, subtrees_of, trained_blocks
from ..export import Base, knowledge, text_of
from ..restate import Writer, restate, restated
from ..run import OwnText, Settings, documents_of

Leaves = Callable[[OwnText, TakenTokenizer], np.ndarray]


class Learned(NamedTuple):
    """A run of which all is trained; ``documents``: what the model is to know of them."""

    run: Path
    settings: Settings
    text: OwnText
    paths: np.ndarray
    tree: ClusterTree
    documents: list[Document]

    @property
    def blocks(self) -> dict[Key, mx.array]:
        return trained_blocks(self.run, subtrees_of(self.paths))

    def said(self) -> str:
        """How much of it is known, for people."""
        results = results_of(self.run, subtrees_of(self.paths))
        sentences, ended = (sum(r[name] for r in results) for name in ("sentences", "known"))
        count, ends = len(self.documents), ""
        if sentences:
            ends = f", of whose {sentences} sentences it can end {ended / sentences:.0%}"
            ends += (
                " (more --passes into another --out learn more)" if 2 * ended < sentences else ""
            )
        return f"remembered {count} document{'' if count == 1 else 's'}{ends}"


def learn(base: Base, run: Path, trainer: Trainer, leaves: Leaves) -> Learned:
    """Trains what is not trained yet. ``leaves``: of the windows, kept with the tree in ``run``."""
    settings, documents = trainer.settings, documents_of(run)
    if settings.restate:
        writer = Writer.open(base, settings.restate, settings.seed)
        print(restate(run, writer, documents))
    text, tokenizer = text_of(base, documents, restated(run))
    paths = leaves(text, tokenizer)
    trainer.train(run, text, paths)
    known = knowledge(base, settings, text, paths, tokenizer)
    tree = ClusterTree.load(run / "tree.safetensors")
    return Learned(run, settings, text, paths, tree, known)
