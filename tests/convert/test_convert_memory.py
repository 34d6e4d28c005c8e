"""Whole models with memories from PyTorch's layout and back (docs/pytorch_layout.md)."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from convert.memory.tensors import find_levels
from convert.torch_files.pickles import open_files
from convert.torch_files.tensors import LazyTensor, bits_of
from convert.torch_files.writer import write_torch
from mlx_hmem import load
from mlx_hmem.anchors.load import anchor_hash, load_anchor, named_parameters, text_hashes
from mlx_hmem.bank import Bank, Quantization
from mlx_hmem.bank.format import PAGE, num_blocks
from mlx_hmem.config import KINDS, MemoryConfig
from mlx_hmem.files import save_safetensors
from tests.conftest import MEMORY, edit_json
from tests.helpers.memory_layouts import (
    SIZES,
    WIDTHS,
    Tensors,
    anchor_bits,
    assert_equal,
    block_bits,
    convert,
    marked,
    opened,
    store,
    tensors_of,
    with_bank,
)
from tests.helpers.places import ROOT
from tests.helpers.programs import refused
from tests.helpers.references import of_kind
from tests.helpers.tiny_anchors import LLAMA_LIKE, make_anchor
from tests.helpers.tiny_tokenizers import save_byte_level
from tests.model.test_model import by_hand

CASES = [(kind, "float32", None) for kind in KINDS]
CASES += [("ffn", "bfloat16", None), ("lora_ffn", "float16", None), ("lora_vo", "bfloat16", (1,))]
IDS = mx.array([[5, 17, 200, 3, 99, 31, 8], [1, 2, 3, 4, 5, 6, 7]])
PATHS = [(0, 1, 2), (2, 5, 11)]


@pytest.mark.parametrize(("kind", "dtype", "layers"), CASES)
def test_to_pytorch_and_back_is_bit_equal(model_folder, tmp_path, kind, dtype, layers):
    config = MemoryConfig(**SIZES, **WIDTHS, **of_kind(kind), layers=layers)
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
    save_byte_level(source)
    edit_json(
        source / "hmem.json",
        lambda values: values.update(anchor_hash=anchor_hash(source), **text_hashes(source)),
    )
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
        count = num_blocks(MEMORY, level)
        out = np.empty(count * tensors.block_size(), np.uint32)
        blocks = tensors.read(0, count, "F32", out).view("f4")
        blocks = blocks.reshape(count, *MEMORY.block_shape(level))
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
    whole = open_files([torch_folder / "anchor" / "model.pt"]).tensors
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


def test_logits_equal_an_anchor_widened_by_the_rows_of_the_layout(layout, tmp_path):
    model, tensors = load(convert(layout, tmp_path / "mlx")), tensors_of(layout)
    anchor, _ = load_anchor(tmp_path / "mlx")

    def expected(ids: mx.array, *places: tuple[str, int]) -> mx.array:
        rows = [[np.concatenate([tensors[f"layers.{i}.memory.{where}.{name}"][cluster]
                                 for where, cluster in places])
                 for name in ("gate", "up", "down")] for i in range(2)]  # fmt: skip
        return by_hand(anchor, ids, np.array(rows))

    for row, path in enumerate(PATHS):
        ids = IDS[row : row + 1]
        wanted = expected(ids, ("levels.1", path[0]), ("levels.3", path[2]))
        assert mx.abs(model(ids, paths=[path]) - wanted).max().item() < 1e-4
        generic = model(ids, memory="generic")
        assert mx.abs(generic - expected(ids, ("generic", 0))).max().item() < 1e-4


def test_logits_equal_pytorchs_own_module(layout, tmp_path):
    """The module of docs/pytorch_layout.md inside an OpenLM of PyTorch, saved by torch.save."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install torch")
    folder = Path(shutil.copytree(layout, tmp_path / "torch"))
    program = ROOT / "tests" / "helpers" / "torch_memory.py"
    subprocess.run([sys.executable, str(program), str(folder)], check=True)
    model = load(convert(folder, tmp_path / "mlx"))
    ids, paths = mx.array(np.load(folder / "ids.npy")), np.load(folder / "paths.npy").tolist()
    for name, logits in (
        ("fetched", model(ids, paths=paths)),
        ("generic", model(ids, memory="generic")),
    ):
        expected = np.load(folder / f"{name}.npy")
        assert np.abs(np.array(logits) - expected).max() < 1e-4
        assert np.abs(np.array(model(ids, memory="none")) - expected).max() > 1e-2


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
    refused(r"quantised.*--dtype float32", convert, source, tmp_path / "torch", "--to", "pytorch")
    middle = convert(source, tmp_path / "torch", "--to", "pytorch", "--dtype", "float32")
    back = convert(middle, tmp_path / "back")
    assert_equal(block_bits(source), block_bits(back))  # block_bits dequantises


def test_the_marker_is_as_documented(layout):
    marker = json.loads((layout / "hmem_pytorch.json").read_text())
    assert set(marker) == {"format_version", "memory", "anchor", "tensors", "tree", "encoder",
                           "tokenizer"}  # fmt: skip
    page = (ROOT / "docs" / "pytorch_layout.md").read_text()
    for key in marker:
        assert f"| `{key}` |" in page
    for kind in KINDS:
        memory = MemoryConfig(**SIZES, **WIDTHS, **of_kind(kind))
        assert all(f"`{name}`" in page for names in memory.matrices.values() for name in names)
