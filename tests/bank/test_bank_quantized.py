"""Quantised blocks: what MLX makes of them is what is stored and what comes back."""

import dataclasses
import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.bank import Bank, Manifest, Quantization, stored_levels
from mlx_hmem.bank.format import PAGE, STORED_TYPES
from mlx_hmem.bank.quantization import MODES
from mlx_hmem.config import KINDS as KIND_NAMES
from mlx_hmem.config import MemoryConfig
from mlx_hmem.files import read_safetensors_header
from mlx_hmem.memory import join_blocks
from mlx_hmem.model.load import load
from tests.bank.test_bank_faults import SHARDS, read_all
from tests.helpers.references import config_of, make_ids, of_kind
from tests.helpers.tiny_anchors import make_anchor
from tests.helpers.write_bank import write_bank

HASHES = {"anchor_hash": "xxh3:a", "tree_hash": "xxh3:t"}
EVERY = [(m, b, g) for m, (bits, groups) in MODES.items() for b in bits for g in groups]
# One group size for each mode and number of bits.
EACH = [(mode, bits, group) for mode, bits, group in EVERY if group in (16, 32)]
CONFIG = MemoryConfig(hidden_size=32, num_hidden_layers=2, r=(3, 2), branching=(2, 2))
SIZES = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=96, query_size=64)
KINDS = {
    kind: MemoryConfig(
        **SIZES, key_value_size=32, r=(3, 0, 1), branching=(2, 2, 2), layers=(0, 2), **of_kind(kind)
    )
    for kind in KIND_NAMES
}


def block_of(config: MemoryConfig, level: int, cluster: int, size: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng((level, cluster))
    return size * rng.standard_normal(config.block_shape(level), dtype=np.float32)


def make(
    folder: Path,
    config: MemoryConfig,
    quantization: list[Quantization],
    dtype: str = "float16",
    **options: int,
) -> Path:
    levels = [
        [block_of(config, level, c) for c in range(count)]
        for level, count in enumerate(config.num_clusters, 1)
    ]
    generic = block_of(config, 0, 0)
    write_bank(
        folder, config, levels, generic, dtype=dtype, quantization=quantization, **HASHES, **options
    )
    return folder


def all_levels(config: MemoryConfig, mode: str, bits: int, group_size: int) -> list[Quantization]:
    return [Quantization(level, mode, bits, group_size) for level in stored_levels(config)]


def rounded(
    config: MemoryConfig, level: int, cluster: int, dtype: str, how: Quantization
) -> mx.array:
    """The block through ``mx.quantize`` and back, one matrix of one layer at a time."""
    block = block_of(config, level, cluster)
    layers = []
    for layer in block.reshape(block.shape[0], -1):
        at, matrices = 0, []
        for rows, width in config.groups:
            r = sum(config.r) if level == 0 else config.r[level - 1]
            for _ in range(rows):
                matrix = mx.array(layer[at : at + r * width].reshape(r, width))
                matrix = matrix.astype(STORED_TYPES[dtype].dtype)
                parts = mx.quantize(matrix, **how.options)
                back = mx.dequantize(*parts, **how.options, dtype=matrix.dtype)
                matrices.append(back.reshape(-1))
                at += r * width
        layers.append(mx.concatenate(matrices))
    return mx.stack(layers).reshape(block.shape)


Made = tuple[Path, MemoryConfig, Quantization]


@pytest.fixture(
    scope="module",
    params=[(kind, how) for kind in KINDS for how in EACH],
    ids=lambda pair: f"{pair[0]}-{pair[1][0]}-{pair[1][1]}",
)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A bank of each kind, each of its levels quantised in each mode and number of bits."""
    kind, options = request.param
    quantization = all_levels(KINDS[kind], *options)
    folder = make(tmp_path_factory.mktemp("bank"), KINDS[kind], quantization)
    return folder, KINDS[kind], quantization[0]


def test_fetch_is_what_mlx_makes_of_each_matrix(made: Made) -> None:
    folder, config, how = made
    with Bank.open(folder) as bank:
        for _ in range(2):  # from disk, from the cache
            first, second, third = bank.fetch((1, 2, 5)).blocks
            (generic,) = bank.generic().blocks
            assert second is None
            for block, level, cluster in ((first, 1, 1), (third, 3, 5), (generic, 0, 0)):
                assert block.dtype == mx.float16
                assert mx.array_equal(block, rounded(config, level, cluster, "float16", how))


@pytest.mark.parametrize(("mode", "bits", "group_size"), EVERY)
def test_every_dtype_and_group_size_comes_back(tmp_path, mode, bits, group_size):
    config = dataclasses.replace(CONFIG, hidden_size=128)
    how = Quantization(1, mode, bits, group_size)
    for dtype in STORED_TYPES:
        with Bank.open(make(tmp_path / dtype, config, [how], dtype)) as bank:
            block = bank.fetch((1, 2)).blocks[0]
        assert block.dtype == STORED_TYPES[dtype].dtype
        assert mx.array_equal(block, rounded(config, 1, 1, dtype, how))


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    exponent, m = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(exponent == 0, m * 2.0**-9, 2.0 ** (exponent - 7) * (1 + m / 8))
    return np.where(codes & 128, -size, size)


def read_by_the_page(
    folder: Path, number: int, cluster: int
) -> list[tuple[np.ndarray, int, tuple[int, int]]]:
    """A block as docs/bank_format.md tells to read it, in numpy alone: its groups of matrices."""
    manifest = json.loads((folder / "bank.json").read_text())
    memory = MemoryConfig.from_dict(manifest["memory"])
    (level,) = (v for v in (manifest["generic"], *manifest["levels"]) if v["level"] == number)
    (how,) = (q for q in manifest["quantization"] if q["level"] == number)
    data = (folder / level["shards"][0]["file"]).read_bytes()
    data = data[PAGE + cluster * level["block_stride"] :][: level["block_bytes"]]
    r = sum(memory.r) if number == 0 else memory.r[number - 1]
    bits, group_size = how["bits"], how["group_size"]
    at, groups = 0, []

    def take(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        nonlocal at
        part = np.frombuffer(data, dtype, int(np.prod(shape)), at).reshape(shape)
        at += part.nbytes
        return part

    for matrices, width in memory.groups:
        rows = (memory.num_memory_layers, matrices, r)
        packed = take("u1", (*rows, width * bits // 8))
        stream = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*rows, width, bits)
        q = (stream * (1 << np.arange(bits))).sum(-1)
        shape = (*rows, width // group_size)
        q = q.reshape(*shape, group_size)
        if how["mode"] == "affine":
            kind = {"float32": "<f4", "float16": "<f2"}[manifest["dtype"]]
            scale, bias = (take(kind, shape).astype(np.float32)[..., None] for _ in "sb")
            values = scale * q + bias
        else:
            scale = take("u1", shape)[..., None]
            number_of = np.where(q & 8, -1, 1) * E2M1[q & 7] if bits == 4 else e4m3(q)
            values = number_of * (e4m3(scale) if group_size == 16 else 2.0 ** (scale - 127.0))
        groups.append(values.reshape(*rows, width))
    assert at == len(data) == level["block_bytes"]
    return groups


def assert_page_and_reader_agree(folder: Path, path: tuple[int, ...], close: float) -> None:
    with Bank.open(folder) as bank:
        ours, generic = bank.fetch(path).rows, bank.generic().rows
        levels = [(level, path[level - 1]) for level in stored_levels(bank.config) if level]
    groups = zip(*(read_by_the_page(folder, *key) for key in levels), strict=True)
    theirs = [np.concatenate(group, axis=2) for group in groups]
    pairs = zip((*ours, *generic), (*theirs, *read_by_the_page(folder, 0, 0)), strict=True)
    for a, b in pairs:
        assert np.abs(np.array(a.astype(mx.float32)) - b).max() <= close


def test_a_reader_written_from_the_page_agrees_with_ours(made: Made) -> None:
    # Values up to 1.5; scale times number is rounded in float16 before the bias is added.
    assert_page_and_reader_agree(made[0], (1, 2, 5), 2e-3 if made[2].mode == "affine" else 0)


@pytest.mark.parametrize("bits", MODES["affine"][0])
def test_a_reader_written_from_the_page_agrees_in_float32(tmp_path: Path, bits: int) -> None:
    make(tmp_path, KINDS["kv"], all_levels(KINDS["kv"], "affine", bits, 64), "float32")
    assert_page_and_reader_agree(tmp_path, (1, 2, 5), 1e-6)


def test_sizes_are_those_of_the_formula(made: Made) -> None:
    folder, config, how = made
    scale_bytes = 2 * 2 if how.mode == "affine" else 1
    manifest = Manifest.from_file(folder / "bank.json")
    for level, r in zip(manifest.all_levels, (4, 3, 1), strict=True):
        values = [2 * matrices * r * width for matrices, width in config.groups]
        size = sum(v * how.bits // 8 + v // how.group_size * scale_bytes for v in values)
        assert level.block_bytes == size
        (shard,) = level.shards
        info = read_safetensors_header(folder / shard.file)[0]["blocks"]
        shape = (shard.num_clusters, level.block_stride)
        assert (info.dtype, info.shape, info.start) == ("U8", shape, PAGE)
        data = (folder / shard.file).read_bytes()
        assert any(data[PAGE : PAGE + size])
        assert not any(data[PAGE + size : PAGE + level.block_stride])


def test_joining_quantised_levels_is_quantising_the_joined_ones(made: Made) -> None:
    folder, config, how = made
    with Bank.open(folder) as bank:
        rows = bank.fetch((0, 1, 3)).rows
    blocks = [mx.array(block_of(config, *key)).astype(mx.float16) for key in ((1, 0), (3, 3))]
    for before, after in zip(join_blocks(blocks, config), rows, strict=True):
        assert after.shape[-2] == 4
        parts = mx.quantize(before, **how.options)
        assert mx.array_equal(after, mx.dequantize(*parts, **how.options, dtype=mx.float16))


def test_levels_differ_and_the_others_stay_as_they_were(tmp_path: Path) -> None:
    config = KINDS["ffn"]
    mixed = [Quantization(3, "mxfp4", 4, 32), Quantization(1, "affine", 8, 64)]  # any order
    plain, folder = make(tmp_path / "plain", config, []), make(tmp_path / "mixed", config, mixed)
    manifest = json.loads((folder / "bank.json").read_text())
    assert manifest["quantization"] == [
        {"level": 1, "mode": "affine", "bits": 8, "group_size": 64},
        {"level": 3, "mode": "mxfp4", "bits": 4, "group_size": 32},
    ]
    assert Manifest.from_file(folder / "bank.json").to_json() == (folder / "bank.json").read_text()
    assert json.loads((plain / "bank.json").read_text())["quantization"] is None
    assert (plain / SHARDS[2]).read_bytes() == (folder / SHARDS[2]).read_bytes()
    with Bank.open(folder) as bank:
        fetched = bank.fetch((1, 2, 4))
        first, _, third = fetched.blocks
        assert [b.bytes for b in fetched.reads] == [3 * 2 * 3 * 68, 3 * 2 * 34]
        assert bank.bytes_read == 3 * 2 * 3 * 68 + 3 * 2 * 34
        (generic,) = bank.generic().blocks
    assert mx.array_equal(first, rounded(config, 1, 1, "float16", mixed[1]))
    assert mx.array_equal(third, rounded(config, 3, 4, "float16", mixed[0]))
    assert mx.array_equal(generic, mx.array(block_of(config, 0, 0)).astype(mx.float16))


@pytest.mark.parametrize(("mode", "bits", "group_size"), EACH)
def test_no_block_is_a_hole_of_zeros(tmp_path: Path, mode: str, bits: int, group_size: int) -> None:
    how = all_levels(CONFIG, mode, bits, group_size)
    zeros = np.zeros(CONFIG.block_shape(2), np.float32)
    write_bank(tmp_path, CONFIG, [[None] * 2, [zeros] * 4], None, quantization=how, **HASHES)
    data = (tmp_path / SHARDS[0]).read_bytes()
    assert not any(data[PAGE:])
    for memory in read_all(tmp_path):
        assert not mx.any(memory.rows[0]).item()


def test_cache_counts_what_is_stored(tmp_path: Path) -> None:
    how = all_levels(CONFIG, "affine", 4, 32)
    make(tmp_path, CONFIG, how, "float32")
    stored = 2 * 3 * 2 * (16 + 8)
    with Bank.open(tmp_path, resident_levels=(1,), cache_bytes=4 * stored) as bank:
        for leaf in (0, 1, 2, 3, 0, 1, 2, 3):
            fetched = bank.fetch((leaf // 2, leaf))
        assert [b.source for b in fetched.reads] == ["resident", "cache"]
        # In float32 one block would not have fitted beside another.
        assert bank._kept._cached_bytes == 4 * stored < 2 * block_of(CONFIG, 2, 0).nbytes
        read = bank.bytes_read
        bank.fetch((0, 0))
        assert bank.bytes_read == read == 4 * stored + 2 * 3 * 3 * 24 * 2


# The root mean square by which quantisation changes the logits, in parts of that by which memory
# does: over the kinds at most 0.018 in 8 bits and 0.35 in 4.
@pytest.mark.parametrize(("bits", "bound"), [(8, 0.03), (4, 0.5)])
@pytest.mark.parametrize("kind", KIND_NAMES)
def test_quantised_memory_on_a_quantised_anchor_says_nearly_the_same(tmp_path, kind, bits, bound):
    ids, anchor = make_ids(), make_anchor("openlm")
    nn.quantize(anchor, 32, 4)
    config = config_of(anchor, kind)
    slot, logits = attach_memory(anchor, config), {}
    for name, how in ("float", []), ("quantised", all_levels(config, "affine", bits, 32)):
        make(tmp_path / name, config, how, "float32")
        with Bank.open(tmp_path / name) as bank, slot.using(bank.fetch((1, 2, 5)).rows):
            logits[name] = anchor(ids)
    alone = anchor(ids)
    effect, change = (
        float(mx.sqrt(mx.mean((logits["float"] - other) ** 2)))
        for other in (alone, logits["quantised"])
    )
    assert effect > 0.1
    assert 0 < change < bound * effect


def test_a_model_runs_on_a_quantised_copy_of_its_bank(broken: Path) -> None:
    """Whole way: every block of the float bank read, written in 4 bits, loaded, streamed."""
    before = load(broken, cache_bytes=0)
    bank, text = before.bank, "The memory"
    config = bank.config
    levels = [
        [bank.blocks([(level, c)])[0] for c in range(count)] if config.r[level - 1] else None
        for level, count in enumerate(config.num_clusters, 1)
    ]
    how = all_levels(config, "nvfp4", 4, 16)  # its rows are but 16 wide
    (generic,) = bank.generic().blocks
    (broken / "bank").rename(broken / "float bank")
    write_bank(
        broken / "bank", config, levels, generic, dtype="float32", quantization=how,
        anchor_hash=bank.anchor_hash, tree_hash=bank.tree_hash,
    )  # fmt: skip
    after = load(broken)
    fetches = [model.fetch(text) for model in (before, after)]
    assert fetches[0].path == fetches[1].path
    assert fetches[1].bytes_read * 64 == fetches[0].bytes_read * 9  # 32 bits, 4.5 bits
    expected = mx.dequantize(
        *mx.quantize(fetches[0].rows[0], 16, 4, "nvfp4"),
        group_size=16, bits=4, mode="nvfp4", dtype=mx.float32,
    )  # fmt: skip
    assert mx.array_equal(fetches[1].rows[0], expected)
    pieces = [piece.text for piece in after.stream(text, max_tokens=8)]
    slow = before.stream_ids(
        after.tokenizer.encode(text), dataclasses.replace(fetches[0], rows=(expected,)), 8
    )
    assert pieces == [piece.text for piece in slow]
