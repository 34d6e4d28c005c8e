"""The memory bank: what is written comes back, and only what is asked for is read."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mlx_hmem.bank import Bank
from mlx_hmem.bank.format import PAGE, STORED_TYPES
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import read_safetensors_header
from tests.bank.test_views import Reads
from tests.helpers.faults import any_input, in_threads
from tests.helpers.programs import refused
from tests.helpers.write_bank import write_bank

CONFIG = MemoryConfig(hidden_size=8, num_hidden_layers=2, r=(3, 0, 2), branching=(2, 2, 3))
PATH = (1, 3, 10)
HASHES = {"anchor_hash": "xxh3:a", "tree_hash": "xxh3:t"}
BLOCK_BYTES = {level: 4 * int(np.prod(CONFIG.block_shape(level))) for level in (0, 1, 3)}


def block_of(level: int, cluster: int, config: MemoryConfig = CONFIG) -> np.ndarray:
    """A block of its own for each (level, cluster); level 0 is the generic memory."""
    rng = np.random.default_rng((level, cluster))
    return rng.standard_normal(config.block_shape(level), dtype=np.float32)


def blocks_of(level: int, config: MemoryConfig = CONFIG) -> Iterator[np.ndarray]:
    return (block_of(level, c, config) for c in range(config.num_clusters[level - 1]))


def make(folder: Path, dtype: str = "float32", **options: int) -> Path:
    levels = [blocks_of(1), None, blocks_of(3)]
    write_bank(folder, CONFIG, levels, block_of(0, 0), dtype=dtype, **HASHES, **options)
    return folder


def rounded(block: np.ndarray, dtype: str) -> mx.array:
    return mx.array(block).astype(STORED_TYPES[dtype].dtype)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "bank")


@pytest.mark.parametrize("shard_bytes", [4 << 30, PAGE + 5 * PAGE, 1])
@pytest.mark.parametrize("dtype", STORED_TYPES)
def test_every_block_comes_back(tmp_path: Path, dtype: str, shard_bytes: int) -> None:
    make(tmp_path, dtype, shard_bytes=shard_bytes)
    with Bank.open(tmp_path) as bank:
        assert bank.config == CONFIG
        assert (bank.anchor_hash, bank.tree_hash) == ("xxh3:a", "xxh3:t")
        for leaf in range(12):
            path = (leaf // 6, leaf // 3, leaf)
            first, second, third = bank.fetch(path).blocks
            assert second is None  # r = 0
            for block, level in ((first, 1), (third, 3)):
                assert block.dtype == STORED_TYPES[dtype].dtype
                assert mx.array_equal(block, rounded(block_of(level, path[level - 1]), dtype))
        (generic,) = bank.generic().blocks
        assert mx.array_equal(generic, rounded(block_of(0, 0), dtype))


@pytest.mark.parametrize("dtype", STORED_TYPES)
def test_mlx_and_plain_reads_agree_with_the_reader(tmp_path: Path, dtype: str) -> None:
    make(tmp_path, dtype, shard_bytes=PAGE + 5 * PAGE)
    with Bank.open(tmp_path) as bank:
        fetched = bank.fetch(PATH).blocks[2]
    # Cluster 10 of level 3 lies in shards of 5 blocks: the third shard, row 0.
    path = tmp_path / "level-3.00002.safetensors"
    rows = mx.load(str(path))["blocks"]
    assert rows.shape == (2, PAGE // STORED_TYPES[dtype].dtype.size)
    assert mx.array_equal(rows[0, : fetched.size].reshape(fetched.shape), fetched)
    info = read_safetensors_header(path)[0]["blocks"]
    assert info.start == PAGE
    plain = np.fromfile(path, np.uint8, count=fetched.nbytes, offset=PAGE)
    assert np.array_equal(plain, np.array(fetched.reshape(-1).view(mx.uint8)))
    padding = path.read_bytes()[PAGE + fetched.nbytes : 2 * PAGE]
    assert not any(padding)


def test_safetensors_library_opens_a_shard(folder: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    rows = numpy.load_file(folder / "level-1.00000.safetensors")["blocks"]
    block = block_of(1, 1)
    assert np.array_equal(rows[1, : block.size], block.reshape(-1))


def test_blocks_of_mlx_and_strided_arrays_are_stored_alike(tmp_path: Path) -> None:
    def turned(level: int) -> Iterator[mx.array]:
        return (mx.array(b.swapaxes(0, 3)).swapaxes(0, 3) for b in blocks_of(level))

    make(tmp_path / "plain", "bfloat16")
    write_bank(
        tmp_path / "turned", CONFIG, [turned(1), None, turned(3)],
        block_of(0, 0).astype(np.float64), dtype="bfloat16", **HASHES,
    )  # fmt: skip
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "turned" / path.name).read_bytes()


def test_none_is_a_block_of_zeros_and_a_hole(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, r=(40_000, 0, 2), num_hidden_layers=1)
    some = block_of(3, 5, config)
    deep = [some if c == 5 else None for c in range(12)]
    write_bank(tmp_path, config, [[None, None], [], deep], None, dtype="float32", **HASHES)
    shard = (tmp_path / "level-1.00000.safetensors").stat()
    assert shard.st_size > 2 * 3 * 40_000 * 8 * 4
    if sys.platform == "linux":  # elsewhere the file system decides
        assert shard.st_blocks * 512 < shard.st_size / 10
    with Bank.open(tmp_path) as bank:
        first, _, third = bank.fetch((0, 1, 5)).blocks
        assert not mx.any(first).item()
        assert mx.array_equal(third, mx.array(some))
        assert not mx.any(bank.generic().blocks[0]).item()


@any_input(25)
@given(
    hidden=st.integers(1, 40), layers=st.integers(1, 3),
    r=st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any), branching=st.integers(2, 3),
    dtype=st.sampled_from(list(STORED_TYPES)), shard_bytes=st.integers(1, 10 * PAGE),
    data=st.data(),
)  # fmt: skip
def test_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory,
    hidden: int,
    layers: int,
    r: list[int],
    branching: int,
    dtype: str,
    shard_bytes: int,
    data: st.DataObject,
) -> None:
    config = MemoryConfig(hidden, layers, tuple(r), (branching,) * len(r))
    folder = tmp_path_factory.mktemp("bank")
    levels = [blocks_of(level, config) for level in range(1, len(r) + 1)]
    generic = block_of(0, 0, config)
    write_bank(folder, config, levels, generic, dtype=dtype, **HASHES, shard_bytes=shard_bytes)
    leaf = data.draw(st.integers(0, config.num_clusters[-1] - 1))
    path = tuple(leaf // branching ** (len(r) - level) for level in range(1, len(r) + 1))
    with Bank.open(folder) as bank:
        for level, block in enumerate(bank.fetch(path).blocks, 1):
            if r[level - 1] == 0:
                assert block is None
                continue
            expected = rounded(block_of(level, path[level - 1], config), dtype)
            assert mx.array_equal(block, expected)


needs_proc = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="/proc is Linux's")


def test_fetch_reads_the_blocks_of_the_path_and_nothing_else(folder, monkeypatch):
    reads = Reads(monkeypatch)
    with Bank.open(folder) as bank:
        assert reads.reads == []
        assert bank.bytes_read == 0
        bank.fetch(PATH)
        places = [(1, PAGE + 1 * PAGE), (3, PAGE + 10 * PAGE)]
        files = {n: (folder / f"level-{n}.00000.safetensors").stat().st_ino for n in (1, 3)}
        assert reads.reads == [(files[n], at, at + BLOCK_BYTES[n]) for n, at in places]
        assert bank.bytes_read == BLOCK_BYTES[1] + BLOCK_BYTES[3]


def read_by_process() -> int:
    """Bytes this process has asked of any file, by the kernel's count."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@needs_proc
def test_kernel_counts_the_bytes_of_the_blocks(tmp_path: Path) -> None:
    config = MemoryConfig(64, 4, (64, 16), (4, 4))
    write_bank(tmp_path, config, [[None] * 4, [None] * 16], None, dtype="bfloat16", **HASHES)
    with Bank.open(tmp_path) as bank:
        bank.fetch((0, 0))  # whatever MLX loads on its first call
        own = read_by_process()
        own = read_by_process() - own  # what looking costs
        before = read_by_process()
        bank.fetch((2, 9))
        read = read_by_process() - before - own
    assert read == config.fetched_parameters * 2


def test_sources_are_told_and_cached_blocks_are_not_read_again(folder: Path) -> None:
    with Bank.open(folder, resident_levels=(1,)) as bank:
        assert [vars(b) for b in bank.fetch(PATH).reads] == [
            {"level": 1, "cluster": 1, "bytes": BLOCK_BYTES[1], "source": "disk"},
            {"level": 3, "cluster": 10, "bytes": BLOCK_BYTES[3], "source": "disk"},
        ]
        read = bank.bytes_read
        assert [b.source for b in bank.fetch(PATH).reads] == ["resident", "cache"]
        assert [b.source for b in bank.fetch((1, 3, 9)).reads] == ["resident", "disk"]
        assert bank.bytes_read == read + BLOCK_BYTES[3]
        assert [(b.level, b.bytes, b.source) for b in bank.generic().reads] == [
            (0, BLOCK_BYTES[0], "disk")
        ]


def test_a_fetched_memory_is_shown_in_a_line(folder: Path) -> None:
    with Bank.open(folder) as bank:
        size = f"{BLOCK_BYTES[1] + BLOCK_BYTES[3]:,} bytes of float"
        assert repr(bank.fetch(PATH)).startswith(
            f"FetchedMemory(ffn, level 1 cluster 1, level 3 cluster 10, {size}"
        )
        assert "generic" in repr(bank.generic())
        assert len(repr(bank)) < 80


def test_cache_drops_the_least_recently_used_and_stays_in_its_bound(folder: Path) -> None:
    # Room for two blocks of level 3; those of level 1 are larger than the whole cache.
    bound = 2 * BLOCK_BYTES[3]
    assert BLOCK_BYTES[1] < bound < BLOCK_BYTES[1] + BLOCK_BYTES[3]
    with Bank.open(folder, resident_levels=(1,), cache_bytes=bound) as bank:

        def sources(*leaves: int) -> list[str]:
            found = []
            for leaf in leaves:
                found.append(bank.fetch((leaf // 6, leaf // 3, leaf)).reads[1].source)
                assert sum(block.nbytes for block in bank._kept._cache.values()) <= bound
                assert bank._kept._cached_bytes == sum(b.nbytes for b in bank._kept._cache.values())
            return found

        assert sources(0, 1, 0, 1) == ["disk", "disk", "cache", "cache"]
        assert sources(2, 1, 0) == ["disk", "cache", "disk"]
        sources(*range(12))
        assert len(bank._kept._cache) == 2


def test_cache_of_zero_bytes_keeps_nothing(folder: Path) -> None:
    with Bank.open(folder, cache_bytes=0) as bank:
        for _ in range(2):
            assert {b.source for b in bank.fetch(PATH).reads} == {"disk"}
        assert not bank._kept._cache
    refused("cache_bytes", Bank.open, folder, cache_bytes=-1)


def test_blocked_cluster_ends_the_path_above_it(folder: Path) -> None:
    with Bank.open(folder) as bank:

        def levels(*blocked: tuple[int, int]) -> list[int]:
            fetched = bank.fetch(PATH, blocked=frozenset(blocked))
            found = [level for level, block in enumerate(fetched.blocks, 1) if block is not None]
            assert found == [b.level for b in fetched.reads]
            return found

        assert levels() == [1, 3]
        assert levels((3, 10)) == [1]
        assert levels((3, 9)) == [1, 3]
        assert levels((2, 3)) == [1]  # level 2 has no memory, what lies under it has
        assert levels((1, 1)) == []
        assert bank.fetch(PATH, blocked=frozenset({(1, 1)})).rows is None
        for wrong in ((1, 2), (4, 0), (0, 0), (1, -1), (1,), "level", (1, 0.5)):
            with pytest.raises(UserError, match="to block"):
                bank.fetch(PATH, blocked=frozenset([wrong]))  # type: ignore[list-item]


def test_a_blocked_block_is_not_even_read(folder: Path) -> None:
    with Bank.open(folder) as bank:
        bank.fetch(PATH, blocked=frozenset({(1, 1)}))
        assert bank.bytes_read == 0
        bank.fetch(PATH, blocked=frozenset({(3, 10)}))
        assert bank.bytes_read == BLOCK_BYTES[1]


def test_levels_may_lie_in_other_folders(folder: Path, tmp_path: Path) -> None:
    away = tmp_path / "slow disk"
    away.mkdir()
    for path in folder.glob("level-3.*"):
        path.rename(away / path.name)
    refused(r"lacks a file of level 3.*level_folders", Bank.open, folder)
    with Bank.open(folder, level_folders={3: away}) as bank:
        block = bank.fetch(PATH).blocks[2]
        assert mx.array_equal(block, mx.array(block_of(3, 10)))
    refused("no such level", Bank.open, folder, level_folders={4: away})


def test_blocks_do_not_share_buffers_and_outlive_the_bank(folder: Path) -> None:
    with Bank.open(folder, cache_bytes=0) as bank:
        fetched = [bank.fetch((leaf // 6, leaf // 3, leaf)) for leaf in range(12)]
    for leaf, memory in enumerate(fetched):
        block = memory.blocks[2]
        assert mx.array_equal(block, mx.array(block_of(3, leaf)))
    refused("closed", bank.fetch, PATH)


def test_threads_get_their_own_paths(folder: Path) -> None:
    wrong: list[int] = []
    with Bank.open(folder, cache_bytes=2 * BLOCK_BYTES[3]) as bank:

        def work(seed: int) -> None:
            for leaf in np.random.default_rng(seed).integers(0, 12, 50).tolist():
                block = bank.fetch((leaf // 6, leaf // 3, leaf)).blocks[2]
                if block is None or not np.array_equal(np.array(block), block_of(3, leaf)):
                    wrong.append(leaf)

        in_threads(work, 4)
    assert wrong == []


@pytest.mark.parametrize("path", [(1, 3), (1, 3, 5), (2, 4, 12), (0, 0, -1), "abc", None])
def test_wrong_path_is_refused(folder: Path, path: object) -> None:
    with Bank.open(folder) as bank, pytest.raises(UserError):
        bank.fetch(path)  # type: ignore[arg-type]


def test_foreign_bank_is_refused_with_a_remedy_and_checksums_are_of_the_bytes(folder: Path):
    with Bank.open(folder) as bank:
        bank.check("xxh3:a", "xxh3:t")
        refused(r"another anchor.*train one", bank.check, "xxh3:b", "xxh3:t")
        refused("another cluster tree", bank.check, "xxh3:a", "xxh3:u")
    with Bank.open(folder) as bank:
        shard = bank.manifest.levels[1].shards[0]
    expected = "".join(
        xxhash.xxh3_64_hexdigest(block_of(3, cluster).tobytes()) for cluster in range(12)
    )
    assert shard.xxh3 == expected
