"""A layout that is wrong is one line; a conversion that was stopped goes on."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from convert.memory.bank import write_tensors_as_bank
from convert.memory.tensors import common_dtype, find_levels, finite_bits, short_names
from mlx_hmem.bank import Manifest, writer
from mlx_hmem.bank.format import PAGE, STORED_TYPES
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.model.load import load
from tests.conftest import MEMORY, edit_json
from tests.helpers import memory_layouts as layouts
from tests.helpers.programs import refused


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        layouts.store(folder, {n: a for n, a in layouts.tensors_of(folder).items() if n != name})

    return damage


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = layouts.tensors_of(folder)
        layouts.store(folder, tensors | {name: change(tensors[name])})

    return damage


def remembered(**values: Any) -> Callable[[Path], None]:
    def change(marker: dict[str, Any]) -> None:
        marker["memory"].update(values)

    return lambda folder: edit_json(folder / "hmem_pytorch.json", change)


def infinite(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[7, 1, 3] = -np.inf
    return array


def other_tree(folder: Path) -> None:
    levels = {f"level-{i}": np.zeros((n, 4)) for i, n in ((1, 3), (2, 6), (3, 18))}
    np.savez(folder / "tree.npz", **levels)
    layouts.marked(tree="tree.npz")(folder)


GATE, UP = "layers.1.memory.levels.3.gate", "layers.0.memory.levels.3.up"
FAULTS = {
    "a missing table": (without(GATE), f"missing: {GATE}"),
    "no generic gate": (without("layers.0.memory.generic.gate"), "missing: .*generic.gate"),
    "another r": (changed(GATE, lambda a: a[:, :1]), r"wrong shape.*\(12, 1, 16\), not \(12, 2, 1"),
    "another count": (changed(GATE, lambda a: a[:11]), r"\(11, 2, 16\), not \(12, 2, 16\)"),
    "whole numbers": (changed(GATE, lambda a: a.astype(np.int32)), "I32"),
    "one name more": (
        lambda folder: layouts.store(
            folder, layouts.tensors_of(folder) | {"layers.0.memory.gain": np.ones(3)}
        ),
        "left over: layers.0.memory.gain",
    ),
    "a level without r": (
        lambda folder: layouts.store(
            folder,
            layouts.tensors_of(folder) | {"layers.0.memory.levels.2.up": np.ones((6, 1, 16))},
        ),
        "left over: layers.0.memory.levels.2.up",
    ),
    "not finite": (changed(UP, infinite), f"{UP} has numbers that are not finite"),
    "two dtypes": (changed(UP, lambda a: a.astype(np.float16)), "no dtype.*F16, F32.*--dtype"),
    "another kind": (remembered(kind="kv", query_size=16), "missing.*left over"),
    "another branching": (remembered(branching=[2, 3, 2]), r"\(3, 4, 16\), not \(2, 4, 16\)"),
    "another tree": (other_tree, r"tree of another branching: \(3, 2, 3\)"),
    "a tree that is a pickle": (layouts.marked(tree="anchor/model.pt"), "holds no levels"),
    "another anchor": (remembered(hidden_size=8), "made for another anchor"),
    "an unknown key": (layouts.marked(colour="red"), "unknown key.*colour"),
    "a newer version": (layouts.marked(format_version=2), "format version"),
    "an encoder that is not there": (layouts.marked(encoder="elsewhere"), "not there"),
    "a file outside": (layouts.marked(tensors=["../x.pt"]), "outside its folder"),
    "a file not there": (layouts.marked(tensors=["x.pt"]), "not there"),
    "no list": (layouts.marked(tensors="x.pt"), "names no tensors"),
    "no text": (layouts.marked(tree=3), "no text"),
    "a tokenizer that is none": (layouts.marked(tokenizer={}), "no text"),
    "a tokenizer without a name": (layouts.marked(tokenizer=""), "no text"),
}


@pytest.mark.parametrize(("damage", "words"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_is_said_in_one_line(torch_folder, tmp_path, damage, words):
    damage(torch_folder)
    refused(words, layouts.convert, torch_folder, tmp_path / "mlx")
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_exactly_the_finite_bits_pass(dtype):
    kind = STORED_TYPES[{"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]].dtype
    every = np.arange(1 << 16, dtype=np.uint16)
    if dtype == "F32":
        every = every.astype(np.uint32) << 16 | np.uint32(1)
    finite = np.array(mx.isfinite(mx.array(every).view(kind)))
    passed = []
    for bits in every:
        try:
            finite_bits(np.array([0, bits], every.dtype), dtype, dtype, "x")
            passed.append(True)
        except UserError:
            passed.append(False)
    assert np.array_equal(passed, finite)
    assert 0 < finite.sum() < len(every)


def written(folder: Path, layout: Path, config: MemoryConfig = MEMORY) -> dict[str, bytes]:
    """The files of the bank that is made of a layout, in shards of two blocks."""
    levels = find_levels(short_names(layouts.opened(layout).tensors), config)
    write_tensors_as_bank(folder, config, levels, dtype=common_dtype(levels, None),
                          anchor_hash="a", tree_hash="t", shard_bytes=3 * PAGE)  # fmt: skip
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_goes_on_behind_the_last_whole_shard_wherever_it_stopped(layout, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = written(tmp_path / "whole", layout)
    assert len(whole) == 1 + 1 + 2 + 6  # manifest, generic, levels 1 and 3
    write, made = writer.write_shard, list[str]()

    def stopping_after(count: int) -> Callable[..., Any]:
        def write_shard(folder: Path, *rest: Any) -> Any:
            if len(made) == count:
                raise KeyboardInterrupt
            shard = write(folder, *rest)
            made.append(shard.file)
            return shard

        return write_shard

    for count in range(9):
        made.clear()
        folder = tmp_path / str(count)
        folder.mkdir()
        monkeypatch.setattr(writer, "write_shard", stopping_after(count))
        with pytest.raises(KeyboardInterrupt):
            written(folder, layout)
        assert "bank.json" not in {file.name for file in folder.iterdir()}
        first = list(made)
        monkeypatch.setattr(writer, "write_shard", stopping_after(99))
        assert written(folder, layout) == whole
        assert len(first) == count
        assert len(set(made)) == len(made) == 9  # none was written twice


def test_stopped_at_any_file_it_leaves_nothing_that_loads_wrong_and_goes_on(
    model_folder, layout, tmp_path, monkeypatch
):
    replace, rename, count = os.replace, os.rename, 0

    def stopping(move: Callable[..., None], last: int) -> Callable[..., None]:
        def moved(*paths: Any) -> None:
            nonlocal count
            count += 1
            if count == last:
                raise KeyboardInterrupt
            move(*paths)

        return moved

    last, stopped = 0, True
    expected = layouts.block_bits(model_folder)
    while stopped:
        last, count, stopped = last + 1, 0, False
        target = tmp_path / str(last)
        monkeypatch.setattr(os, "replace", stopping(replace, last))
        monkeypatch.setattr(os, "rename", stopping(rename, last))
        try:
            layouts.convert(layout, target)
        except KeyboardInterrupt:
            stopped = True
        monkeypatch.undo()
        if stopped:
            assert not target.exists()
            layouts.convert(layout, target)
        layouts.assert_equal(layouts.block_bits(target), expected)
        assert not target.with_name(f"{last}.part").exists()
        assert sorted(f.name for f in target.iterdir()) == sorted(
            {f.name for f in model_folder.iterdir()}
        )
    assert last > 8


def test_a_shard_that_is_not_as_it_should_be_is_written_again(layout, tmp_path):
    whole = written(tmp_path, layout)
    for damage in (
        lambda d: d[:-1],
        lambda d: d.replace(b'"anchor_hash":"a"', b'"anchor_hash":"b"'),
    ):
        (tmp_path / "bank.json").unlink()
        file = tmp_path / "level-3.00002.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        assert written(tmp_path, layout) == whole


def test_a_model_without_a_tokenizer_is_made_and_takes_one_later(torch_folder, tmp_path):
    """Its hash cannot be known yet; that was a traceback."""
    files = list(torch_folder.rglob("tokenizer*"))
    for file in files:
        file.rename(tmp_path / file.name)
    out = layouts.convert(torch_folder, tmp_path / "mlx")
    refused("no tokenizer", load, out)
    for file in files:
        (tmp_path / file.name).rename(out / file.name)
    assert load(out).bank is not None


def test_a_bank_that_is_not_finite_goes_no_further(broken, tmp_path, monkeypatch):
    """Its checksums are right: another program wrote it."""
    manifest = Manifest.from_file(broken / "bank" / "bank.json")
    hashes = (manifest.anchor_hash, manifest.tree_hash)
    planned = Manifest.planned(MEMORY, manifest.dtype, None, *hashes)

    def block(level: int, cluster: int) -> mx.array:
        value = math.nan if (level, cluster) == (3, 7) else 1.0
        return mx.full(MEMORY.block_shape(level), value)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "stored_block", lambda b, t: b.astype(STORED_TYPES[t].dtype))
        writer.rewrite_bank(broken / "bank", planned, block)
    words = "level 3 has numbers that are not finite in .*: clusters 0 to 11; "
    refused(words, layouts.convert, broken, tmp_path / "out", "--to", "pytorch")


def test_a_model_of_mlx_is_not_converted_to_itself(model_folder, tmp_path):
    refused("already", layouts.convert, model_folder, tmp_path / "mlx")
