"""A damaged, cut, foreign, newer or half-written bank is a one-line error, never gibberish."""

import contextlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hmem.bank import Bank, Manifest
from mlx_hmem.bank.format import PAGE
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.memory import FetchedMemory
from tests.helpers.faults import any_input, flip, kill_half_way
from tests.helpers.programs import refused
from tests.helpers.write_bank import write_bank

CONFIG = MemoryConfig(hidden_size=8, num_hidden_layers=2, r=(3, 2), branching=(2, 2))
PATHS = [(0, 0), (0, 1), (1, 2), (1, 3)]
SHARDS = ["level-1.00000.safetensors", "level-2.00000.safetensors", "generic.safetensors"]
HASHES = {"anchor_hash": "xxh3:a", "tree_hash": "xxh3:t"}


def block_of(level: int, cluster: int) -> np.ndarray:
    rng = np.random.default_rng((level, cluster))
    return rng.standard_normal(CONFIG.block_shape(level), dtype=np.float32)


def make(folder: Path) -> Path:
    levels = [[block_of(level, c) for c in range(2**level)] for level in (1, 2)]
    write_bank(folder, CONFIG, levels, block_of(0, 0), dtype="float32", **HASHES)
    return folder


def read_all(folder: Path) -> list[FetchedMemory]:
    with Bank.open(folder, cache_bytes=0) as bank:
        return [*(bank.fetch(path) for path in PATHS), bank.generic()]


def assert_right(memories: list[FetchedMemory]) -> None:
    for path, memory in zip(PATHS, memories, strict=False):
        for level, block in enumerate(memory.blocks, 1):
            assert mx.array_equal(block, mx.array(block_of(level, path[level - 1])))
    assert mx.array_equal(memories[-1].rows[0], mx.array(block_of(0, 0)))


def refusal(folder: Path) -> str:
    """The one line with which opening or reading is refused."""
    return refused("", read_all, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "bank")


@pytest.mark.parametrize("level", [1, 2])
def test_any_flipped_bit_of_a_block_is_found_and_placed(folder: Path, level: int) -> None:
    path = folder / SHARDS[level - 1]
    good = path.read_bytes()
    size = block_of(level, 0).nbytes
    rng = random.Random(level)
    for cluster in range(2**level):
        for at in (0, size - 1, *(rng.randrange(size) for _ in range(5))):
            flip(path, PAGE * (1 + cluster) + at, bit=rng.randrange(8))
            assert f"level {level}, cluster {cluster} of the bank is damaged" in refusal(folder)
            # The other clusters still answer.
            with Bank.open(folder) as bank:
                for leaf in PATHS:
                    if leaf[level - 1] != cluster:
                        bank.fetch(leaf)
            path.write_bytes(good)
    assert_right(read_all(folder))


def test_damage_of_the_generic_memory_is_found_and_a_damaged_block_stays_refused(folder):
    flip(folder / "generic.safetensors", PAGE + 100)
    assert "the generic memory of the bank is damaged" in refusal(folder)
    flip(folder / SHARDS[0], PAGE)
    with Bank.open(folder) as bank:
        for _ in range(2):
            refused("level 1, cluster 0", bank.fetch, (0, 0))


@pytest.mark.parametrize("name", [*SHARDS, "bank.json"])
def test_cut_file_is_refused(folder: Path, name: str) -> None:
    good = (folder / name).read_bytes()
    for length in {0, 1, 7, 8, 9, 100, PAGE - 1, PAGE, PAGE + 1, len(good) - PAGE, len(good) - 2}:
        if 0 <= length < len(good) - 1:
            (folder / name).write_bytes(good[:length])
            assert name in refusal(folder)
    (folder / name).write_bytes(good + b"x")
    assert name in refusal(folder)


@pytest.mark.parametrize("name", [*SHARDS, "bank.json"])
def test_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in refusal(folder)
    (folder / name).mkdir()
    assert name in refusal(folder)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert "none" in refusal(tmp_path / "none")


def test_file_that_shrinks_while_open_is_an_error_not_a_crash(folder: Path) -> None:
    with Bank.open(folder, cache_bytes=0) as bank:
        os.truncate(folder / SHARDS[1], PAGE + 10)
        refused("level 2, cluster 3 of the bank is cut off", bank.fetch, (1, 3))


def test_failing_disk_is_an_error_that_names_the_block(folder, monkeypatch):
    def preadv(*_: object) -> int:
        raise OSError(5, "Input/output error")

    with Bank.open(folder) as bank:
        monkeypatch.setattr(os, "preadv", preadv)
        refused("cannot read level 1, cluster 1", bank.fetch, (1, 3))


def test_swapped_shards_are_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    levels = [[np.ones(CONFIG.block_shape(1))] * 2, [np.ones(CONFIG.block_shape(2))] * 4]
    write_bank(other, CONFIG, levels, block_of(0, 0), dtype="float32", **HASHES)
    (other / SHARDS[1]).replace(folder / SHARDS[1])
    assert "level 2, cluster 0 of the bank is damaged" in refusal(folder)


def set_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage that rewrites level 2's header within its page."""

    def damage(folder: Path) -> None:
        path = folder / SHARDS[1]
        data = path.read_bytes()
        header = json.loads(data[8:PAGE])
        change(header)
        path.write_bytes(data[:8] + json.dumps(header).encode().ljust(PAGE - 8) + data[PAGE:])

    return damage


def unaligned(folder: Path) -> None:
    path = folder / SHARDS[1]
    data = path.read_bytes()
    text = data[8:PAGE].rstrip()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[PAGE:])


DAMAGED_HEADERS: dict[str, Callable[[Path], None]] = {
    "other name": set_header(lambda h: h.update(rows=h.pop("blocks"))),
    "no tensor": set_header(lambda h: h.pop("blocks")),
    "two tensors": set_header(
        lambda h: h.update(b={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]})
    ),
    "other dtype": set_header(lambda h: h["blocks"].update(dtype="I32")),
    "other shape": set_header(lambda h: h["blocks"].update(shape=[8, PAGE // 8])),
    "flat": set_header(lambda h: h["blocks"].update(shape=[PAGE])),
    "shape that wraps": set_header(lambda h: h["blocks"].update(shape=[2**31 - 1] * 3)),
    "negative": set_header(lambda h: h["blocks"].update(shape=[-4, -PAGE // 4])),
    "shorter": set_header(lambda h: h["blocks"].update(shape=[3, PAGE // 4])),
    "out of the file": set_header(lambda h: h["blocks"].update(data_offsets=[0, 5 * PAGE])),
    "data not on a page": unaligned,
}


@pytest.mark.parametrize("name", DAMAGED_HEADERS)
def test_shard_with_a_wrong_header_is_refused(folder: Path, name: str) -> None:
    DAMAGED_HEADERS[name](folder)
    assert SHARDS[1] in refusal(folder)


def change_manifest(folder: Path, place: tuple[str | int, ...], value: object) -> None:
    path = folder / "bank.json"
    manifest = json.loads(path.read_text())
    target = manifest
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    path.write_text(json.dumps(manifest))


WRONG = [None, True, -1, 0, 1.5, 10**30, "", "../x", [], [[]], {}, {"a": 1}]
PLACES: list[tuple[str | int, ...]] = [
    ("format_version",), ("memory",), ("dtype",), ("byte_order",), ("page_size",),
    ("anchor_hash",), ("tree_hash",), ("levels",), ("generic",), ("memory", "hidden_size"),
    ("memory", "num_hidden_layers"), ("memory", "r"), ("memory", "branching"), ("memory", "kind"),
    ("levels", 0), ("levels", 0, "level"), ("levels", 0, "block_bytes"),
    ("levels", 1, "block_stride"), ("levels", 1, "shards"), ("levels", 1, "shards", 0),
    ("levels", 1, "shards", 0, "file"), ("levels", 1, "shards", 0, "first_cluster"),
    ("levels", 1, "shards", 0, "num_clusters"), ("levels", 1, "shards", 0, "bytes"),
    ("levels", 1, "shards", 0, "xxh3"), ("generic", "shards"), ("quantization",), ("unknown",),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
def test_wrong_value_anywhere_in_the_manifest_is_refused(folder, place):
    good = (folder / "bank.json").read_bytes()
    valid: dict[str, list[object]] = {
        "quantization": [None],
        "first_cluster": [0],
        "anchor_hash": ["", "../x"],
        "tree_hash": ["", "../x"],
    }
    for value in WRONG:
        if any(type(value) is type(v) and value == v for v in valid.get(str(place[-1]), [])):
            continue
        (folder / "bank.json").write_bytes(good)
        change_manifest(folder, place, value)
        refusal(folder)


def test_newer_version_says_update(folder: Path) -> None:
    change_manifest(folder, ("format_version",), 2)
    assert "update mlx_hmem" in refusal(folder)


def test_manifest_with_a_name_twice_is_refused(folder: Path) -> None:
    text = (folder / "bank.json").read_text()
    (folder / "bank.json").write_text(text.replace("{", '{"dtype": "float32",', 1))
    assert "occurs twice" in refusal(folder)


def test_missing_key_of_the_manifest_is_named(folder: Path) -> None:
    values = json.loads((folder / "bank.json").read_text())
    for key in values:
        less = {k: v for k, v in values.items() if k != key}
        (folder / "bank.json").write_text(json.dumps(less))
        text = refusal(folder)
        assert key in text or key.replace("_", " ") in text


@contextlib.contextmanager
def damaged(path: Path, at: int, insert: bytes, cut: int) -> Iterator[None]:
    """Some bytes of a file are others meanwhile."""
    good = path.read_bytes()
    at %= len(good)
    try:
        path.write_bytes(good[:at] + insert + good[at + cut :])
        yield
    finally:
        path.write_bytes(good)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("banks") / "bank")


@any_input(300)
@given(
    name=st.sampled_from([*SHARDS, "bank.json"]), at=st.integers(0, 400) | st.integers(0, 6 * PAGE),
    insert=st.binary(max_size=4), cut=st.integers(0, 4),
)  # fmt: skip
def test_any_damage_is_refused_or_does_not_matter(shared_folder, name, at, insert, cut):
    """Whatever happens to a few bytes of any file: the right blocks, or a UserError."""
    with damaged(shared_folder / name, at, insert, cut), contextlib.suppress(UserError):
        assert_right(read_all(shared_folder))


KILLED = """
import sys
from pathlib import Path
from tests.bank.test_bank_faults import CONFIG, HASHES, block_of
from tests.helpers.write_bank import write_bank

def half(cluster):
    if cluster == int(sys.argv[2]):
        print("half", flush=True)
        sys.stdin.read()

def deep():
    for cluster in range(4):
        half(cluster)
        yield block_of(2, cluster)

write_bank(sys.argv[1], CONFIG, [[block_of(1, c) for c in (0, 1)], deep()], block_of(0, 0),
           dtype="float32", **HASHES, made=lambda level, shard: half(4 if level == 2 else -1))
"""


@pytest.mark.parametrize("cluster", [0, 2, 4])
def test_killed_writer_leaves_no_bank_and_can_start_again(tmp_path: Path, cluster: int) -> None:
    kill_half_way(KILLED, tmp_path, cluster)
    assert (tmp_path / SHARDS[0]).exists()
    assert (tmp_path / SHARDS[1]).exists() == (cluster == 4)
    assert "bank.json" in refusal(tmp_path)
    make(tmp_path)
    assert_right(read_all(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {*SHARDS, "bank.json"}


def test_writer_refuses_what_it_cannot_keep(tmp_path: Path) -> None:
    one, two = ([block_of(level, c) for c in range(2**level)] for level in (1, 2))
    infinite = [np.full(CONFIG.block_shape(1), 1e6)] * 2  # beyond float16
    nan = [np.full(CONFIG.block_shape(1), np.nan)] * 2

    def written(levels: list, generic: np.ndarray | None = None, dtype: str = "float16") -> None:
        write_bank(tmp_path, CONFIG, levels, generic, dtype=dtype, **HASHES)

    for levels, dtype, words in [
        ([two[:2], two], "float16", "wrong shape of block 0 on level 1"),
        ([infinite, two], "float16", "use bfloat16 or float32"),
        ([nan, two], "float32", "block 0 on level 1 cannot be stored"),
        ([one, two], "int8", "unknown bank dtype"),
    ]:
        refused(words, written, levels, dtype=dtype)
        assert not (tmp_path / "bank.json").exists()
        assert not list(tmp_path.glob(".*"))
    written([infinite, two], dtype="bfloat16")


def test_manifest_survives_a_round_trip(folder: Path) -> None:
    manifest = Manifest.from_file(folder / "bank.json")
    assert manifest.to_json() == (folder / "bank.json").read_text()
