"""Models with memories in PyTorch's layout, for the tests of their conversion."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from convert.command import main
from convert.torch_files.tensors import Checkpoint, bits_of, join, open_safetensors
from convert.torch_files.writer import write_torch
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.bank import Bank
from mlx_hmem.bank.format import num_blocks, stored_r
from mlx_hmem.config import HmemConfig, MemoryConfig
from mlx_hmem.files import save_safetensors
from tests.conftest import edit_json, save_bank

SIZES: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, r=(4, 0, 2), branching=(3, 2, 2))
WIDTHS: dict[str, Any] = dict(intermediate_size=32, query_size=16, key_value_size=16)
Tensors = dict[str, np.ndarray]


def convert(source: Path, target: Path, *options: object) -> Path:
    main([str(source), str(target), *map(str, options)])
    return target


def with_bank(model: Path, folder: Path, config: MemoryConfig, dtype: str, **options: Any) -> Path:
    """A copy of a model directory with another random bank."""
    shutil.copytree(model, folder)
    hmem = HmemConfig.from_file(folder / "hmem.json")
    hashes = hmem.anchor_hash, hmem.retriever.tree_hash
    save_bank(folder / "bank", config, *hashes, size=0.4, dtype=dtype, **options)
    edit_json(folder / "hmem.json", lambda values: values.update(memory=config.to_dict()))
    return folder


def block_bits(folder: Path) -> list[np.ndarray]:
    """The bits of all blocks of a model's bank, level by level."""
    with Bank.open(folder / "bank", cache_bytes=0) as bank:
        levels = stored_r(bank.config)
        keys = [(n, c) for n in levels for c in range(num_blocks(bank.config, n))]
        return [bits_of(block) for block in bank.blocks(keys)]


def assert_equal(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(x, y)


def anchor_bits(folder: Path) -> dict[str, np.ndarray]:
    return {n: bits_of(w) for n, w in named_parameters(load_anchor(folder)[0]).items()}


def tensors_of(folder: Path) -> Tensors:
    """The memory's tensors, float32, by their names in the layout."""
    files = sorted(folder.glob("memory-*.safetensors"))
    arrays: dict[str, mx.array] = {}
    for file in files:
        arrays |= mx.load(str(file))  # type: ignore[arg-type]
    return {name: np.array(array) for name, array in arrays.items()}


def store(folder: Path, tensors: Tensors, *, shards: int = 1, suffix: str = "safetensors") -> None:
    """Puts these tensors in place of a layout's."""
    for file in folder.glob("memory-*"):
        file.unlink()
    names, files = list(tensors), []
    for shard in range(shards):
        files.append(f"memory-{shard}.{suffix}")
        own = {name: tensors[name] for name in names[shard::shards]}
        if suffix == "safetensors":
            save_safetensors(folder / files[-1], {n: mx.array(a) for n, a in own.items()})
        else:
            tag = {"f": "F32", "d": "F64", "e": "F16"}
            entries = [(n, tag[a.dtype.char], a.shape, [a]) for n, a in own.items()]
            write_torch(folder / files[-1], entries)
    edit_json(folder / "hmem_pytorch.json", lambda values: values.update(tensors=files))


def marked(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "hmem_pytorch.json", lambda v: v.update(values))


def opened(folder: Path) -> Checkpoint:
    return join([open_safetensors(sorted(folder.glob("memory-*.safetensors")))])
