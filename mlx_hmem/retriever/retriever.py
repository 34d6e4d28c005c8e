"""The retriever: from a text to its cluster path, by an encoder and a cluster tree."""

from collections.abc import Sequence

import numpy as np

from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError
from mlx_hmem.retriever.encoder import Encoder
from mlx_hmem.retriever.texts import check_texts
from mlx_hmem.retriever.tree import ClusterTree


class Retriever:
    """Routes texts. The tree must have been fitted to vectors of this very encoder."""

    def __init__(self, encoder: Encoder, tree: ClusterTree):
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

    def route(self, text: str) -> ClusterPath:
        """The cluster path of ``text``: the global cluster index on each level."""
        return self.tree.route(self.vector(text))

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
        paths = self.tree.route_batch(self.vectors(texts, progress))
        return [tuple(path) for path in paths.tolist()]
