"""Format version 1 of the memory bank: the manifest, and what every file must look like.

Almost everything about a bank follows from its memory config, dtype, quantisation and the cut into
shards. The manifest writes it all out for other readers, and here each derived value must equal
what follows: nothing in a bank is merely plausible. docs/bank_format.md gives the format byte for
byte.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import mlx.core as mx

from mlx_hmem.bank.quantization import (
    Part,
    Quantization,
    check_quantization,
    quantized_parts,
)
from mlx_hmem.config import JsonConfig, MemoryConfig, check_version, read_json
from mlx_hmem.errors import UserError
from mlx_hmem.files import (
    MAX_DIM,
    read_safetensors_header,
    strict_json,
)
from mlx_hmem.memory import group_shapes

FORMAT_VERSION = 1
MANIFEST = "bank.json"
PAGE = 16_384  # Apple's page; a multiple of the 4,096 bytes elsewhere
MAX_MANIFEST = 1 << 29  # 16 hex digits for each of 2**24 clusters are half of it
GENERIC = 0  # the level number under which the generic memory is kept
REMEDY = "fetch or export the bank again"


class StoredType(NamedTuple):
    """A dtype of the bank: its name in safetensors, and MLX's type."""

    tag: str
    dtype: mx.Dtype


STORED_TYPES = {
    "float32": StoredType("F32", mx.float32),
    "float16": StoredType("F16", mx.float16),
    "bfloat16": StoredType("BF16", mx.bfloat16),
}


def shard_name(level: int, index: int) -> str:
    return "generic.safetensors" if level == GENERIC else f"level-{level}.{index:05d}.safetensors"


@dataclass(frozen=True)
class Shard(JsonConfig):
    """One file of blocks. ``xxh3``: 16 hex digits for each block, one after the other."""

    file: str
    first_cluster: int
    num_clusters: int
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Level(JsonConfig):
    """The files of one level. ``block_stride`` is ``block_bytes`` rounded up to whole pages."""

    level: int
    block_bytes: int
    block_stride: int
    shards: tuple[Shard, ...]

    @classmethod
    def layout(
        cls, config: MemoryConfig, level: int, dtype: str, quantization: Quantization | None
    ) -> Self:
        """The level as it follows from the config, without its shards."""
        num_bytes = sum(p.nbytes for p in block_parts(config, level, dtype, quantization))
        return cls(level, num_bytes, -(-num_bytes // PAGE) * PAGE, ())


def stored_r(config: MemoryConfig) -> dict[int, int]:
    """The multiplier r of the generic memory and of every level that has memory."""
    return {GENERIC: sum(config.r)} | {level: r for level, r in enumerate(config.r, 1) if r}


def stored_levels(config: MemoryConfig) -> list[int]:
    """The generic memory and every level that has memory."""
    return list(stored_r(config))


def block_shape(config: MemoryConfig, level: int) -> tuple[int, ...]:
    """``config.block_shape``; for GENERIC that of a block whose r is the sum over the levels."""
    return config.shape_of(sum(config.r) if level == GENERIC else config.r[level - 1])


def block_parts(
    config: MemoryConfig, level: int, dtype: str, quantization: Quantization | None
) -> tuple[Part, ...]:
    """The arrays of which a stored block consists, one after the other without a gap."""
    stored = STORED_TYPES[dtype].dtype
    if quantization is None:
        return (Part(stored, block_shape(config, level)),)
    return quantized_parts(group_shapes(config, stored_r(config)[level]), stored, quantization)


def num_blocks(config: MemoryConfig, level: int) -> int:
    return 1 if level == GENERIC else config.num_clusters[level - 1]


@dataclass(frozen=True)
class Manifest(JsonConfig):
    """``bank.json``. ``generic`` is laid out as a level of one block, number 0."""

    format_version: int
    memory: MemoryConfig
    dtype: str
    quantization: tuple[Quantization, ...] | None
    byte_order: str
    page_size: int
    anchor_hash: str
    tree_hash: str
    levels: tuple[Level, ...]
    generic: Level

    def __post_init__(self) -> None:
        _same("byte_order", self.byte_order, "little")
        _same("page_size", self.page_size, PAGE)
        if not isinstance(self.dtype, str) or self.dtype not in STORED_TYPES:
            raise UserError(
                "unknown bank dtype", repr(self.dtype), f"use one of {', '.join(STORED_TYPES)}"
            )
        for name in ("anchor_hash", "tree_hash"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} of the bank is not a text", getattr(self, name), REMEDY)
        check_quantization(self.quantization, self.memory, stored_r(self.memory))
        found = [level.level for level in self.all_levels]
        if repr(found) != repr(stored_levels(self.memory)):  # repr: 1 is not True
            raise UserError("levels of the bank do not match its r", found, REMEDY)
        for level in self.all_levels:
            _check_level(level, self.layout(level.level), num_blocks(self.memory, level.level))

    def quantization_of(self, level: int) -> Quantization | None:
        return next((q for q in self.quantization or () if q.level == level), None)

    def layout(self, level: int) -> Level:
        """The level as it follows from the rest of the manifest, without its shards."""
        return Level.layout(self.memory, level, self.dtype, self.quantization_of(level))

    def row_type(self, level: int) -> "RowType":
        return row_type(self.layout(level), self.dtype, self.quantization_of(level))

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """The generic memory first, then the levels that have files."""
        return (self.generic, *self.levels)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> "Manifest":
        values = read_json(path, MAX_MANIFEST, strict_json)
        check_version(values, FORMAT_VERSION, path, "export the bank again")
        try:
            if "memory" in values:
                values["memory"] = MemoryConfig.from_dict(values["memory"], f"{path} (memory)")
            if isinstance(values.get("quantization"), list):
                values["quantization"] = [
                    Quantization.from_dict(entry, f"{path} (quantization)")
                    for entry in values["quantization"]
                ]
            if "generic" in values:
                values["generic"] = _level_from_dict(values["generic"], str(path))
            if "levels" in values:
                values["levels"] = [_level_from_dict(v, str(path)) for v in values["levels"]]
            return cls.from_dict(values, str(path))
        except UserError:
            raise
        except (TypeError, ValueError) as error:  # a list where a number belongs, and the like
            raise UserError(f"{path} is not a bank manifest", error, REMEDY) from None


def _level_from_dict(values: Any, source: str) -> Level:
    level = Level.from_dict(values, f"{source} (levels)")
    shards = tuple(Shard.from_dict(shard, f"{source} (shards)") for shard in level.shards)
    return dataclasses.replace(level, shards=shards)


def _same(name: str, value: object, expected: object) -> None:
    if type(value) is not type(expected) or value != expected:
        raise UserError(
            f"{name} of the bank is not {expected!r}", repr(value)[:80], "version 1; " + REMEDY
        )


def _check_level(level: Level, layout: Level, count: int) -> None:
    where = f"level {level.level}"
    _same(f"block_bytes on {where}", level.block_bytes, layout.block_bytes)
    _same(f"block_stride on {where}", level.block_stride, layout.block_stride)
    at = 0
    for index, shard in enumerate(level.shards):
        _same(f"file on {where}", shard.file, shard_name(level.level, index))
        _same(f"first_cluster of {shard.file}", shard.first_cluster, at)
        if type(shard.num_clusters) is not int or shard.num_clusters < 1:
            raise UserError(f"num_clusters of {shard.file}", repr(shard.num_clusters), REMEDY)
        at += shard.num_clusters
        if at > count:
            break
        _same(f"bytes of {shard.file}", shard.bytes, PAGE + shard.num_clusters * level.block_stride)
        if not isinstance(shard.xxh3, str) or len(shard.xxh3) != 16 * shard.num_clusters:
            raise UserError(f"wrong number of checksums of {shard.file}", where, REMEDY)
        if not set(shard.xxh3) <= set("0123456789abcdef"):
            raise UserError(f"checksums of {shard.file} are not hex digits", where, REMEDY)
    _same(f"number of clusters on {where}", at, count)


class RowType(NamedTuple):
    """What a shard's header says of a row of `blocks`: its dtype, its length, and what the bytes of
    quantised blocks mean."""

    tag: str
    length: int
    quantization: str | None


def row_type(level: Level, dtype: str, quantization: Quantization | None) -> RowType:
    if quantization is not None:
        meaning = " ".join(map(str, (*quantization.options.values(), dtype)))
        return RowType("U8", level.block_stride, meaning)
    stored = STORED_TYPES[dtype]
    return RowType(stored.tag, level.block_stride // stored.dtype.size, None)


def shard_header(level: Level, row: RowType, num_clusters: int, metadata: dict[str, str]) -> bytes:
    """The first page of a shard: length, JSON and spaces, so that block 0 begins at byte 16,384."""
    if row.length > MAX_DIM:
        raise UserError(
            f"a block of level {level.level} is too large",
            f"{level.block_bytes} bytes",
            "make r smaller",
        )
    if row.quantization is not None:
        metadata = {**metadata, "quantization": row.quantization}
    header = {
        "__metadata__": metadata,
        "blocks": {
            "dtype": row.tag,
            "shape": [num_clusters, row.length],
            "data_offsets": [0, num_clusters * level.block_stride],
        },
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= PAGE - 8, "a header of fixed keys fits a page"
    return (PAGE - 8).to_bytes(8, "little") + text.ljust(PAGE - 8)


def check_shard(path: Path, level: Level, shard: Shard, row: RowType) -> None:
    """Compares a shard's length and header with the manifest; its data is not touched."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"the bank lacks a file of level {level.level}",
            path,
            "restore it, or say with level_folders where that level lies",
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}", error.strerror, "check the path") from None
    if size != shard.bytes:
        raise UserError(f"{path} is damaged", f"{size} bytes instead of {shard.bytes}", REMEDY)
    tensors, metadata = read_safetensors_header(path)
    if list(tensors) != ["blocks"]:
        raise UserError(f"{path} must hold one tensor `blocks`", repr(list(tensors))[:80], REMEDY)
    info = tensors["blocks"]
    expected = (row.tag, (shard.num_clusters, row.length), PAGE)
    if (info.dtype, info.shape, info.start) != expected:
        raise UserError(
            f"{path} does not match {MANIFEST}",
            f"{info.dtype} {info.shape} at byte {info.start}",
            f"it needs {expected[0]} {expected[1]} at byte {PAGE}; {REMEDY}",
        )
    if row.quantization is not None and metadata.get("quantization") != row.quantization:
        raise UserError(
            f"{path} is not quantised as {MANIFEST} says",
            repr(metadata.get("quantization"))[:80],
            f"it needs {row.quantization!r}; {REMEDY}",
        )
