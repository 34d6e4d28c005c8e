"""Writes a memory bank anew with levels quantised or in another dtype, block by block.

What each level lost is measured as it passes. A shard that is written leaves a note of its
checksums and its error beside it, so that a stopped run goes on behind the last whole shard. Memory
is bounded by a few copies of one block. A block of zeros is neither read nor written.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
from tqdm import tqdm

from mlx_hmem.bank import Bank, Manifest, Quantization, stored_levels
from mlx_hmem.bank.format import (
    GENERIC,
    MANIFEST,
    PAGE,
    STORED_TYPES,
    Level,
    Shard,
    block_parts,
    num_blocks,
    row_type,
    stored_r,
)
from mlx_hmem.bank.quantization import (
    RoundingErrors,
    check_quantization,
    dequantize_block,
    quantize_block,
)
from mlx_hmem.bank.read.blocks import StoredBlock
from mlx_hmem.bank.writer import (
    Cut,
    bytes_of_parts,
    checksum_of_zeros,
    shard_cuts,
    shard_metadata,
    shard_name,
    stored_block,
    write_shard,
)
from mlx_hmem.config import JsonConfig, read_json
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic

NOTES = "notes"  # a folder beside the shards, of one JSON file for each that is whole


@dataclass
class LevelErrors(RoundingErrors):
    """The errors of several blocks, and the largest relative error of one of them."""

    worst: float = 0.0

    def merge(self, squares: float, differences: float, worst: float) -> None:
        self.squares += squares
        self.differences += differences
        self.worst = max(self.worst, worst)


@dataclass(frozen=True)
class ShardNote(JsonConfig):
    """What is known of a whole shard: its checksums, as in the manifest, and its errors."""

    xxh3: str
    squares: float
    differences: float
    worst: float


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


@dataclass(frozen=True)
class BankChange:
    """What becomes of a bank: its new dtype, and how its levels are quantised then."""

    before: Manifest
    dtype: str
    quantization: tuple[Quantization, ...] | None

    @classmethod
    def planned(
        cls, before: Manifest, chosen: dict[int, Quantization], dtype: str | None = None
    ) -> "BankChange":
        """Checks that the levels ``chosen`` can be quantised so, and not for a second time."""
        dtype = dtype or before.dtype
        if dtype not in STORED_TYPES:
            raise UserError("unknown bank dtype", dtype, f"use one of {', '.join(STORED_TYPES)}")
        kept = {q.level: q for q in before.quantization or ()}
        if kept and dtype != before.dtype:
            raise UserError(
                "a bank with quantised levels keeps its dtype",
                before.dtype,
                "start from the bank as it was before",
            )
        if twice := sorted(kept.keys() & chosen.keys()):
            raise UserError(
                f"{level_title(twice[0])} of the bank is quantised already",
                quantization_title(kept[twice[0]]),
                f"start from the bank as it was before, or add --bank-level {twice[0]}:none",
            )
        both = {**kept, **chosen}
        quantization = tuple(both[level] for level in sorted(both)) or None
        check_quantization(quantization, before.memory, stored_r(before.memory))
        return cls(before, dtype, quantization)

    def quantization_of(self, level: int) -> Quantization | None:
        return next((q for q in self.quantization or () if q.level == level), None)

    def layout(self, level: int) -> Level:
        return Level.layout(self.before.memory, level, self.dtype, self.quantization_of(level))

    def keeps(self, level: int) -> bool:
        """Whether the blocks of a level stay what they are, byte for byte."""
        same = self.quantization_of(level) == self.before.quantization_of(level)
        return same and self.dtype == self.before.dtype

    @property
    def bytes_needed(self) -> int:
        """Bytes on the disk, without what blocks of zeros save."""
        total = 0
        for level in self.before.all_levels:
            layout, zeros = self.layout(level.level), checksum_of_zeros(level.block_bytes)
            for shard in level.shards:
                sums = (shard.xxh3[i : i + 16] for i in range(0, len(shard.xxh3), 16))
                total += PAGE + layout.block_stride * sum(found != zeros for found in sums)
        return total


def level_title(level: int) -> str:
    return "the generic memory" if level == GENERIC else f"level {level}"


def quantization_title(how: Quantization) -> str:
    return f"{how.mode} {how.bits} bits, groups of {how.group_size}"


def change_bank(
    source: Path, target: Path, change: BankChange, anchor_hash: str
) -> list[LevelChange]:
    """Writes the bank in ``source`` to ``target`` as ``change`` says, tied to another anchor.

    Shards that an earlier call has left in ``target`` are not written again. ``bank.json`` comes
    last; the notes stay until :func:`forget_notes`.

    Raises:
        UserError: a block is damaged, or is not finite or lost in its new form.
    """
    target.mkdir(parents=True, exist_ok=True)
    written, report = [], []
    total = sum(num_blocks(change.before.memory, n) for n in stored_levels(change.before.memory))
    with (
        Bank.open(source, cache_bytes=0) as bank,
        tqdm(total=total, desc="writing bank", unit="block", delay=2) as progress,
    ):
        for level in change.before.all_levels:
            after, errors = _change_level(bank, target, change, level, anchor_hash, progress)
            written.append(after)
            report.append(
                LevelChange(
                    level=level.level,
                    blocks=num_blocks(change.before.memory, level.level),
                    quantization=change.quantization_of(level.level),
                    bytes_before=sum(shard.bytes for shard in level.shards),
                    bytes_after=sum(shard.bytes for shard in after.shards),
                    error=errors.relative,
                    worst_error=errors.worst,
                )
            )
    manifest = replace(
        change.before,
        dtype=change.dtype,
        quantization=change.quantization,
        anchor_hash=anchor_hash,
        levels=tuple(written[1:]),
        generic=written[0],
    )
    write_atomic(target / MANIFEST, manifest.to_json())
    return report


def forget_notes(target: Path) -> None:
    """Removes what :func:`change_bank` keeps to go on from."""
    for note in (target / NOTES).glob("*.json"):
        note.unlink()
    if (target / NOTES).exists():
        (target / NOTES).rmdir()


def _change_level(
    bank: Bank,
    target: Path,
    change: BankChange,
    level: Level,
    anchor_hash: str,
    progress: tqdm,
) -> tuple[Level, LevelErrors]:
    number, total = level.level, LevelErrors()
    layout = change.layout(number)
    row = row_type(layout, change.dtype, change.quantization_of(number))
    metadata = shard_metadata(number, anchor_hash)
    shards = []
    for cut in shard_cuts(layout, num_blocks(bank.config, number)):
        name = shard_name(number, cut.shard)
        note = target / NOTES / f"{name}.json"
        if note.exists() and (target / name).exists():
            known = ShardNote.from_dict(read_json(note), str(note))
            size = (target / name).stat().st_size
            shards.append(Shard(name, cut.first_cluster, cut.num_clusters, size, known.xxh3))
            errors = LevelErrors(known.squares, known.differences, known.worst)
            progress.update(cut.num_clusters)
        else:
            errors = LevelErrors()
            blocks = _changed_blocks(bank, change, level, cut, errors, progress)
            shards.append(write_shard(target, layout, row, cut, blocks, metadata))
            write_atomic(note, json.dumps({"xxh3": shards[-1].xxh3, **asdict(errors)}))
        total.merge(errors.squares, errors.differences, errors.worst)
    return replace(layout, shards=tuple(shards)), total


def _changed_blocks(
    bank: Bank,
    change: BankChange,
    level: Level,
    cut: Cut,
    errors: LevelErrors,
    progress: tqdm,
) -> Iterator[list[memoryview] | None]:
    """The bytes of the blocks of a new shard, in order; what they lose is added to ``errors``."""
    number, checksums = level.level, "".join(shard.xxh3 for shard in level.shards)
    zeros = checksum_of_zeros(level.block_bytes)
    for cluster in range(cut.first_cluster, cut.first_cluster + cut.num_clusters):
        progress.update()  # before the yield: after the last one nothing runs
        if checksums[16 * cluster : 16 * cluster + 16] == zeros:
            yield None
        elif change.keeps(number):
            buffers = bank.stored(number, cluster).buffers
            yield [memoryview(buffer).cast("B") for buffer in buffers]  # type: ignore[arg-type]
        else:
            try:
                yield _changed(bank.stored(number, cluster), change, number, errors)
            except UserError:
                raise
            except ValueError as error:
                raise UserError(
                    f"block {cluster} of {level_title(number)} cannot be stored so",
                    error,
                    "use another quantisation or dtype for that level, or leave it as it is",
                ) from None


def _changed(
    block: StoredBlock, change: BankChange, level: int, errors: LevelErrors
) -> list[memoryview]:
    config, how = change.before.memory, change.quantization_of(level)
    (before,) = block.arrays(block_parts(config, level, change.before.dtype, None))
    after, lost = stored_block(before, change.dtype), RoundingErrors()
    arrays = [after] if how is None else quantize_block(after, config, how, lost)
    if change.dtype != change.before.dtype:  # the rounding to it counts too
        lost = RoundingErrors()
        back = after if how is None else dequantize_block(arrays, config, after.dtype, how)
        for old, new in zip(before, back, strict=True):  # layer by layer
            lost.add(old.astype(mx.float32), new.astype(mx.float32))
    errors.merge(lost.squares, lost.differences, lost.relative)
    return bytes_of_parts(arrays, block_parts(config, level, change.dtype, how))
