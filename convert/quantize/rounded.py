"""A bank that gives out some levels rounded, as it would if it had been written so."""

from collections.abc import Mapping
from dataclasses import replace

from mlx_hmem.bank import Bank, Quantization
from mlx_hmem.bank.format import GENERIC, Key
from mlx_hmem.bank.quantization import packed_block, quantize_block
from mlx_hmem.bank.read.reader import Damaged
from mlx_hmem.config import ClusterPath
from mlx_hmem.memory import Block, FetchedMemory, float_block


class Lost(Exception):  # noqa: N818  nothing is wrong with the bank
    """Little is left of a block in its new form."""


class RoundedBank(Bank):
    """An open bank, whose blocks of the levels that ``forms`` names are quantised as they are
    fetched. Raises :class:`Lost` where :func:`quantize_block` refuses one."""

    def __init__(self, bank: Bank, forms: Mapping[int, Quantization]):
        vars(self).update(vars(bank))  # its files and kept blocks
        self._forms = forms

    def fetch(
        self, path: ClusterPath, blocked: frozenset[Key] = frozenset(), damaged: Damaged = "stop"
    ) -> FetchedMemory:
        return self._rounded(super().fetch(path, blocked, damaged), first=1)

    def generic(self, damaged: Damaged = "stop") -> FetchedMemory:
        return self._rounded(super().generic(damaged), first=GENERIC)

    def _rounded(self, memory: FetchedMemory, first: int) -> FetchedMemory:
        """``first``: the level of the first block."""
        blocks = tuple(self._block(*each) for each in enumerate(memory.stored, first))
        return replace(memory, stored=blocks)

    def _block(self, level: int, block: Block | None) -> Block | None:
        if block is None or (form := self._forms.get(level)) is None:
            return block
        floats = float_block(block)
        try:
            parts = quantize_block(floats, self.config, form)
        except ValueError as error:
            raise Lost(error) from None
        return packed_block(parts, self.config, floats.dtype, form)
