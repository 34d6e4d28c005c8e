"""``diff``: which blocks of two banks differ, and by how much. ``export``: blocks as arrays."""

import json
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.bank import Bank
from mlx_hmem.bank.format import STORED_TYPES, Key
from mlx_hmem.bank_tools.contents import OpenBank
from mlx_hmem.errors import UserError
from mlx_hmem.files import atomic_file


@dataclass(frozen=True)
class Difference:
    """A block that differs: the L2 norms of either and of the difference, of their values."""

    level: int
    cluster: int
    bytes: int
    first: float
    second: float
    difference: float


def unlike(first: OpenBank, second: OpenBank) -> list[tuple[str, object, object]]:
    """In what the two differ as a whole: its name, and what it is in either."""
    own, other = (each.hmem.retriever for each in (first, second))
    pairs = (
        ("anchor", first.bank.anchor_hash, second.bank.anchor_hash),
        ("cluster tree", first.bank.tree_hash, second.bank.tree_hash),
        ("encoder", own and own.encoder_hash, other and other.encoder_hash),
        ("memory", first.bank.config, second.bank.config),
        ("dtype", first.bank.dtype, second.bank.dtype),
        ("quantisation", first.bank.manifest.quantization, second.bank.manifest.quantization),
    )
    return [each for each in pairs if each[1] != each[2]]


def differences(first: Bank, second: Bank) -> Iterator[Difference]:
    """The blocks that differ. Those with the same checksum in the same format are not read.

    Raises UserError where the two hold memories of different shape.
    """
    if first.config != second.config:
        a, b = vars(first.config), vars(second.config)
        differ = [f"{name} {a[name]} and {b[name]}" for name in a if a[name] != b[name]]
        raise UserError(
            "the two banks hold different memories", ", ".join(differ), "compare banks of one shape"
        )
    same_format = first.dtype == second.dtype
    for mine, theirs in zip(first.manifest.all_levels, second.manifest.all_levels, strict=True):
        number = mine.level
        how = (bank.manifest.quantization_of(number) for bank in (first, second))
        pairs = list(zip(mine.checksums, theirs.checksums, strict=True))
        comparable = same_format and len(set(how)) == 1
        keys = [c for c, (a, b) in enumerate(pairs) if a != b or not comparable]
        for cluster in tqdm(keys, desc=f"level {number}", unit="block", delay=2):
            one, other = (
                bank.blocks([(number, cluster)])[0].astype(mx.float32) for bank in (first, second)
            )
            norms = _norm(one), _norm(other), _norm(one - other)
            if norms[2] > 0:
                yield Difference(number, cluster, mine.block_bytes, *norms)


def _norm(array: mx.array) -> float:
    # Row by row: one float32 sum of millions of squares would be inexact.
    rows = mx.square(array).sum(-1)
    return math.sqrt(float(np.array(rows, np.float64).sum()))


def exported_name(key: Key) -> str:
    level, cluster = key
    return f"level-{level}.{cluster}" if level else "generic"


def export(opened: OpenBank, keys: Sequence[Key], out: Path) -> str:
    """Writes blocks in the bank's dtype (docs/bank_format.md), dequantised, one array each.

    ``out`` ends in ``.safetensors`` or ``.npz``, which has no bfloat16: those become float32. One
    block at a time is in memory.
    """
    if out.exists():
        raise UserError("the destination exists", out, "choose another")
    if not keys:
        raise UserError("there is no block to export", opened.folder, "name a level with memory")
    if out.suffix == ".safetensors":
        _write_safetensors(opened, keys, out)
    elif out.suffix == ".npz":
        _write_npz(opened.bank, keys, out)
    else:
        raise UserError("unknown kind of file", out, "end its name in .safetensors or .npz")
    return f"{out}: {len(keys)} blocks, {out.stat().st_size:,} bytes"


def _blocks(bank: Bank, keys: Sequence[Key]) -> Iterator[tuple[str, mx.array]]:
    for key in tqdm(keys, desc="export", unit="block", delay=2):
        yield exported_name(key), bank.blocks([key])[0]


def _write_safetensors(opened: OpenBank, keys: Sequence[Key], out: Path) -> None:
    bank = opened.bank
    stored = STORED_TYPES[bank.dtype]
    metadata = {
        "format": "mlx_hmem blocks",
        "memory": json.dumps(bank.config.to_dict()),
        "anchor_hash": bank.anchor_hash,
        "tree_hash": bank.tree_hash,
    }
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for key in keys:
        shape = bank.config.block_shape(key[0])
        end = start + math.prod(shape) * stored.dtype.size
        offsets = [start, end]
        header[exported_name(key)] = dict(dtype=stored.tag, shape=shape, data_offsets=offsets)
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    bits = {2: mx.uint16, 4: mx.uint32}[stored.dtype.size]
    with atomic_file(out) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, block in _blocks(bank, keys):
            file.write(memoryview(mx.contiguous(block).view(bits)))  # type: ignore[arg-type]


def _write_npz(bank: Bank, keys: Sequence[Key], out: Path) -> None:
    with atomic_file(out) as file, zipfile.ZipFile(file, "w") as archive:
        for name, block in _blocks(bank, keys):
            array = np.array(block.astype(mx.float32) if block.dtype == mx.bfloat16 else block)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array)
