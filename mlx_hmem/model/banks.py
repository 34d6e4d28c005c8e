"""The memory banks of a model: the first, and those added beside it, each with its own tree.

All share the anchor and the encoder. A text is routed in every tree; the bank answers whose deepest
centroid on the route points most nearly where the text does (cosine). Who asks under a view sees
no more of them than that view allows, and the readers keep to it.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mlx_hmem.bank import Bank
from mlx_hmem.bank.views import Barred, Views, check_barred, of_bank, view_called
from mlx_hmem.config import ClusterPath, not_routed
from mlx_hmem.errors import UserError
from mlx_hmem.retriever import ClusterTree, Retriever


class RoutedBank(NamedTuple):
    """A bank with the retriever that finds its clusters, None where paths are given by hand or by
    their ``names``."""

    retriever: Retriever | None
    bank: Bank
    names: Mapping[str, ClusterPath] = {}


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

    def retriever(self, name: str = "") -> Retriever:
        """That of the bank of this name, as :meth:`bank`; UserError where it has none."""
        self.bank(name)
        if (retriever := self.parts[name].retriever) is None:
            raise not_routed(self.names)
        return retriever

    @property
    def names(self) -> list[str]:
        """Of the memories that may be chosen by name."""
        return list(dict.fromkeys(name for part in self.parts.values() for name in part.names))

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

    def blocked_in(self, blocked: Collection[Barred], name: str) -> list[ClusterPath]:
        """Those of ``blocked`` that lie in this bank; all of level 1 where it is named alone."""
        if not any(isinstance(path, tuple | list) and _is_named(path) for path in blocked):
            return [] if name else list(blocked)  # type: ignore[arg-type]
        configs = {name: part.bank.config for name, part in self._whole.items()}
        paths = of_bank([check_barred(path, configs) for path in blocked], name)
        if paths is None:
            return [(cluster,) for cluster in range(configs[name].num_clusters[0])]
        return paths

    def nearest(
        self, vector: np.ndarray, blocked: Collection[Barred] = ()
    ) -> tuple[str, ClusterPath]:
        """The bank that answers a text with this vector (dim,), and the cluster path in it.

        Each bank is judged by its deepest cluster on the route that may be fetched; the first
        answers where two are equal, or where none may be fetched from.
        """
        found: list[tuple[float, str, ClusterPath]] = []
        for name, (_, bank, _) in self.parts.items():
            retriever = self.retriever(name)
            path = retriever.tree.route(vector)
            if len(self.parts) == 1:
                return name, path
            paths = self.blocked_in(blocked, name)
            keys = bank.keys_of(path, bank.config.check_blocked(paths))
            nearness = _cosine(retriever.tree, keys[-1], vector) if keys else -2.0
            found.append((nearness, name, path))
        _, name, path = max(found, key=lambda each: each[0])
        return name, path


def _cosine(tree: ClusterTree, key: tuple[int, int], vector: np.ndarray) -> float:
    level, cluster = key
    centroid = np.asarray(tree.centroids[level - 1][cluster], np.float64)
    lengths = float(np.linalg.norm(centroid) * np.linalg.norm(vector))
    return float(centroid @ vector) / lengths if lengths else -1.0


def _is_named(path: Sequence[int | str]) -> bool:
    return bool(path) and isinstance(path[0], str)
