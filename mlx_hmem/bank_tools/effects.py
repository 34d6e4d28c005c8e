"""How much each block changes the loss on given texts.

A window of a text is predicted with the whole memory of its route, and again with each of its
blocks left out. What the loss rises by is that block's effect: it has helped where it is positive.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from mlx_hmem.config import ClusterPath
from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.readers import own_files, read_own
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate.perplexity import windows
from mlx_hmem.evaluate.scoring import longest_sequence
from mlx_hmem.memory import FetchedMemory
from mlx_hmem.model.model import MemoryModel

LONGEST = 1024  # window, in tokens


class Routed(NamedTuple):
    """Where a text went: the route of its beginning, and how much its memory lowered the loss."""

    name: str
    bank: str
    path: ClusterPath
    tokens: int
    without: float  # nats for each token, the anchor alone
    fetched: float


@dataclass
class Effect:
    """Of one block: the tokens it was fetched for, and the nats that it saved on them."""

    tokens: int = 0
    nats: float = 0.0

    @property
    def per_token(self) -> float:
        return self.nats / self.tokens if self.tokens else 0.0


@dataclass
class Effects:
    """On some texts: of each block by bank, level and cluster, and of each text as a whole."""

    blocks: dict[tuple[str, int, int], Effect] = field(default_factory=lambda: defaultdict(Effect))
    texts: list[Routed] = field(default_factory=list)


def read_named_texts(path: Path) -> list[tuple[str, str]]:
    """The texts of a file, or of the files of a folder, each with a name: what ``remember`` reads
    of them."""
    faults = Faults()
    found = list(read_own(own_files(path, faults), faults))
    faults.print()
    if not found:
        raise UserError("there is no text", path, "give a file or a folder with text in it")
    return found


def measure(model: MemoryModel, texts: Sequence[tuple[str, str]]) -> Effects:
    """The effects of the blocks of a model on texts, each a name and what it says."""
    effects = Effects()
    for name, text in tqdm(texts, desc="effects", unit="text", delay=2):
        first: tuple[str, ClusterPath] | None = None
        sums = [0.0, 0.0]
        tokens = 0
        for ids, window in windows(model, text, longest_sequence(model, LONGEST)):
            where = model.route(window)
            first = first or where
            count = len(ids) - 1
            whole, nothing = _measure_window(model, ids, *where, effects)
            sums = [sums[0] + nothing, sums[1] + whole]
            tokens += count
        if first is not None:
            effects.texts.append(Routed(name, *first, tokens, *(s / tokens for s in sums)))
    return effects


def _measure_window(
    model: MemoryModel, ids: list[int], bank: str, path: ClusterPath, effects: Effects
) -> tuple[float, float]:
    """The loss of a window in nats with all its blocks and with none; adds what each saved."""
    source = model.require_banks().bank(bank)
    keys, batch = source.keys_of(path), mx.array([ids])
    blocks = source.blocks(keys)

    def loss(kept: Sequence[mx.array]) -> float:
        rows = model.rows_of([FetchedMemory(tuple(kept), source.config)])
        logits = model.with_rows(rows)(batch[:, :-1]).astype(mx.float32)
        nats: Any = nn.losses.cross_entropy(logits, batch[:, 1:], reduction="sum").item()
        return nats

    whole, nothing = loss(blocks), loss([])
    for place, (level, cluster) in enumerate(keys):
        rest = blocks[:place] + blocks[place + 1 :]
        effect = effects.blocks[bank, level, cluster]
        effect.nats += (loss(rest) if rest else nothing) - whole
        effect.tokens += len(ids) - 1
    return whole, nothing
