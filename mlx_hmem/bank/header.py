"""The first page of a shard, and whether a file is the shard that the manifest speaks of."""

import json
from pathlib import Path
from typing import NamedTuple, Self

from mlx_hmem.bank.format import MANIFEST, PAGE, REMEDY, STORED_TYPES, Manifest, Shard
from mlx_hmem.errors import UserError
from mlx_hmem.files import MAX_DIM, read_safetensors_header


class RowType(NamedTuple):
    """What a shard's header says of a row of `blocks`: its dtype, its length, and what the bytes of
    quantised blocks mean."""

    tag: str
    length: int
    quantization: str | None

    @classmethod
    def of(cls, manifest: Manifest, level: int) -> Self:
        how, stored = manifest.quantization_of(level), STORED_TYPES[manifest.dtype]
        stride = manifest.level(level).block_stride
        if how is None:
            return cls(stored.tag, stride // stored.dtype.size, None)
        return cls("U8", stride, " ".join(map(str, (*how.options.values(), manifest.dtype))))


def shard_header(manifest: Manifest, level: int, shard: Shard) -> bytes:
    """Length, JSON and spaces, so that block 0 begins at byte 16,384."""
    layout, row = manifest.level(level), RowType.of(manifest, level)
    if row.length > MAX_DIM:
        size = f"{layout.block_bytes} bytes"
        raise UserError(f"a block of level {level} is too large", size, "make r smaller")
    metadata = {
        "format": "mlx_hmem bank",
        "level": str(level),
        "anchor_hash": manifest.anchor_hash[:100],  # for people; it must always fit
        "first_cluster": str(shard.first_cluster),
    }
    if row.quantization is not None:
        metadata["quantization"] = row.quantization
    blocks = {
        "dtype": row.tag,
        "shape": [shard.num_clusters, row.length],
        "data_offsets": [0, shard.num_clusters * layout.block_stride],
    }
    text = json.dumps({"__metadata__": metadata, "blocks": blocks}, separators=(",", ":")).encode()
    assert len(text) <= PAGE - 8, "a header of fixed keys fits a page"
    return (PAGE - 8).to_bytes(8, "little") + text.ljust(PAGE - 8)


def check_shard(path: Path, manifest: Manifest, level: int, shard: Shard) -> None:
    """Compares a shard's length and header with the manifest; its data is not touched."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(
            f"the bank lacks a file of level {level}",
            path,
            "restore it, or say with level_folders where that level lies",
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}", error.strerror, "check the path") from None
    if size != shard.bytes:
        raise UserError(f"{path} is damaged", f"{size} bytes instead of {shard.bytes}", REMEDY)
    row = RowType.of(manifest, level)
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
