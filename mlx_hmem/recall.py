"""What was fetched for a prompt."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

from mlx_hmem.bank.arriving import ArrivingMemory
from mlx_hmem.bank.replacing import ReplacingMemory
from mlx_hmem.bank.views import Barred
from mlx_hmem.errors import UserError
from mlx_hmem.memory import Rows

MODES = ("fetched", "generic", "none")
Path_ = tuple[int, ...]
Damaged = Literal["stop", "skip"]
Memory = Rows | ArrivingMemory | ReplacingMemory


@dataclass
class Recall:
    """What was fetched for one prompt, from where and how long it took: without waiting, until the
    reading had begun. ``bank`` names the one it was fetched from, "" the first. ``damage`` says of
    each block that was left out, in one line, why."""

    mode: str
    path: Path_ | None = None
    blocks: list[dict[str, Any]] = field(default_factory=list)
    bytes_read: int = 0
    route_ms: float = 0.0
    fetch_ms: float = 0.0
    rows: Memory | None = None
    blocked: Collection[Barred] = ()
    damaged: Damaged = "stop"
    damage: list[str] = field(default_factory=list)
    bank: str = ""

    @property
    def arrived_ms(self) -> float:
        """``fetch_ms``; of a memory that is used while it is read, until all of it is there."""
        rows = self.rows
        arrived = 0.0 if rows is None or isinstance(rows, tuple) else rows.arrived_ms
        return arrived or self.fetch_ms

    def to_dict(self) -> dict[str, Any]:
        """All but the memory itself, as JSON values; ``fetch_ms`` is ``arrived_ms``."""
        return {
            "mode": self.mode,
            **({"bank": self.bank} if self.bank else {}),
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
