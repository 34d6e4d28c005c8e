"""The memory banks of a model: the first, and those added beside it, each with its own tree.

All share the anchor and the encoder. The bank answers in which a document covers the most of a
text, if one covers enough of it. Otherwise the text is routed in every tree, but for the clusters
of such documents, and the bank answers whose deepest centroid on the route points most nearly where
the text does (cosine); where there are no other clusters, nothing is near. Who asks under a view
sees no more of the banks than that view allows, and the readers keep to it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlx_hmem.bank import Bank
from mlx_hmem.bank.documents import Document
from mlx_hmem.bank.format import Key
from mlx_hmem.bank.views import Barred, Views, check_barred, of_bank, view_called
from mlx_hmem.config import ClusterPath, not_routed
from mlx_hmem.errors import UserError
from mlx_hmem.retriever import ClusterTree, Retriever


class RoutedBank(NamedTuple):
    """A bank with the retriever that finds its clusters, None where paths are given by hand or by
    their ``names``, and the documents that are known to have taught it."""

    retriever: Retriever | None
    bank: Bank
    names: Mapping[str, ClusterPath] = {}
    documents: Sequence[Document] = ()


class Banks:
    """Banks by name, "" being the first.

    Attributes: ``parts``, those that may be fetched from; ``views``, what each view bars.
    """

    def __init__(
        self,
        whole: Mapping[str, RoutedBank],
        views: Views,
        allowed: Mapping[str, RoutedBank] | None = None,
        inside: Sequence[Barred] | None = None,
    ):
        """``allowed``: what of the ``whole`` may be fetched from; None: all. ``inside``: what the
        views that were asked for by name bar; None before the first."""
        self._whole, self.parts, self.views = whole, whole if allowed is None else allowed, views
        self._inside = inside

    def under(self, view: str | None) -> "Banks":
        """The same open banks for someone who may fetch what this view allows; None: "default".

        A view that was asked for by name is not left again: another one bars more beside it.
        """
        barred = (*(self._inside or ()), *view_called(self.views, view))
        inside = None if view is None and self._inside is None else barred
        allowed = {
            name: part._replace(bank=part.bank.view(paths)) if paths else part
            for name, part in self._whole.items()
            if (paths := of_bank(barred, name)) is not None
        }
        return Banks(self._whole, self.views, allowed, inside)

    def narrowed(self, blocked: Collection[Barred], only: str | None = None) -> "Banks":
        """The same open banks without what is ``blocked``, and of them the one called ``only``.
        UserError: a path leads to no cluster, or there is no such bank to fetch from."""
        if only is not None:
            self.bank(only)
        configs = {name: part.bank.config for name, part in self._whole.items()}
        barred = [check_barred(path, configs, self.parts) for path in blocked]
        allowed = {
            name: part._replace(bank=part.bank.view(paths))
            for name, part in self.parts.items()
            if only in (None, name) and (paths := of_bank(barred, name)) is not None
        }
        if not allowed:
            raise UserError("no bank is left to fetch from", only or "all are barred", "bar less")
        return Banks(self._whole, self.views, allowed, (*(self._inside or ()), *barred))

    def retriever(self, name: str | None = None) -> Retriever:
        """That of the bank of this name, of the first that may be fetched from without; errors as
        of :meth:`bank`, and a UserError where it has none."""
        name = next(iter(self.parts)) if name is None else name
        self.bank(name)
        if (retriever := self.parts[name].retriever) is None:
            raise not_routed(self.names)
        return retriever

    @property
    def names(self) -> list[str]:
        """Of the memories that may be chosen by name; none whose last block is barred."""
        return list(
            dict.fromkeys(
                name
                for part in self.parts.values()
                for name, path in part.names.items()
                if not part.bank.bars(len(path), path[-1])
            )
        )

    def named(self, name: str) -> tuple[str, ClusterPath]:
        """The bank and the cluster path of a memory that has a name; UserError if none has it."""
        for bank, part in self.parts.items():
            if name in part.names:
                return bank, part.names[name]
        known = ", ".join(self.names)
        remedy = f"known: {known}" if known else "leave it out: the text chooses the memory"
        raise UserError("no memory of this name", name, remedy)

    def bank(self, name: str = "") -> Bank:
        """The bank of this name; UserError if there is none, or this view bars it."""
        if name not in self.parts:
            known = ", ".join(filter(None, self.parts)) or "there is only the first"
            raise UserError("no such bank to fetch from", name, f"known: {known}")
        return self.parts[name].bank

    def taught_by(
        self,
        name: str,
        path: ClusterPath,
        barred: frozenset[Key],
        text: str | None = None,
        around: str | None = None,
    ) -> dict[Document, float]:
        """The documents that have taught all blocks of a path in the bank ``name``; none where one
        of these is ``barred`` or may not be fetched. Those come first that cover the most of
        ``text``, how much being their value, 0 where it is not known; ``around``: as of
        :meth:`near`."""
        bank, part = self.bank(name), self.parts[name]
        if any(key in barred or bank.bars(*key) for key in enumerate(path, 1)):
            return {}
        found = {d: 0.0 for d in part.documents if path in d.clusters}
        if text is not None and part.retriever is not None:
            places = ((d, leaf) for d in part.documents for leaf in d.taught)
            covered = part.retriever.covered(text, around)
            pairs = zip(places, covered.tolist(), strict=True)
            found |= {d: value for (d, leaf), value in pairs if leaf == path}
        return dict(sorted(found.items(), key=lambda each: -each[1]))

    def blocked_in(self, blocked: Collection[Barred], name: str) -> list[ClusterPath]:
        """Those of ``blocked`` that lie in this bank; all of level 1 where it is named alone."""
        if not any(isinstance(path, tuple | list) and _is_named(path) for path in blocked):
            return [] if name else list(blocked)  # type: ignore[arg-type]
        configs = {name: part.bank.config for name, part in self._whole.items()}
        paths = of_bank([check_barred(path, configs, self.parts) for path in blocked], name)
        if paths is None:
            return [(cluster,) for cluster in range(configs[name].num_clusters[0])]
        return paths

    def bars(self, name: str, level: int, cluster: int, blocked: Collection[Barred] = ()) -> bool:
        """Whether a block of the bank ``name`` may not be fetched here; one that is not there may
        not."""
        if name not in self.parts or level > self.parts[name].bank.config.num_levels:
            return True
        return self.bank(name).view(self.blocked_in(blocked, name)).bars(level, cluster)

    def route(self, text: str, blocked: Collection[Barred] = ()) -> tuple[str, ClusterPath | None]:
        """The bank that answers a text, and the cluster path in it, None where nothing is near."""
        return self.near(text) or self.nearest(self.retriever().vector(text), blocked)

    def near(self, text: str, around: str | None = None) -> tuple[str, ClusterPath] | None:
        """As :meth:`route`, where a document is near the text; see :meth:`Retriever.near`."""
        each = ((name, self.retriever(name).near(text, around)) for name in self.parts)
        found = {name: near for name, near in each if near is not None}
        if not found:
            return None
        name = max(found, key=lambda name: found[name].covered)
        return name, found[name].path

    def nearest(
        self, vector: np.ndarray, blocked: Collection[Barred] = ()
    ) -> tuple[str, ClusterPath | None]:
        """As :meth:`route`, of a text with this vector (dim,) that no document is near.

        Each bank is judged by its deepest cluster on the route that may be fetched; the first
        answers where two are equal, or where none may be fetched from.
        """
        found: list[tuple[float, str, ClusterPath | None]] = [(-3.0, "", None)]
        for name, part in self.parts.items():
            bank, retriever = part.bank, self.retriever(name)
            if retriever.rest is None:
                continue
            path = retriever.rest.route(vector)
            if len(self.parts) == 1:
                return name, path
            paths = self.blocked_in(blocked, name)
            keys = bank.keys_of(path, bank.config.check_blocked(paths))
            nearness = _cosine(retriever.tree, keys[-1], vector) if keys else -2.0
            found.append((nearness, name, path))
        return max(found, key=lambda each: each[0])[1:]


def _cosine(tree: ClusterTree, key: tuple[int, int], vector: np.ndarray) -> float:
    level, cluster = key
    centroid = np.asarray(tree.centroids[level - 1][cluster], np.float64)
    lengths = float(np.linalg.norm(centroid) * np.linalg.norm(vector))
    return float(centroid @ vector) / lengths if lengths else -1.0


def _is_named(path: Sequence[int | str]) -> bool:
    return bool(path) and isinstance(path[0], str)
