"""Format version 1 of the memory bank: the manifest, and what every file must look like.

Almost everything about a bank follows from its memory config, dtype, quantisation and the cut into
shards. The manifest writes it all out for other readers, and here each derived value must equal
what follows: nothing in a bank is merely plausible. docs/bank_format.md gives the format byte for
byte.
"""

import dataclasses
from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import mlx.core as mx
import xxhash

from mlx_hmem.bank.quantization import Part, Quantization, check_quantization, quantized_parts
from mlx_hmem.config import JsonConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import group_shapes
from mlx_hmem.reading import check_version, read_json, strict_json

FORMAT_VERSION = 1
MANIFEST = "bank.json"
PAGE = 16_384  # Apple's page; a multiple of the 4,096 bytes elsewhere
MAX_MANIFEST = 1 << 29  # 16 hex digits for each of 2**24 clusters are half of it
GENERIC = 0  # the level number under which the generic memory is kept
REMEDY = "fetch or export the bank again"
Key = tuple[int, int]  # level and cluster of a block


class StoredType(NamedTuple):
    """A dtype of the bank: its name in safetensors, and MLX's type."""

    tag: str
    dtype: mx.Dtype


STORED_TYPES = {
    "float32": StoredType("F32", mx.float32),
    "float16": StoredType("F16", mx.float16),
    "bfloat16": StoredType("BF16", mx.bfloat16),
}


def check_dtype(dtype: Any) -> str:
    """``dtype`` if a bank can have it."""
    if not isinstance(dtype, str) or dtype not in STORED_TYPES:
        known = ", ".join(STORED_TYPES)
        raise UserError("unknown bank dtype", repr(dtype)[:80], f"use one of {known}")
    return dtype


def shard_name(level: int, index: int) -> str:
    return "generic.safetensors" if level == GENERIC else f"level-{level}.{index:05d}.safetensors"


@lru_cache
def checksum_of_zeros(num_bytes: int) -> str:
    """The checksum of a block that is a hole."""
    return xxhash.xxh3_64_hexdigest(bytes(num_bytes))


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

    @property
    def checksums(self) -> list[str]:
        """Of every block, in order."""
        text = "".join(shard.xxh3 for shard in self.shards)
        return [text[at : at + 16] for at in range(0, len(text), 16)]

    @property
    def zeros(self) -> str:
        """The checksum of a block of zeros."""
        return checksum_of_zeros(self.block_bytes)

    def shard_of(self, cluster: int) -> int:
        """The number of the shard that holds a block."""
        return bisect_right(self.shards, cluster, key=lambda shard: shard.first_cluster) - 1


def stored_r(config: MemoryConfig) -> dict[int, int]:
    """The multiplier r of the generic memory and of every level that has memory."""
    return {GENERIC: sum(config.r)} | {level: r for level, r in enumerate(config.r, 1) if r}


def stored_levels(config: MemoryConfig) -> list[int]:
    """The generic memory and every level that has memory."""
    return list(stored_r(config))


def block_parts(
    config: MemoryConfig, level: int, dtype: str, quantization: Quantization | None
) -> tuple[Part, ...]:
    """The arrays of which a stored block consists, one after the other without a gap."""
    stored = STORED_TYPES[dtype].dtype
    if quantization is None:
        return (Part(stored, config.block_shape(level)),)
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
        check_dtype(self.dtype)
        for name in ("anchor_hash", "tree_hash"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} of the bank is not a text", getattr(self, name), REMEDY)
        check_quantization(self.quantization, self.memory, stored_r(self.memory))
        found = [level.level for level in self.all_levels]
        if repr(found) != repr(stored_levels(self.memory)):  # repr: 1 is not True
            raise UserError("levels of the bank do not match its r", found, REMEDY)
        for level in self.all_levels:
            n, how = level.level, self.quantization_of(level.level)
            layout = Level.layout(self.memory, n, self.dtype, how)
            _check_level(level, layout, num_blocks(self.memory, n))

    @classmethod
    def planned(
        cls,
        memory: MemoryConfig,
        dtype: str,
        quantization: tuple[Quantization, ...] | None,
        anchor_hash: str,
        tree_hash: str,
    ) -> Self:
        """The manifest of a bank whose files are still to be written: its levels have no shards."""
        check_dtype(dtype)
        check_quantization(quantization, memory, stored_r(memory))
        how = {q.level: q for q in quantization or ()}
        generic, *levels = (
            Level.layout(memory, n, dtype, how.get(n)) for n in stored_levels(memory)
        )
        return cls(
            format_version=FORMAT_VERSION,
            memory=memory,
            dtype=dtype,
            quantization=quantization,
            byte_order="little",
            page_size=PAGE,
            anchor_hash=anchor_hash,
            tree_hash=tree_hash,
            levels=tuple(levels),
            generic=generic,
        )

    def quantization_of(self, level: int) -> Quantization | None:
        return next((q for q in self.quantization or () if q.level == level), None)

    def level(self, number: int) -> Level:
        """The level of this number, GENERIC being one."""
        return next(level for level in self.all_levels if level.level == number)

    def parts(self, level: int) -> tuple[Part, ...]:
        """The arrays of which a stored block of the level consists."""
        return block_parts(self.memory, level, self.dtype, self.quantization_of(level))

    def checksum(self, level: int, cluster: int) -> str:
        """Of a block, 16 hex digits."""
        own = self.level(level)
        shard = own.shards[own.shard_of(cluster)]
        row = cluster - shard.first_cluster
        return shard.xxh3[16 * row : 16 * row + 16]

    def is_zeros(self, level: int, cluster: int) -> bool:
        """Whether a block is zeros, by its checksum."""
        return self.checksum(level, cluster) == self.level(level).zeros

    @property
    def all_levels(self) -> tuple[Level, ...]:
        """The generic memory first, then the levels that have files."""
        return (self.generic, *self.levels)

    @property
    def shards(self) -> list[Shard]:
        """The files of all levels."""
        return [shard for level in self.all_levels for shard in level.shards]

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
            result = cls.from_dict(values, str(path))
        except UserError:
            raise
        except (TypeError, ValueError) as error:  # a list where a number belongs, and the like
            raise UserError(f"{path} is not a bank manifest", error, REMEDY) from None
        for level in result.all_levels:
            if not level.shards:
                raise UserError("the bank has no files of a level", level.level, REMEDY)
        return result


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
    if level.shards:
        _same(f"number of clusters on {where}", at, count)
