"""What was fetched for a prompt, and what of it serves the next one."""

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import mlx.core as mx

from mlx_hmem.bank import Bank
from mlx_hmem.bank.read.arriving import ReplacingMemory, RowsByLayer
from mlx_hmem.bank.read.reader import Damaged
from mlx_hmem.bank.views import Barred
from mlx_hmem.config import ClusterPath
from mlx_hmem.errors import UserError, printable
from mlx_hmem.memory import Rows

MODES = ("fetched", "generic", "none")
NOTHING_NEAR = "nothing near"  # no document says what is asked, and there is no other memory
PASSAGES_ANSWER = "passages answer"
MOST_NAMED = 3  # documents, for people
Memory = Rows | RowsByLayer


@dataclass
class Fetch:
    """What was fetched for one prompt, from where and how long it took: without waiting, until the
    reading had begun. ``bank`` names the one it was fetched from, "" the first; ``name`` is
    that of the memory where it was chosen so. ``damage`` says of each block that was left out, in
    one line, why. ``why``: there is no memory, ``NOTHING_NEAR`` or ``PASSAGES_ANSWER``;
    ``documents``: the names of those that have taught the blocks, as far as they are known, first
    those that say the most of what was asked."""

    mode: str
    path: ClusterPath | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    bytes_read: int = 0
    route_ms: float = 0.0
    fetch_ms: float = 0.0
    rows: Memory | None = None
    blocked: Collection[Barred] = ()
    damaged: Damaged = "stop"
    damage: list[str] = field(default_factory=list)
    bank: str = ""
    name: str = ""
    why: str = ""
    documents: list[str] = field(default_factory=list)

    @property
    def arrived_ms(self) -> float:
        """``fetch_ms``; of a memory that is used while it is read, until all of it is there."""
        rows = self.rows
        arrived = 0.0 if rows is None or isinstance(rows, tuple) else rows.arrived_ms
        return arrived or self.fetch_ms

    def line(self) -> str:
        """Which memory it is, of which blocks from where, for people."""
        path = "" if self.path is None else f" {self.path}"
        path = f" of bank {self.bank},{path}" if self.bank else path
        path = f" {self.name}{path}" if self.name else path
        sources = ", ".join(f"level {b['level']} {b['source']}" for b in self.blocks)
        why = f": {self.why}" if self.why else ""
        taught = ", ".join(map(printable, self.documents[:MOST_NAMED]))
        taught = f", taught by {taught}" if taught else ""
        if (more := len(self.documents) - MOST_NAMED) > 0:
            taught += f" and {more} more"
        return f"memory: {self.mode}{why}{path}{f' ({sources})' if sources else ''}{taught}"

    def to_dict(self) -> dict[str, Any]:
        """All but the memory itself, as JSON values; ``fetch_ms`` is ``arrived_ms``."""
        return {
            "mode": self.mode,
            **({"bank": self.bank} if self.bank else {}),
            **({"name": self.name} if self.name else {}),
            **({"why": self.why} if self.why else {}),
            **({"documents": self.documents} if self.documents else {}),
            "path": None if self.path is None else list(self.path),
            "blocks": self.blocks,
            "bytes_read": self.bytes_read,
            "route_ms": round(self.route_ms, 3),
            "fetch_ms": round(self.arrived_ms, 3),
        }


def check_mode(memory: str) -> str:
    """``memory`` if it is one of ``MODES``, else UserError."""
    if memory not in MODES:
        raise UserError("unknown memory mode", repr(memory), f"use one of {', '.join(MODES)}")
    return memory


def check_named(memory: str, name: str | None) -> None:
    """Raises UserError where a name would choose nothing."""
    if name is not None and memory != "fetched":
        raise UserError(f"memory {memory} is not chosen by name", name, "leave the name out")


def begin(
    bank: Bank,
    path: ClusterPath,
    barred: frozenset[tuple[int, int]],
    before: Fetch | None,
    dtype: mx.Dtype,
) -> tuple[Memory | None, list[dict[str, Any]]]:
    """A memory whose reading has begun, and its blocks, the first of them those of ``before``."""
    keys = bank.keys_of(path, barred)
    had = [] if before is None or before.damage else before.blocks
    pairs = zip(keys, ((b["level"], b["cluster"]) for b in had), strict=False)
    same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    levels = [level for level, _ in keys]
    if (
        before is None
        or same == 0
        or levels != [b["level"] for b in had]
        or not isinstance(before.rows, RowsByLayer)
    ):
        memory = bank.begin(path, barred, dtype)
        return memory, [asdict(read) for read in memory.reads] if memory else []
    attached = [b | {"source": "attached"} for b in had[:same]]
    deeper = bank.begin(path, barred, dtype, above=levels[same - 1])
    if deeper is None:
        return before.rows, attached
    read = [asdict(read) for read in deeper.reads]
    return ReplacingMemory(before.rows.take(), deeper), attached + read
