"""Whole models with memories from PyTorch's layout and back (docs/pytorch_layout.md)."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_hmem  # isort: skip  # noqa: F401  OpenBLAS goes in front before MLX is loaded
import mlx.core as mx
import numpy as np
import pytest

from convert import bank as convert_bank
from convert.__main__ import main
from convert.bank import write_tensors_as_bank
from convert.memory_tensors import MATRICES, find_levels, finite_bits, short_names
from convert.openlm import open_checkpoint
from convert.tensors import Checkpoint, LazyTensor, bits_of, join, open_safetensors
from convert.torch_writer import write_torch
from mlx_hmem import load
from mlx_hmem.anchors.load import anchor_hash, load_anchor, named_parameters
from mlx_hmem.bank import Bank, Quantization, write_bank
from mlx_hmem.bank.format import PAGE, STORED_TYPES, block_shape, num_blocks, stored_r
from mlx_hmem.config import HmemConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors
from tests.conftest import MEMORY, edit_json
from tests.tiny_anchors import LLAMA_LIKE, make_anchor

SIZES: dict[str, Any] = dict(hidden_size=16, num_hidden_layers=2, r=(4, 0, 2), branching=(3, 2, 2))
WIDTHS: dict[str, Any] = dict(intermediate_size=32, query_size=16, key_value_size=16)
CASES = [(kind, "float32", None) for kind in MATRICES]
CASES += [("ffn", "bfloat16", None), ("lora_ffn", "float16", None), ("lora_vo", "bfloat16", (1,))]
IDS = mx.array([[5, 17, 200, 3, 99, 31, 8], [1, 2, 3, 4, 5, 6, 7]])
PATHS = [(0, 1, 2), (2, 5, 11)]
Tensors = dict[str, np.ndarray]


def convert(source: Path, target: Path, *options: object) -> Path:
    main([str(source), str(target), *map(str, options)])
    return target


def with_bank(model: Path, folder: Path, config: MemoryConfig, dtype: str, **options: Any) -> Path:
    """A copy of a model directory with another random bank."""
    shutil.copytree(model, folder)
    hmem = HmemConfig.from_file(folder / "hmem.json")
    shutil.rmtree(folder / "bank")
    rng = np.random.default_rng(0)

    def blocks(level: int) -> list[np.ndarray]:
        shape = block_shape(config, level)
        return [rng.normal(0, 0.4, shape).astype("f4") for _ in range(num_blocks(config, level))]

    levels = [blocks(level) if r else None for level, r in enumerate(config.r, 1)]
    hashes = {"anchor_hash": hmem.anchor_hash, "tree_hash": hmem.retriever.tree_hash}
    write_bank(folder / "bank", config, levels, blocks(0)[0], dtype=dtype, **hashes, **options)
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


@pytest.fixture(scope="module")
def layout(model_folder, tmp_path_factory) -> Path:
    """The model of conftest in PyTorch's layout; for reading only."""
    return convert(model_folder, tmp_path_factory.mktemp("torch") / "model", "--to", "pytorch")


@pytest.fixture
def torch_folder(layout, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(layout, tmp_path / "torch"))


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


@pytest.mark.parametrize(("kind", "dtype", "layers"), CASES)
def test_to_pytorch_and_back_is_bit_equal(model_folder, tmp_path, kind, dtype, layers):
    config = MemoryConfig(**SIZES, **WIDTHS, kind=kind, layers=layers)
    source = with_bank(model_folder, tmp_path / "source", config, dtype)
    middle = convert(source, tmp_path / "torch", "--to", "pytorch")
    back = convert(middle, tmp_path / "back")
    assert_equal(block_bits(source), block_bits(back))
    before, after = anchor_bits(source), anchor_bits(back)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    one, two = load(source), load(back)
    assert one.bank.config == two.bank.config
    assert one.retriever.route("some words") == two.retriever.route("some words")
    alone = np.array(one(IDS, memory="none"))
    for options in ({"paths": PATHS}, {"memory": "generic"}):
        logits = np.array(one(IDS, **options))
        assert np.array_equal(logits, np.array(two(IDS, **options)))
        assert np.abs(logits - alone).max() > 1e-3


def test_a_hugging_face_anchor_goes_there_and_back_with_its_memory(model_folder, tmp_path):
    source = Path(shutil.copytree(model_folder, tmp_path / "source"))
    save_safetensors(source / "model.safetensors", named_parameters(make_anchor("llama")))
    (source / "config.json").write_text(json.dumps(LLAMA_LIKE | {"model_type": "llama"}))
    edit_json(source / "hmem.json", lambda values: values.update(anchor_hash=anchor_hash(source)))
    sizes = dict(SIZES, hidden_size=32, num_hidden_layers=3, r=(4, 3, 2))
    config = MemoryConfig(**sizes, query_size=32, key_value_size=16, kind="lora_qk")
    source = with_bank(source, tmp_path / "llama", config, "float32")
    middle = convert(source, tmp_path / "torch", "--to", "pytorch")
    assert json.loads((middle / "anchor" / "config.json").read_text())["model_type"] == "llama"
    back = convert(middle, tmp_path / "back")
    assert_equal(block_bits(source), block_bits(back))
    ids = IDS % 64
    logits = load(source)(ids, paths=PATHS)
    assert mx.array_equal(logits, load(back)(ids, paths=PATHS))


def test_tables_that_lie_turned_in_the_file_are_read_as_they_are_meant(layout, tmp_path):
    """As ``torch.save`` stores a parameter that is a transposed view."""
    straight, rng = opened(layout).tensors, np.random.default_rng(0)
    turned, expected = dict(straight), {}
    for name, tensor in straight.items():
        if name.endswith("down"):
            count, r, width = tensor.shape
            expected[name] = rng.standard_normal((count, width, r), np.float32)
            strides = (r * width, 1, r)
            path = tmp_path / f"{name}.raw"
            expected[name].tofile(path)
            turned[name] = LazyTensor(path, 0, "F32", tensor.shape, strides)
    levels = find_levels(turned, MEMORY)
    for level in (0, 1, 3):
        tensors = levels[level]
        assert tensors is not None
        count = num_blocks(MEMORY, level)
        out = np.empty(count * tensors.block_size(), np.uint32)
        blocks = tensors.read(0, count, "F32", out).view("f4")
        blocks = blocks.reshape(count, *block_shape(MEMORY, level))
        for layer in range(2):
            where = f"levels.{level}" if level else "generic"
            own = expected[f"layers.{layer}.memory.{where}.down"]
            assert np.array_equal(blocks[:, layer, 2], own.swapaxes(1, 2))


def test_tables_hold_the_rows_of_each_cluster(model_folder, layout):
    tensors = tensors_of(layout)
    with Bank.open(model_folder / "bank") as bank:
        for level, cluster in ((1, 2), (3, 7), (0, 0)):
            (block,) = bank.blocks([(level, cluster)])
            where = f"levels.{level}" if level else "generic"
            for layer in range(2):
                for row, name in enumerate(("gate", "up", "down")):
                    table = tensors[f"layers.{layer}.memory.{where}.{name}"]
                    assert np.array_equal(table[cluster], np.array(block)[layer, row])
    assert len(tensors) == 3 * 2 * 3  # level 2 has r = 0


def as_blocks(tensors: Tensors) -> Tensors:
    result = {}
    for name in ("gate", "up", "down"):
        for level, count in ((1, 3), (3, 12)):
            tables = [tensors[f"layers.{i}.memory.levels.{level}.{name}"] for i in range(2)]
            for c in range(count):
                own = np.stack([table[c] for table in tables])
                result[f"memory.levels.{level}.blocks.{c}.{name}"] = own
        generic = [tensors[f"layers.{i}.memory.generic.{name}"][0] for i in range(2)]
        result[f"memory.generic.{name}"] = np.stack(generic)
    return result


def as_embeddings(tensors: Tensors) -> Tensors:
    return {f"module.{n}.weight": a.reshape(len(a), -1) for n, a in tensors.items()}


def mixed(tensors: Tensors) -> Tensors:
    """Level 1 as tables, level 3 as blocks, the generic memory without an axis in front."""
    blocks = as_blocks(tensors)
    result = {n: a for n, a in tensors.items() if "levels.1" in n}
    result |= {n: a for n, a in blocks.items() if "levels.3" in n}
    return result | {f"model.{n}": a[0] for n, a in tensors.items() if "generic" in n}


@pytest.mark.parametrize("change", [dict, as_blocks, as_embeddings, mixed])
@pytest.mark.parametrize(("shards", "suffix"), [(1, "pt"), (3, "pt"), (1, "safetensors")])
def test_every_way_to_store_a_memory_gives_the_same_bank(
    model_folder, torch_folder, tmp_path, change, shards, suffix
):
    store(torch_folder, change(tensors_of(torch_folder)), shards=shards, suffix=suffix)
    result = convert(torch_folder, tmp_path / "mlx")
    assert_equal(block_bits(model_folder), block_bits(result))
    for file in (result / "bank").glob("*.safetensors"):  # written as write_bank does
        blocks = file.read_bytes()[PAGE:]
        assert blocks == (model_folder / "bank" / file.name).read_bytes()[PAGE:]


def test_anchor_and_memory_may_be_one_checkpoint(model_folder, torch_folder, tmp_path):
    whole = open_checkpoint([torch_folder / "anchor" / "model.pt"]).tensors
    anchor = {name: tensor.read().view("<f4") for name, tensor in whole.items()}
    everything = {f"model.{n}": a for n, a in (anchor | tensors_of(torch_folder)).items()}
    (torch_folder / "anchor" / "model.pt").unlink()
    store(torch_folder, {})
    entries = [(n, "F32", a.shape, [a]) for n, a in everything.items()]
    write_torch(torch_folder / "anchor" / "model.pt", entries, {"epoch": 3})
    (torch_folder / "words").mkdir()
    for file in (torch_folder / "anchor").glob("tokenizer*"):
        file.rename(torch_folder / "words" / file.name)
    marked(anchor="anchor/model.pt", tensors=["anchor/model.pt"], tokenizer="words")(torch_folder)
    result = convert(torch_folder, tmp_path / "mlx")
    assert_equal(block_bits(model_folder), block_bits(result))
    logits = load(model_folder)(IDS, paths=PATHS)
    assert mx.array_equal(logits, load(result)(IDS, paths=PATHS))


def numpy_logits(weights: Tensors, tensors: Tensors, ids: np.ndarray, path: Any) -> np.ndarray:
    """An OpenLM with FFN memory by plain matrices in float64, from PyTorch's names."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return centred / scale * weights[f"{name}.weight"]

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    def rope(x: np.ndarray) -> np.ndarray:  # (heads, time, dim), the halves of a head rotated
        half = x.shape[-1] // 2
        angles = np.outer(np.arange(x.shape[-2]), 1e5 ** (-np.arange(half) / half))
        a, b = x[..., :half], x[..., half:]
        cos, sin = np.cos(angles), np.sin(angles)
        return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)

    def heads(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), 2, 8).swapaxes(0, 1)

    h = weights["tok_embeddings.weight"][ids].astype("f8")
    for i in range(2):
        layer = f"layers.{i}."
        x = norm(h, layer + "attention_norm")
        q, k, v = np.split(x @ weights[layer + "attention.in_proj.weight"].T, 3, axis=-1)
        q, k = norm(q, layer + "attention.q_norm"), norm(k, layer + "attention.k_norm")
        q, k, v = rope(heads(q)), rope(heads(k)), heads(v)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(8)
        scores[:, *np.triu_indices(len(ids), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        found = (scores / scores.sum(-1, keepdims=True)) @ v
        found = found.swapaxes(0, 1).reshape(len(ids), -1)
        h = h + found @ weights[layer + "attention.out_proj.weight"].T
        x = norm(h, layer + "ffn_norm")
        gate, up = np.split(x @ weights[layer + "feed_forward.w12.weight"].T, 2, axis=-1)
        out = (silu(gate) * up) @ weights[layer + "feed_forward.w3.weight"].T
        names = [("generic", 0)] if path is None else [("levels.1", path[0]), ("levels.3", path[2])]
        for where, cluster in names:
            g, u, d = (
                tensors[f"{layer}memory.{where}.{name}"][cluster] for name in ("gate", "up", "down")
            )
            out = out + (silu(x @ g.T) * (x @ u.T)) @ d
        h = h + out
    return norm(h, "norm") @ weights["output.weight"].T


def test_logits_equal_plain_matrices_in_numpy(layout, tmp_path):
    model = load(convert(layout, tmp_path / "mlx"))
    whole = open_checkpoint([layout / "anchor" / "model.pt"]).tensors
    weights = {name: tensor.read().view("<f4") for name, tensor in whole.items()}
    tensors = tensors_of(layout)
    fetched = np.array(model(IDS, paths=PATHS))
    generic = np.array(model(IDS, memory="generic"))
    for row, path in enumerate(PATHS):
        expected = numpy_logits(weights, tensors, np.array(IDS[row]), path)
        assert np.abs(fetched[row] - expected).max() < 1e-4
        expected = numpy_logits(weights, tensors, np.array(IDS[row]), None)
        assert np.abs(generic[row] - expected).max() < 1e-4


def test_logits_equal_pytorchs_own_module(layout, tmp_path):
    """The module of docs/pytorch_layout.md inside an OpenLM of PyTorch, saved by torch.save."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install torch")
    folder = Path(shutil.copytree(layout, tmp_path / "torch"))
    command = [sys.executable, "-m", "tests.torch_memory", str(folder)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    model = load(convert(folder, tmp_path / "mlx"))
    ids, paths = mx.array(np.load(folder / "ids.npy")), np.load(folder / "paths.npy").tolist()
    for name, logits in (
        ("fetched", model(ids, paths=paths)),
        ("generic", model(ids, memory="generic")),
    ):
        expected = np.load(folder / f"{name}.npy")
        assert np.abs(np.array(logits) - expected).max() < 1e-4
        assert np.abs(np.array(model(ids, memory="none")) - expected).max() > 1e-2


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        store(folder, {n: a for n, a in tensors_of(folder).items() if n != name})

    return damage


def changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = tensors_of(folder)
        store(folder, tensors | {name: change(tensors[name])})

    return damage


def marked(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "hmem_pytorch.json", lambda v: v.update(values))


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
    marked(tree="tree.npz")(folder)


GATE, UP = "layers.1.memory.levels.3.gate", "layers.0.memory.levels.3.up"
FAULTS = {
    "a missing table": (without(GATE), f"missing: {GATE}"),
    "no generic gate": (without("layers.0.memory.generic.gate"), "missing: .*generic.gate"),
    "another r": (changed(GATE, lambda a: a[:, :1]), r"wrong shape.*\(12, 1, 16\), not \(12, 2, 1"),
    "another count": (changed(GATE, lambda a: a[:11]), r"\(11, 2, 16\), not \(12, 2, 16\)"),
    "whole numbers": (changed(GATE, lambda a: a.astype(np.int32)), "I32"),
    "one name more": (
        lambda folder: store(folder, tensors_of(folder) | {"layers.0.memory.gain": np.ones(3)}),
        "left over: layers.0.memory.gain",
    ),
    "a level without r": (
        lambda folder: store(
            folder, tensors_of(folder) | {"layers.0.memory.levels.2.up": np.ones((6, 1, 16))}
        ),
        "left over: layers.0.memory.levels.2.up",
    ),
    "not finite": (changed(UP, infinite), f"{UP} has numbers that are not finite"),
    "two dtypes": (changed(UP, lambda a: a.astype(np.float16)), "no dtype.*F16, F32.*--dtype"),
    "another kind": (remembered(kind="kv", query_size=16), "missing.*left over"),
    "another branching": (remembered(branching=[2, 3, 2]), r"\(3, 4, 16\), not \(2, 4, 16\)"),
    "another tree": (other_tree, r"tree of another branching: \(3, 2, 3\)"),
    "a tree that is a pickle": (marked(tree="anchor/model.pt"), "holds no levels"),
    "another anchor": (remembered(hidden_size=8), "made for another anchor"),
    "an unknown key": (marked(colour="red"), "unknown key.*colour"),
    "a newer version": (marked(format_version=2), "format version"),
    "an encoder that is not there": (marked(encoder="elsewhere"), "not there"),
    "a file outside": (marked(tensors=["../x.pt"]), "outside its folder"),
    "a file not there": (marked(tensors=["x.pt"]), "not there"),
    "no list": (marked(tensors="x.pt"), "names no tensors"),
    "no text": (marked(tree=3), "no text"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said_in_one_line(torch_folder, tmp_path, fault):
    damage, words = FAULTS[fault]
    damage(torch_folder)
    with pytest.raises(UserError, match=words) as error:
        convert(torch_folder, tmp_path / "mlx")
    assert "\n" not in str(error.value)
    assert error.value.remedy
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


def test_dtype_rounds_whatever_float_the_tables_are(model_folder, torch_folder, tmp_path):
    tensors = tensors_of(torch_folder)
    wide = {n: a.astype("f8") if "gate" in n else a for n, a in tensors.items()}
    store(torch_folder, wide, suffix="pt")
    result = convert(torch_folder, tmp_path / "mlx", "--dtype", "bfloat16")
    expected = [bits_of(mx.array(b).view(mx.float32).astype(mx.bfloat16)) for b in
                block_bits(model_folder)]  # fmt: skip
    assert_equal(block_bits(result), expected)
    assert load(result)(IDS, paths=PATHS).dtype == mx.bfloat16


def test_without_a_generic_memory_it_is_zeros(torch_folder, tmp_path):
    store(torch_folder, {n: a for n, a in tensors_of(torch_folder).items() if "generic" not in n})
    model = load(convert(torch_folder, tmp_path / "mlx"))
    generic, none = model(IDS, memory="generic"), model(IDS, memory="none")
    assert mx.array_equal(generic, none)


def test_a_quantised_bank_goes_to_pytorch_only_when_asked_to_be_dequantised(model_folder, tmp_path):
    config = MemoryConfig(**SIZES, **WIDTHS, kind="lora_ffn")
    how = [Quantization(3, "nvfp4", 4, 16)]
    source = with_bank(model_folder, tmp_path / "source", config, "float32", quantization=how)
    with pytest.raises(UserError, match=r"quantised.*--dtype float32"):
        convert(source, tmp_path / "torch", "--to", "pytorch")
    middle = convert(source, tmp_path / "torch", "--to", "pytorch", "--dtype", "float32")
    back = convert(middle, tmp_path / "back")
    assert_equal(block_bits(source), block_bits(back))  # block_bits dequantises


def opened(folder: Path) -> Checkpoint:
    return join([open_safetensors(sorted(folder.glob("memory-*.safetensors")))])


def written(folder: Path, layout: Path, config: MemoryConfig = MEMORY) -> dict[str, bytes]:
    """The files of the bank that is made of a layout, in shards of two blocks."""
    levels = find_levels(short_names(opened(layout).tensors), config)
    write_tensors_as_bank(folder, config, levels, dtype=None, anchor_hash="a", tree_hash="t",
                          shard_bytes=3 * PAGE)  # fmt: skip
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_goes_on_behind_the_last_whole_shard_wherever_it_stopped(layout, tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    whole = written(tmp_path / "whole", layout)
    assert len(whole) == 1 + 1 + 2 + 6  # manifest, generic, levels 1 and 3
    write, made = convert_bank.write_shard, list[str]()

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
        monkeypatch.setattr(convert_bank, "write_shard", stopping_after(count))
        with pytest.raises(KeyboardInterrupt):
            written(folder, layout)
        assert "bank.json" not in {file.name for file in folder.iterdir()}
        first = list(made)
        monkeypatch.setattr(convert_bank, "write_shard", stopping_after(99))
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
    expected = block_bits(model_folder)
    while stopped:
        last, count, stopped = last + 1, 0, False
        target = tmp_path / str(last)
        monkeypatch.setattr(os, "replace", stopping(replace, last))
        monkeypatch.setattr(os, "rename", stopping(rename, last))
        try:
            convert(layout, target)
        except KeyboardInterrupt:
            stopped = True
        monkeypatch.undo()
        if stopped:
            assert not target.exists()
            convert(layout, target)
        assert_equal(block_bits(target), expected)
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


def test_a_model_of_mlx_is_not_converted_to_itself(model_folder, tmp_path):
    with pytest.raises(UserError, match="already"):
        convert(model_folder, tmp_path / "mlx")


def test_the_marker_is_as_documented(layout):
    marker = json.loads((layout / "hmem_pytorch.json").read_text())
    assert set(marker) == {"format_version", "memory", "anchor", "tensors", "tree", "encoder",
                           "tokenizer"}  # fmt: skip
    page = (Path(__file__).parents[1] / "docs" / "pytorch_layout.md").read_text()
    for key in marker:
        assert f"| `{key}` |" in page
    for names in MATRICES.values():
        assert all(f"`{name}`" in page for group in names for name in group)
