"""A memory that is used while it is being read is the one that is fetched before."""

import gc
import math
import os
import threading
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_hmem import load
from mlx_hmem.bank import Bank, Quantization
from mlx_hmem.bank.format import PAGE
from mlx_hmem.bank.read.blocks import PIECE
from mlx_hmem.config import KINDS, MemoryConfig
from tests.conftest import save_bank
from tests.helpers.faults import flip
from tests.helpers.programs import refused
from tests.helpers.references import of_kind

PATH = (1, 5)
LAYERS = 4


def config_of(kind: str, r: tuple[int, int] = (4, 2)) -> MemoryConfig:
    sizes = dict(intermediate_size=64, query_size=32, key_value_size=32)
    return MemoryConfig(
        hidden_size=32, num_hidden_layers=LAYERS, r=r, branching=(2, 3), **sizes, **of_kind(kind)
    )


def make(folder: Path, config: MemoryConfig, **options: object) -> Path:
    return save_bank(folder, config, "a", "t", size=1.0, **options)


def layers_of(bank: Bank) -> list[list[mx.array]]:
    """The rows of each layer of the path, fetched whole."""
    rows = bank.fetch(PATH).rows
    return [[group[layer].astype(mx.float32) for group in rows] for layer in range(LAYERS)]


def assert_same(arriving, wanted) -> None:
    for layer in range(LAYERS):
        for group, right in zip(arriving[layer], wanted[layer], strict=True):
            assert group.dtype == mx.float32
            assert mx.array_equal(group, right)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_every_layer_is_that_of_the_fetched_memory(tmp_path, kind, kept):
    make(tmp_path, config_of(kind), dtype="float16")
    with Bank.open(tmp_path) as bank, Bank.open(tmp_path) as other:
        if kept:
            bank.blocks([(level, PATH[level - 1]) for level in range(1, kept + 1)])
        arriving = bank.begin(PATH)
        assert [block.source for block in arriving.reads] == [
            "cache" if level <= kept else "disk" for level in (1, 2)
        ]
        assert_same(arriving, layers_of(other))
        kept = bank.fetch(PATH).reads  # what has arrived
        assert {block.source for block in kept} == {"cache"}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_that_the_cache_will_not_hold_are_the_same_and_never_whole(tmp_path, kind):
    config = config_of(kind)
    make(tmp_path, config, dtype="float32")
    small = 4 * math.prod(config.block_shape(2))  # only level 2 fits into the cache
    with Bank.open(tmp_path, cache_bytes=small) as bank, Bank.open(tmp_path) as other:
        wanted = layers_of(other)
        arriving = bank.begin(PATH)
        (first, second) = (block.missing for block in arriving._blocks)
        assert (len(first.reading.block.buffers), len(second.reading.block.buffers)) == (LAYERS, 1)
        for layer in range(LAYERS):
            arriving[layer]
            assert len(first.reading.block.buffers) == LAYERS - 1 - layer
        assert_same(arriving, wanted)
        assert not bank.keeps((1, PATH[0]))
        assert bank.keeps((2, PATH[1]))
        assert bank.bytes_read == 4 * config.fetched_parameters


def test_one_that_could_not_be_read_says_so_each_time_it_is_asked(tmp_path):
    make(tmp_path, config_of("ffn"), dtype="float32")
    flip(tmp_path / "level-2.00000.safetensors", -PAGE)
    with Bank.open(tmp_path, cache_bytes=0) as bank:
        arriving = bank.begin(PATH)
        for _ in range(2):
            refused("level 2, cluster 5 of the bank is damaged", arriving.wait)


def test_quantised_blocks_arrive_too(tmp_path):
    quantization = [Quantization(level, "affine", 8, 32) for level in (0, 1, 2)]
    make(tmp_path, config_of("ffn"), quantization=quantization)
    with Bank.open(tmp_path) as bank, Bank.open(tmp_path) as other:
        assert_same(bank.begin(PATH), layers_of(other))


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30])  # read layer by layer, and as a whole
def test_no_layer_waits_for_what_only_later_ones_need(tmp_path, monkeypatch, cache_bytes):
    config = config_of("ffn", r=(PIECE // 32 // 12, 2))  # a layer of level 1 is nearly a piece
    make(tmp_path, config, dtype="float32")
    gate, preadv = threading.Event(), os.preadv
    size = (tmp_path / "level-1.00000.safetensors").stat().st_size
    last = size - PIECE - PAGE  # the last pieces of cluster 1, the last block of level 1

    def held(file: int, buffers: list[memoryview], offset: int) -> int:
        if offset >= last:
            gate.wait(30)
        return preadv(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", held)
    with Bank.open(tmp_path, cache_bytes=cache_bytes) as bank, Bank.open(tmp_path) as other:
        arriving = bank.begin(PATH)
        first = [arriving[layer] for layer in range(LAYERS - 1)]  # without the last one
        mx.eval(first)
        assert not arriving.is_here(LAYERS - 1)
        assert bank.bytes_read < config.fetched_parameters * 4
        gate.set()
        assert_same([*first, arriving[LAYERS - 1]], layers_of(other))
        assert arriving.is_here(LAYERS - 1)
        assert bank.bytes_read == config.fetched_parameters * 4


def test_damage_ends_it_before_the_last_layer(tmp_path):
    make(tmp_path, config_of("ffn"), dtype="float32")
    shard = tmp_path / "level-2.00000.safetensors"
    flip(shard, -PAGE)  # the first byte of the last block, cluster 5
    with Bank.open(tmp_path) as bank:
        arriving = bank.begin(PATH)
        for layer in range(LAYERS - 1):
            arriving[layer]
        refused("level 2, cluster 5 of the bank is damaged", lambda: arriving[LAYERS - 1])
        os.truncate(shard, shard.stat().st_size - PAGE)
        refused("level 2, cluster 5 of the bank is cut off", lambda: bank.begin(PATH).wait())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files through /proc")
def test_one_that_nobody_waits_for_leaves_no_open_file(tmp_path):
    make(tmp_path, config_of("ffn"))
    with Bank.open(tmp_path, cache_bytes=0) as bank:
        bank.begin(PATH).wait()
        gc.collect()  # what other tests have left open
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            bank.begin(PATH)
        for _ in range(50):
            bank.begin(PATH).wait()
        assert len(os.listdir("/proc/self/fd")) == before


def test_text_and_logits_are_those_of_a_memory_fetched_before():
    model, other = load(), load()
    prompt = "The atomic number of iron is"
    ids = model.tokenizer.encode(prompt)
    waited, begun = other.fetch(prompt), model.fetch(prompt, wait=False)
    assert (begun.path, begun.bytes_read) == (waited.path, waited.bytes_read)
    right = other.with_rows(waited.rows)(mx.array([ids]))
    assert mx.array_equal(model.with_rows(begun.rows)(mx.array([ids])), right)
    texts = [
        "".join(p.text for p in m.stream_ids(ids, m.fetch(prompt, wait=wait), 20))
        for m, wait in ((model, False), (other, True))
    ]
    assert texts[0] == texts[1]
