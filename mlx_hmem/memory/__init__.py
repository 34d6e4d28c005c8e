"""What a block is: its shape, its starting values, how it joins a layer.

One module per memory kind. Arrays come in as arguments: nothing here knows of the bank.
"""

from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx


@dataclass(frozen=True)
class FetchedMemory:
    """The blocks of one cluster path.

    ``blocks[l]`` is the block of level l + 1, (layers, 3, r, hidden), or None where the level has
    no memory or its cluster is blocked. The generic memory is one block of sum(r) rows.
    """

    blocks: tuple[mx.array | None, ...]

    @cached_property
    def rows(self) -> mx.array | None:
        """The blocks joined along r: (layers, 3, sum of r, hidden); None if nothing was fetched."""
        present = [block for block in self.blocks if block is not None]
        if not present:
            return None
        return present[0] if len(present) == 1 else mx.concatenate(present, axis=2)
