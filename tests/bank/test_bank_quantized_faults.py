"""A quantised bank that is damaged, or not as its manifest says, never reaches MLX."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hmem.bank import Bank, Quantization
from mlx_hmem.bank.format import PAGE
from mlx_hmem.bank.quantization import is_finite, quantize_block
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from tests.bank import test_bank_faults as plain
from tests.bank.test_bank_quantized import CONFIG, KINDS, all_levels, block_of, make, rounded
from tests.helpers.faults import any_input, flip
from tests.helpers.programs import refused
from tests.helpers.write_bank import write_bank

HOW = {"level": 1, "mode": "affine", "bits": 4, "group_size": 32}
WRONG_QUANTIZATION: list[tuple[str, object]] = [
    ("nothing", None),
    ("no list", HOW),
    ("empty", []),
    ("no level 2", [HOW]),
    ("generic too", [{**HOW, "level": 0}, HOW, {**HOW, "level": 2}]),
    ("twice", [HOW, HOW, {**HOW, "level": 2}]),
    ("falling", [{**HOW, "level": 2}, HOW]),
    ("a level that is not there", [HOW, {**HOW, "level": 3}]),
    ("more bits", [{**HOW, "bits": 8}, {**HOW, "level": 2}]),
    ("fewer bits", [{**HOW, "bits": 3}, {**HOW, "level": 2}]),
    ("bits MLX lacks", [{**HOW, "bits": 7}, {**HOW, "level": 2}]),
    ("one bit", [{**HOW, "bits": 1}, {**HOW, "level": 2}]),
    ("group_size of others", [{**HOW, "group_size": 16}, {**HOW, "level": 2}]),
    ("group_size beyond the width", [{**HOW, "group_size": 64}, {**HOW, "level": 2}]),
    ("another mode", [{**HOW, "mode": "mxfp4"}, {**HOW, "level": 2}]),
    ("unknown mode", [{**HOW, "mode": "mxfp6"}, {**HOW, "level": 2}]),
    ("unknown key", [{**HOW, "sale": 4}, {**HOW, "level": 2}]),
    ("missing key", [{"level": 1, "mode": "affine", "bits": 4}, {**HOW, "level": 2}]),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Levels 1 and 2 in 4 bits, the generic memory in float16."""
    how = [Quantization(level, "affine", 4, 32) for level in (1, 2)]
    return make(tmp_path / "bank", CONFIG, how)


@pytest.mark.parametrize(("name", "value"), WRONG_QUANTIZATION, ids=lambda v: str(v)[:30])
def test_a_wrong_quantisation_is_refused(folder: Path, name: str, value: object) -> None:
    assert len(plain.read_all(folder)) == 5
    plain.change_manifest(folder, ("quantization",), value)
    text = plain.refusal(folder)
    if name == "group_size beyond the width":
        assert "width 32, group_size 64" in text


@pytest.mark.parametrize("key", HOW)
def test_any_other_value_of_a_quantisation_is_refused(folder: Path, key: str) -> None:
    good = (folder / "bank.json").read_bytes()
    for value in [*plain.WRONG, 2, 3, 32.0, "4", "nvfp4", 128]:
        (folder / "bank.json").write_bytes(good)
        plain.change_manifest(folder, ("quantization", 0, key), value)
        plain.refusal(folder)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("dtype",), "bfloat16"), (("dtype",), "float32"),
        (("levels", 0, "block_bytes"), 2 * 3 * 3 * 32 * 2),
        (("levels", 1, "block_stride"), 2 * PAGE), (("memory", "hidden_size"), 64),
        (("memory", "hidden_size"), 16), (("memory", "r"), [2, 3]),
    ],
)  # fmt: skip
def test_a_size_that_does_not_follow_is_refused(folder, place, value):
    plain.change_manifest(folder, place, value)
    plain.refusal(folder)


def test_another_meaning_of_the_same_number_of_bytes_is_refused(tmp_path: Path) -> None:
    """Two numbers of the manifest that agree with each other, and with every size."""
    config = dataclasses.replace(CONFIG, hidden_size=128)
    make(tmp_path, config, all_levels(config, "affine", 4, 128))
    assert plain.read_all(tmp_path)
    mxfp4 = [{**HOW, "level": level, "mode": "mxfp4"} for level in (0, 1, 2)]
    plain.change_manifest(tmp_path, ("quantization",), mxfp4)
    assert "'affine 4 128 float16'; it needs 'mxfp4 4 32 float16'" in plain.refusal(tmp_path)
    plain.change_manifest(tmp_path, ("quantization",), [{**h, "mode": "affine", "group_size": 128}
                                                  for h in mxfp4])  # fmt: skip
    assert plain.read_all(tmp_path)
    plain.change_manifest(tmp_path, ("dtype",), "bfloat16")
    plain.refusal(tmp_path)


def set_header(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / plain.SHARDS[1]
    data = path.read_bytes()
    header = json.loads(data[8:PAGE])
    change(header)
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(PAGE - 8) + data[PAGE:])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h["blocks"].update(dtype="I8"),
        lambda h: h["blocks"].update(dtype="F16", shape=[4, PAGE // 2]),
        lambda h: h["blocks"].update(shape=[2, 2 * PAGE]),
        lambda h: h["__metadata__"].pop("quantization"),
        lambda h: h["__metadata__"].update(quantization="affine 8 32 float16"),
    ],
)
def test_a_header_that_tells_otherwise_is_refused(folder, change):
    set_header(folder, change)
    assert plain.SHARDS[1] in plain.refusal(folder)


def test_flipped_bits_and_cut_files_are_refused(folder: Path) -> None:
    path, size = folder / plain.SHARDS[0], 2 * 3 * 3 * (16 + 4)
    good = path.read_bytes()
    packed = 2 * 3 * 3 * 16
    for at in (0, packed - 1, packed, packed + packed // 8, size - 1):  # in each part
        flip(path, PAGE + PAGE + at, bit=3)
        assert "level 1, cluster 1 of the bank is damaged" in plain.refusal(folder)
        path.write_bytes(good)
    for length in (0, 100, PAGE, PAGE + packed, PAGE + size, len(good) - 1):
        path.write_bytes(good[:length])
        assert plain.SHARDS[0] in plain.refusal(folder)
    path.write_bytes(good)
    with Bank.open(folder) as bank:
        path.write_bytes(good[: 2 * PAGE + packed + 1])  # while it is open, within the scales
        refused("level 1, cluster 1 of the bank is cut off", bank.fetch, (1, 2))


@any_input(100)
@given(
    name=st.sampled_from([*plain.SHARDS, "bank.json"]),
    at=st.integers(0, 700) | st.integers(PAGE, PAGE + 400),
    insert=st.binary(max_size=4),
    cut=st.integers(0, 4),
)
def test_any_damage_is_refused_or_does_not_matter(tmp_path_factory, name, at, insert, cut):
    folder = tmp_path_factory.getbasetemp() / "quantised bank"
    how = [Quantization(level, "affine", 4, 32) for level in (1, 2)]
    if not folder.exists():
        make(folder, CONFIG, how)
    with plain.damaged(folder / name, at, insert, cut), contextlib.suppress(UserError):
        for leaf, memory in zip(plain.PATHS, plain.read_all(folder), strict=False):
            for level, block in enumerate(memory.blocks, 1):
                expected = rounded(CONFIG, level, leaf[level - 1], "float16", how[level - 1])
                assert mx.array_equal(block, expected)


def test_writer_refuses_what_it_cannot_quantise(tmp_path: Path) -> None:
    one, two = ([block_of(CONFIG, level, c) for c in range(2**level)] for level in (1, 2))

    def written(
        *how: Quantization,
        first: list[np.ndarray] = one,
        config: MemoryConfig = CONFIG,
        dtype: str = "float16",
    ) -> None:
        write_bank(
            tmp_path, config, [first, two], None, dtype=dtype, quantization=how, **plain.HASHES
        )

    q, lora = Quantization, dataclasses.replace(KINDS["lora_vo"], r=(1, 1), branching=(2, 2))
    odd = MemoryConfig(hidden_size=16, num_hidden_layers=1, r=(1, 1), branching=(2, 2))
    nan, huge = ([np.full(CONFIG.block_shape(1), value)] * 2 for value in (np.nan, 65504.0))
    apart = [block * np.float32(6e4) / np.abs(block).max() for block in one]
    small, large = ([block * np.float32(f) for block in one] for f in (0.003, 1e6))
    partly = [block * np.array([1, 1, 0.003], np.float32)[:, None, None] for block in one]
    for call, words in [
        (lambda: written(q(1, "affine", 4, 64)), "width 32, group_size 64, level 1"),
        (lambda: written(q(2, "affine", 4, 64), config=lora), "width 32, group_size 64, level 2"),
        (lambda: written(q(1, "nvfp4", 4, 16), config=odd), "packs 32 values"),
        (lambda: written(q(3, "affine", 4, 32)), r"levels that have memory.*\[3\]"),
        (lambda: written(q(1, "affine", 4, 32), q(1, "affine", 8, 32)), "rising levels"),
        (lambda: q(1, "affine", 7, 32), "affine has no such bits: 7"),
        (lambda: q(1, "mxfp8", 8, 64), "mxfp8 has no such group_size: 64"),
        (lambda: q(-1, "mxfp8", 8, 32), "no number"),
        (lambda: written(q(1, "affine", 4, 32), first=nan), "block 0 on level 1 .*not finite"),
        (lambda: written(q(1, "affine", 4, 32), first=apart), "not finite in affine"),
        (lambda: written(q(1, "mxfp4", 4, 32), first=huge), "not finite in mxfp4"),
        (lambda: written(q(1, "nvfp4", 4, 16), first=small), "lost in nvfp4"),
        (lambda: written(q(1, "nvfp4", 4, 16), first=partly), "lost in nvfp4"),
        (lambda: written(q(1, "nvfp4", 4, 16), first=large, dtype="float32"), "lost"),
    ]:
        refused(words, call)
        assert not (tmp_path / "bank.json").exists()
        assert not list(tmp_path.glob(".*"))
    written(q(1, "mxfp4", 4, 32), first=partly)


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 4, 32), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
def test_a_quantised_block_that_is_not_finite_is_known(mode, bits, group_size):
    how, dtype = Quantization(1, mode, bits, group_size), mx.float16
    block = mx.random.normal(CONFIG.block_shape(1), key=mx.random.key(0)).astype(dtype)
    packed, scales, *biases = quantize_block(block, CONFIG, how)
    assert is_finite([packed, scales, *biases], CONFIG, dtype, how)
    nothing = mx.full(scales.shape, 255, mx.uint8) if not biases else scales * mx.nan
    assert not is_finite([packed, nothing, *biases], CONFIG, dtype, how)
    if biases:
        assert not is_finite([packed, scales, scales * mx.inf], CONFIG, dtype, how)
        # The greatest that could stand in a group is infinite, but it does not stand there.
        wide = [mx.zeros_like(packed), mx.full(scales.shape, 6e4, dtype), *biases]
        assert is_finite(wide, CONFIG, dtype, how)
