"""Writes a memory bank anew with levels quantised or in another dtype, block by block.

What each level lost is measured as it passes. A shard that is written leaves a note of its
checksums and its error beside it, so that a stopped run goes on behind the last whole shard. Memory
is bounded by a few copies of one block. A block of zeros is neither read nor written.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from mlx_hmem.bank import Bank, Manifest, Quantization
from mlx_hmem.bank.format import GENERIC, PAGE, Shard, num_blocks
from mlx_hmem.bank.quantization import RoundingErrors, dequantize_block, quantize_block
from mlx_hmem.bank.writer import Stored, bytes_of_parts, rewrite_bank, stored_block, stored_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from mlx_hmem.reading import read_json

NOTES = "notes"  # a folder beside the shards, of one JSON file for each that is whole


@dataclass
class LevelErrors(RoundingErrors):
    """The errors of several blocks, and the largest relative error of one of them."""

    worst: float = 0.0

    def merge(self, other: RoundingErrors, worst: float) -> None:
        self.squares += other.squares
        self.differences += other.differences
        self.worst = max(self.worst, worst)


@dataclass(frozen=True)
class LevelChange:
    """A level before and after; level 0 is the generic memory. Bytes are those of its files."""

    level: int
    blocks: int
    quantization: Quantization | None
    bytes_before: int
    bytes_after: int
    error: float
    worst_error: float


class BankChange(NamedTuple):
    """What becomes of a bank: ``after`` is a manifest without shards."""

    before: Manifest
    after: Manifest

    @classmethod
    def planned(
        cls, before: Manifest, chosen: dict[int, Quantization], dtype: str | None = None
    ) -> "BankChange":
        """Checks that the levels ``chosen`` can be quantised so, and not for a second time."""
        kept = {q.level: q for q in before.quantization or ()}
        if kept and dtype not in (None, before.dtype):
            raise UserError(
                "a bank with quantised levels keeps its dtype",
                before.dtype,
                "start from the bank as it was before",
            )
        if twice := sorted(kept.keys() & chosen.keys()):
            raise UserError(
                f"{level_title(twice[0])} of the bank is quantised already",
                "{mode} {bits} bits, groups of {group_size}".format_map(kept[twice[0]].options),
                f"start from the bank as it was before, or add --bank-level {twice[0]}:none",
            )
        both = {**kept, **chosen}
        quantization = tuple(both[level] for level in sorted(both)) or None
        hashes = (before.anchor_hash, before.tree_hash)
        after = Manifest.planned(before.memory, dtype or before.dtype, quantization, *hashes)
        return cls(before, after)

    def keeps(self, level: int) -> bool:
        """Whether the blocks of a level stay what they are, byte for byte."""
        same = self.after.quantization_of(level) == self.before.quantization_of(level)
        return same and self.after.dtype == self.before.dtype

    @property
    def bytes_needed(self) -> int:
        """Bytes on the disk, without what blocks of zeros save."""
        total = 0
        for before, after in zip(self.before.all_levels, self.after.all_levels, strict=True):
            filled = sum(checksum != before.zeros for checksum in before.checksums)
            total += PAGE * len(before.shards) + after.block_stride * filled
        return total


def level_title(level: int) -> str:
    return "the generic memory" if level == GENERIC else f"level {level}"


def change_bank(
    source: Path, target: Path, change: BankChange, anchor_hash: str
) -> list[LevelChange]:
    """Writes the bank in ``source`` to ``target`` as ``change`` says, tied to another anchor.

    Shards that an earlier call has left in ``target`` are not written again. ``bank.json`` comes
    last; the notes stay until :func:`forget_notes`.

    Raises:
        UserError: a block is damaged, or is not finite or lost in its new form.
    """
    with Bank.open(source, cache_bytes=0) as bank:
        blocks = _ChangedBlocks(bank, target / NOTES, change)
        planned = replace(change.after, anchor_hash=anchor_hash)
        made = rewrite_bank(target, planned, blocks.block, found=blocks.found, made=blocks.made)
    return [
        LevelChange(
            level=before.level,
            blocks=num_blocks(made.memory, before.level),
            quantization=made.quantization_of(before.level),
            bytes_before=sum(shard.bytes for shard in before.shards),
            bytes_after=sum(shard.bytes for shard in after.shards),
            error=blocks.totals[before.level].relative,
            worst_error=blocks.totals[before.level].worst,
        )
        for before, after in zip(change.before.all_levels, made.all_levels, strict=True)
    ]


def forget_notes(target: Path) -> None:
    """Removes what :func:`change_bank` keeps to go on from."""
    shutil.rmtree(target / NOTES, ignore_errors=True)


class _ChangedBlocks:
    """The blocks of a bank in their new form. A note for each shard says what it has lost, and its
    checksums."""

    def __init__(self, bank: Bank, notes: Path, change: BankChange) -> None:
        self.bank, self.notes, self.change = bank, notes, change
        self.totals = {level.level: LevelErrors() for level in change.before.all_levels}

    def found(self, level: int, shard: Shard) -> Shard | None:
        """A shard that an earlier call wrote whole."""
        self.errors = LevelErrors()
        note, file = self.notes / f"{shard.file}.json", self.notes.parent / shard.file
        if not note.exists() or not file.exists() or file.stat().st_size != shard.bytes:
            return None
        known = read_json(note)
        shard = replace(shard, xxh3=known.pop("xxh3"))
        self.errors = LevelErrors(**known)
        self.totals[level].merge(self.errors, self.errors.worst)
        return shard

    def made(self, level: int, shard: Shard) -> None:
        """Notes what is known of a new shard."""
        self.totals[level].merge(self.errors, self.errors.worst)
        note = {"xxh3": shard.xxh3, **asdict(self.errors)}
        write_atomic(self.notes / f"{shard.file}.json", json.dumps(note))

    def block(self, level: int, cluster: int) -> Stored | None:
        """The bytes of a block; what it loses is added to the errors of its shard."""
        if self.change.keeps(level) or self.change.before.is_zeros(level, cluster):
            return stored_bytes(self.bank, level, cluster)
        try:
            return self._changed(level, cluster)
        except UserError:
            raise
        except ValueError as error:
            raise UserError(
                f"block {cluster} of {level_title(level)} cannot be stored so",
                error,
                "use another quantisation or dtype for that level, or leave it as it is",
            ) from None

    def _changed(self, level: int, cluster: int) -> Stored:
        old, new = self.change
        config, how = new.memory, new.quantization_of(level)
        (before,) = self.bank.blocks([(level, cluster)])
        after, lost = stored_block(before, new.dtype), RoundingErrors()
        arrays = [after] if how is None else quantize_block(after, config, how, lost)
        if new.dtype != old.dtype:  # the rounding to it counts too
            lost = RoundingErrors()
            back = dequantize_block(arrays, config, after.dtype, how)
            for one, other in zip(before, back, strict=True):  # layer by layer
                lost.add(one.astype(mx.float32), other.astype(mx.float32))
        self.errors.merge(lost, lost.relative)
        return bytes_of_parts(arrays, new.parts(level))
