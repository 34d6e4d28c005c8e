"""The retriever: from a text to its cluster path, by an encoder and a cluster tree.

Of clusters that documents have taught, and of which it is known with what words, the words decide
(:mod:`.words`): a question lies far from the windows that answer it, and near to others.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.retriever.encoder import Encoder
from mlx_hmem.retriever.texts import check_texts
from mlx_hmem.retriever.tree import ClusterTree
from mlx_hmem.retriever.words import NEAR, WordIndex


class Near(NamedTuple):
    """The leaf of the document that covers the most of a text, and how much that is."""

    covered: float
    path: ClusterPath


class Retriever:
    """Routes texts. The tree must have been fitted to vectors of this very encoder.

    Attributes: ``rest``, the tree without the clusters of level 1 whose words are known; None where
    it has no others.
    """

    def __init__(
        self, encoder: Encoder, tree: ClusterTree, taught: Sequence[tuple[ClusterPath, str]] = ()
    ):
        """``taught``: of each document and each leaf that it has taught the path, and its words
        there, apart by spaces."""
        # None: fitted in this process and never saved; its maker knows the encoder.
        if tree.encoder_hash is not None and tree.encoder_hash != encoder.fingerprint:
            raise UserError(
                f"the cluster tree belongs to another encoder than {encoder.name}",
                f"{tree.encoder_hash}, not {encoder.fingerprint}",
                "load the encoder it was made with, or fit a tree to this one",
            )
        if tree.dim != encoder.dim:
            raise UserError(
                f"the cluster tree does not fit encoder {encoder.name}",
                f"{tree.dim} dimensions, not {encoder.dim}",
                "fit a tree to this encoder's vectors",
            )
        self.encoder = encoder
        self.tree = tree
        self._leaves = [path for path, _ in taught]
        bags = [words.split() for _, words in taught]
        self._words = WordIndex(encoder.tokenizer, bags) if taught else None
        self.rest = tree.without({path[0] for path in self._leaves})

    def near(self, text: str, around: str | None = None) -> Near | None:
        """What is known of ``text`` by its words; None where no document covers enough of it.

        ``around``: the last words of a conversation, the text's among them.
        """
        if self._words is None:
            return None
        covered = self._words.covered(text, around)
        best = int(covered.argmax())
        return Near(float(covered[best]), self._leaves[best]) if covered[best] >= NEAR else None

    def covered(self, text: str, around: str | None = None) -> np.ndarray:
        """How much of ``text`` each document has in each leaf, in the order of ``taught``,
        (leaves,) float64 from 0 to 1; ``around`` as of :meth:`near`."""
        return np.zeros(0) if self._words is None else self._words.covered(text, around)

    def route(self, text: str) -> ClusterPath:
        """The cluster path of ``text``: the global cluster index on each level. Where nothing is
        near it, that of the rest of the tree, or else of all of it."""
        near = self.near(text)
        return near.path if near is not None else (self.rest or self.tree).route(self.vector(text))

    def vector(self, text: str) -> np.ndarray:
        """What ``text`` is routed by, (dim,); :class:`UserError` where it is empty."""
        return self.vectors([text])[0]

    def vectors(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """As :meth:`vector`, of many, (n, dim)."""
        texts = check_texts(texts)
        for index, text in enumerate(texts):
            if not text.strip():
                raise UserError("an empty text has no cluster path", f"text {index}", "give words")
        return self.encoder.encode(texts, progress=progress)

    def route_many(self, texts: Sequence[str], progress: bool = False) -> list[ClusterPath]:
        """The cluster path of each text; :class:`UserError` where one is empty.

        A text alone and in a batch may round differently in the encoder (about 1e-7), which can
        move one that lies exactly between two clusters.
        """
        if not texts:
            return []
        paths = (self.rest or self.tree).route_batch(self.vectors(texts, progress))
        by_words: Mapping[int, ClusterPath] = {
            n: near.path for n, text in enumerate(texts) if (near := self.near(text)) is not None
        }
        return [by_words.get(n, tuple(path)) for n, path in enumerate(paths.tolist())]
