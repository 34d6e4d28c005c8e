"""Quantised rows that stay packed compute what the same rows do as floats, however they are joined,
stacked and cut."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.bank.quantization import MODES, Quantization, packed_block, quantize_block
from mlx_hmem.config import KINDS, MemoryConfig
from mlx_hmem.memory import Rows, float_block, join_blocks, stack_rows
from mlx_hmem.memory.packed import (
    Mixed,
    Packed,
    arrays_of,
    cast,
    floats,
    ready,
    replaced_end,
    shape_of,
    stays_packed,
)
from tests.helpers.dtypes import HALVES
from tests.helpers.references import config_of, make_ids
from tests.helpers.tiny_anchors import make_anchor

EVERY = [(m, b, g) for m, (bits, groups) in MODES.items() for b in bits for g in groups if g <= 32]
AFFINE, FP4 = ("affine", 4, 32), ("mxfp4", 4, 32)
Way = tuple[str, int, int] | None  # how a level is quantised
# An FFN without a gate, one matrix for several projections, and the plain case.
PAIRS = [("gpt2", "ffn"), ("phi3", "lora_ffn"), ("gpt2", "lora")]
PAIRS += [("openlm", kind) for kind in KINDS]


def block(config: MemoryConfig, level: int, way: Way, seed: int, size: float = 0.15):
    rng = np.random.default_rng((seed, level))
    values = mx.array(size * rng.standard_normal(config.block_shape(level), np.float32))
    how = None if way is None else Quantization(level, *way)
    parts = [values] if how is None else quantize_block(values, config, how)
    return packed_block(parts, config, values.dtype, how)


def memory(config: MemoryConfig, ways: dict[int, Way], seed: int = 0) -> Rows:
    return join_blocks([block(config, *pair, seed) for pair in ways.items()], config)


def as_floats(rows: Rows) -> Rows:
    return tuple(map(floats, rows))


def assert_close(found: mx.array, wanted: mx.array) -> None:
    assert found.dtype == wanted.dtype
    assert mx.allclose(found, wanted, rtol=1e-4, atol=2e-5).item()  # logits of about 3


@pytest.mark.parametrize("way", EVERY, ids=str)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_packed_rows_compute_what_their_floats_do(name, kind, way):
    anchor, ids = make_anchor(name), make_ids()
    config = config_of(anchor, kind)
    slot, alone = attach_memory(anchor, config), anchor(ids)
    mixed = {1: way, 3: FP4 if way == AFFINE else AFFINE}
    partly = {1: None, 3: way}  # a level that is not quantised at all
    for ways in ({1: way, 3: way}, {3: way}, mixed, partly):
        rows = memory(config, ways)
        assert {type(group) for group in rows} == {Packed if len({*ways.values()}) == 1 else Mixed}
        with slot.using(rows):
            found = anchor(ids)
        with slot.using(as_floats(rows)):
            assert_close(found, anchor(ids))
        assert mx.abs(found - alone).max().item() > 1e-3


@pytest.mark.parametrize("way", EVERY, ids=str)
@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_a_row_of_a_batch_with_packed_rows_of_its_own_equals_the_row_alone(name, kind, way):
    """Rows without memory, with fewer levels, and with levels that are packed otherwise."""
    anchor, ids = make_anchor(name), make_ids(shape=(5, 9))
    config = config_of(anchor, kind)
    slot = attach_memory(anchor, config)
    levels = ({1: way, 3: way}, {1: way}, {0: AFFINE}, {1: None, 3: way})
    memories = [memory(config, ways, seed) for seed, ways in enumerate(levels)]
    memories.insert(2, None)
    with slot.using(stack_rows(memories)):
        together = anchor(ids)
    for row, own in enumerate(memories):
        with slot.using(None if own is None else as_floats(own)):
            assert_close(together[row : row + 1], anchor(ids[row : row + 1]))


@pytest.mark.parametrize("way", EVERY, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_joining_packed_levels_is_packing_the_joined_ones_bit_for_bit(kind, way):
    config = config_of(make_anchor("openlm"), kind)
    plain = join_blocks([float_block(block(config, level, None, 0)) for level in (1, 3)], config)
    options = Quantization(1, *way).options
    for group, wanted in zip(memory(config, {1: way, 3: way}), plain, strict=True):
        assert group.arrays[0].shape[-2] == 7
        for array, right in zip(group.arrays, mx.quantize(wanted, **options), strict=True):
            assert mx.array_equal(array, right)


def test_stacked_rows_are_their_floats_with_zeros_to_the_longest():
    config = config_of(make_anchor("openlm"), "lora_ffn")
    memories = [memory(config, {1: AFFINE, 3: AFFINE}), None, memory(config, {3: AFFINE}, 1)]
    for place, group in enumerate(stack_rows(memories)):
        assert type(group) is Packed
        found = floats(group)
        assert found.shape == shape_of(group)
        for row, own in zip(found, memories, strict=True):
            num_rows = 0 if own is None else shape_of(own[place])[-2]
            if own is not None:
                assert mx.array_equal(row[..., :num_rows, :], floats(own[place]))
            assert not row[..., num_rows:, :].any()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({1: AFFINE, 3: AFFINE}, {3: AFFINE}),
        ({1: AFFINE, 3: FP4}, {3: FP4}),
        ({1: None, 3: FP4}, {3: FP4}),
        ({1: None, 3: None}, {3: None}),
    ],
)
def test_the_last_levels_are_replaced_where_they_lie(before, after):
    config = config_of(make_anchor("openlm"), "lora_qk")
    old, new = memory(config, before, 0), memory(config, after, 1)
    wanted = join_blocks([block(config, 1, before[1], 0), block(config, 3, after[3], 1)], config)
    for pair, right in zip(zip(old, new, strict=True), wanted, strict=True):
        found = replaced_end(*pair)
        assert type(found) is type(right)
        for array, other in zip(arrays_of(found), arrays_of(right), strict=True):
            assert mx.array_equal(array, other)


@pytest.mark.parametrize("dtype", [*HALVES, mx.float32], ids=str)
@pytest.mark.parametrize("ways", [{1: AFFINE, 3: AFFINE}, {1: FP4, 3: AFFINE}, {3: None}], ids=str)
def test_on_a_cpu_a_memory_is_made_floats_once(ways, dtype):
    """Where packed rows are multiplied more slowly than floats, whatever the shape."""
    assert not stays_packed()
    config = config_of(make_anchor("openlm"), "lora_qk")
    whole = memory(config, ways)
    a_layer = tuple(cut_layer(group, 1) for group in whole)
    for rows in (whole, a_layer):
        for group, found in zip(rows, ready(rows, dtype), strict=True):
            assert type(found) is mx.array
            assert found.dtype == dtype
            assert mx.array_equal(found, floats(cast(group, dtype)))


def cut_layer(group, place):
    if isinstance(group, Mixed):
        return Mixed(tuple(cut_layer(piece, place) for piece in group.pieces))
    if isinstance(group, Packed):
        return group._replace(arrays=tuple(array[place] for array in group.arrays))
    return group[place]


def test_packed_rows_for_a_float32_anchor_take_little_more_than_in_the_file(monkeypatch):
    monkeypatch.setattr("mlx_hmem.memory.packed.stays_packed", lambda: True)
    config = MemoryConfig(512, 2, (48, 16), (2, 2))
    blocks = [block(config, level, ("affine", 4, 64), 0) for level in (1, 2)]
    stored = [tuple(cast(group, mx.bfloat16) for group in each) for each in blocks]
    sizes = [
        sum(array.nbytes for array in arrays_of(rows))
        for rows in (stored[0] + stored[1], ready(join_blocks(stored, config), mx.float32))
    ]
    assert sizes[0] == config.fetched_parameters * 9 // 16  # 4 bits, and 32 for 64 of them
    assert sizes[1] == config.fetched_parameters * 10 // 16
