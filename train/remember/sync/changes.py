"""What has become of a folder since it was remembered, document by document."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mlx_hmem.errors import printable

from ...corpus.own import OwnDocument

MOST_NAMED = 20  # of each kind of change, for people


@dataclass
class Changes:
    """Names of documents; ``changed``: another text by the same name; ``renamed``: the same text by
    another name, old and new. ``also``: other names of documents have come or gone."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    renamed: list[tuple[str, str]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    unchanged: int = 0

    @classmethod
    def of(cls, old: Sequence[OwnDocument], new: Sequence[OwnDocument]) -> "Changes":
        before, after = ({d.sha256: d.name for d in own} for own in (old, new))
        result = cls()
        for sha256 in sorted(before.keys() & after.keys(), key=before.__getitem__):
            if before[sha256] == after[sha256]:
                result.unchanged += 1
            else:
                result.renamed.append((before[sha256], after[sha256]))
        came = Counter(name for sha256, name in after.items() if sha256 not in before)
        went = Counter(name for sha256, name in before.items() if sha256 not in after)
        result.changed = sorted((came & went).elements())
        result.added = sorted((came - went).elements())
        result.gone = sorted((went - came).elements())
        return result

    def said(self) -> str:
        """How many of each kind, for people."""
        kinds = ("added", "changed", "renamed", "gone")
        counts = [f"{len(own)} {kind}" for kind in kinds if (own := getattr(self, kind))]
        return ", ".join([*counts, f"{self.unchanged:,} unchanged"])

    def lines(self) -> Iterator[str]:
        """Their names, for people."""
        for kind in ("added", "changed", "renamed", "gone"):
            own = getattr(self, kind)
            for name in own[:MOST_NAMED]:
                name = " → ".join(name) if isinstance(name, tuple) else name
                yield f"  {kind:<14}{printable(name)}"
            if len(own) > MOST_NAMED:
                yield f"  {kind:<14}and {len(own) - MOST_NAMED:,} more"
