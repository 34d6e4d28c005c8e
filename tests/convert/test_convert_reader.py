"""Reading tensors from files of others: names, shapes and bits are those in the files."""

import pickle
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

from convert.torch_files import tensors
from convert.torch_files.names import STORAGES, TYPES
from convert.torch_files.pickles import open_files
from convert.torch_files.tensors import (
    MLX_TYPES,
    ComputedTensor,
    LazyTensor,
    bits_of,
    open_safetensors,
    read_bits,
)
from convert.torch_files.writer import write_torch
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors
from tests.helpers.faults import any_input
from tests.helpers.programs import refused
from tests.helpers.torch_files import archive, name, opcodes, parts, storage, tensor, write

BYTES = np.random.default_rng(0).integers(0, 256, 1 << 12, dtype=np.uint8)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors take the ways of large ones."""
    monkeypatch.setattr(tensors, "PIECE", 64)
    monkeypatch.setattr(tensors, "GAP", 24)


@pytest.mark.parametrize("kind", STORAGES)
def test_bits_of_every_storage_class_are_those_in_the_file(tmp_path: Path, kind: str) -> None:
    item = tensors.ITEM_SIZES[STORAGES[kind]]
    at = storage(count=6, kind=name("torch", kind))
    raw = BYTES[: 6 * item].tobytes()
    path = write(tmp_path / "x.pt", {"w": tensor((2, 2), (2, 1), 1, at)}, {"0": raw})
    found = open_files([path]).tensors["w"]
    assert (found.dtype, found.shape, found.strides) == (STORAGES[kind], (2, 2), None)
    assert found.read().tobytes() == raw[item : 5 * item]
    assert found.nbytes == 4 * item


@pytest.mark.parametrize("kind", TYPES)
def test_bits_of_untyped_storages_take_the_tensors_type(tmp_path: Path, kind: str) -> None:
    item = tensors.ITEM_SIZES[TYPES[kind]]
    at = storage(count=3 * item, kind=name("torch.storage", "UntypedStorage"))
    hooks = name("collections", "OrderedDict") + b")R"
    arguments = (at, 1, (2,), (1,), False, hooks, name("torch", kind))
    made = name("torch._utils", "_rebuild_tensor_v3") + opcodes(arguments) + b"R"
    raw = BYTES[: 3 * item].tobytes()
    path = write(tmp_path / "x.pt", {"w": made}, {"0": raw})
    found = open_files([path]).tensors["w"]
    assert (found.dtype, found.read().tobytes()) == (TYPES[kind], raw[item:])


def test_what_the_writer_writes_is_read_back(tmp_path: Path) -> None:
    arrays = {
        f"layer.{dtype}": BYTES[: 12 * tensors.ITEM_SIZES[dtype]].view(
            tensors.BITS[tensors.ITEM_SIZES[dtype]]
        )
        for dtype in ("F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8")
    }
    entries = [(n, n.split(".")[1], (3, 4), [a[:6], a[6:]]) for n, a in arrays.items()]
    values = {"epoch": 3, "name": "é", "big": 2**70, "list": [1.5, None, (True, -1)], "d": {"a": 1}}
    write_torch(tmp_path / "x.pt", entries, values, aliases={"tied": "layer.F32"})
    found = open_files([tmp_path / "x.pt"])
    assert list(found.tensors) == [*arrays, "tied"]
    assert found.values == values
    assert found.left_out == ()
    for label, array in (arrays | {"tied": arrays["layer.F32"]}).items():
        assert np.array_equal(found.tensors[label].read(), array.reshape(3, 4))
        assert np.array_equal(found.tensors[label].read(1, 2), array.reshape(3, 4)[1:])


@any_input(150)
@given(data=st.data())
def test_rows_of_any_strides_equal_the_strided_view(data, small_pieces, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "strided"
    if not path.exists():
        path.write_bytes(BYTES.tobytes())
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    strides = tuple(data.draw(st.sampled_from([0, 1, 2, 5, 6, 40, 90])) for _ in shape)
    offset = data.draw(st.integers(0, 100))
    numbers = BYTES.view("<u2")[offset:]
    want = as_strided(numbers, shape, [2 * stride for stride in strides])
    found = LazyTensor(path, 2 * offset, "BF16", shape, strides)
    first = data.draw(st.integers(0, shape[0])) if shape else 0
    count = data.draw(st.integers(0, shape[0] - first)) if shape else None
    for rows, part in (
        ((), want),
        ((first, count), want[first : first + count] if shape else want),
    ):
        read = found.read(*rows)
        assert read.flags.c_contiguous
        assert read.shape == part.shape
        assert np.array_equal(read, part)


def test_reading_takes_the_memory_of_what_was_asked_for(tmp_path: Path) -> None:
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 28)
    rows = {
        "plain": LazyTensor(tmp_path / "sparse", 0, "F32", (8192, 8192)),
        "transposed": LazyTensor(tmp_path / "sparse", 0, "F32", (8192, 8192), (1, 8192)),
    }
    for label, most in (("plain", 0), ("transposed", tensors.PIECE)):
        tracemalloc.start()
        read = rows[label].read(100, 16)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read.shape == (16, 8192)
        assert read.nbytes <= peak <= read.nbytes + most + 100_000


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"1234567")
    with pytest.raises(UserError, match="x ends too early: 1 bytes are missing"):
        LazyTensor(tmp_path / "x", 0, "F32", (2,)).read()
    with pytest.raises(IndexError):
        LazyTensor(tmp_path / "x", 0, "U8", (2,)).read(1, 2)


def test_the_model_is_found_and_the_rest_told_apart(tmp_path: Path) -> None:
    model = {"w": tensor(), "inner": {"list": [tensor(), tensor()], "n": 3}, "version": 2}
    path = write(
        tmp_path / "x.pt",
        {
            "epoch": 7,
            "model": {"state_dict": model, "args": {"d": 1}},
            "optimizer": {"state": {0: {"exp_avg": tensor()}}, "lr": 0.1},
            "raw": name("_codecs", "encode") + opcodes(("\xff", "latin1")) + b"R",
        },
    )
    found = open_files([path])
    assert list(found.tensors) == ["w", "inner.list.0", "inner.list.1"]
    assert found.values == {"epoch": 7, "model.args": {"d": 1}, "inner.n": 3, "version": 2}
    assert found.left_out == ("optimizer", "raw")
    flat = write(tmp_path / "y.pt", {"model.w": tensor(), "step": 1})
    assert list(open_files([flat]).tensors) == ["model.w"]
    assert open_files([flat]).values == {"step": 1}
    assert list(open_files([write(tmp_path / "z.pt", [tensor(), tensor()])]).tensors) == ["0", "1"]


def test_the_only_dictionary_of_tensors_is_the_model_under_whatever_name(tmp_path: Path) -> None:
    state = {0: {"exp_avg": tensor()}}
    net = {"w": tensor(), "inner": [tensor()]}
    path = write(tmp_path / "x.pt", {"net": net, "epoch": 3, "optimizer": {"state": state}})
    found = open_files([path])
    assert list(found.tensors) == ["w", "inner.0"]
    assert found.values == {"epoch": 3}
    assert found.left_out == ("optimizer",)
    for number, other in enumerate(({"ema": {"w": tensor()}}, {"w": tensor()})):
        path = write(tmp_path / f"{number}.pt", {"net": net} | other)
        assert "net.w" in open_files([path]).tensors


def test_parameters_attributes_and_metadata_are_seen_through(tmp_path: Path) -> None:
    hooks = name("collections", "OrderedDict") + b")R"
    parameter = name("torch._utils", "_rebuild_parameter") + opcodes((tensor(), True, hooks)) + b"R"
    state = {"sharded": True}
    with_state = (
        name("torch._utils", "_rebuild_parameter_with_state")
        + opcodes((tensor(), True, hooks, state))
        + b"R"
    )
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    arguments = (storage(), 3, (3,), (1,), False, hooks)
    subclass = (
        name("torch._tensor", "_rebuild_from_type_v2")
        + opcodes((rebuild, name("torch", "Tensor"), arguments, state))
        + b"R"
    )
    table = (
        name("collections", "OrderedDict")
        + b")R("
        + opcodes("p") + parameter + opcodes("q") + with_state + opcodes("t") + subclass
        + b"u" + opcodes({"_metadata": {"version": 1}}) + b"b"
    )  # fmt: skip
    found = open_files([write(tmp_path / "x.pt", {"state_dict": table})])
    assert {label: t.shape for label, t in found.tensors.items()} == {
        "p": (2, 3), "q": (2, 3), "t": (3,)
    }  # fmt: skip
    assert found.tensors["t"].read().tobytes() == bytes(range(12, 24))
    assert (found.values, found.left_out) == ({}, ())


def test_other_protocols_and_numbers_of_numpy_are_read(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        values = {
            "n": np.float64(2.5), "i": np.int32(-3), "b": np.bool_(True), "x": "é" * 300,
            "o": OrderedDict(a=[1, (2, 3, 4)]), "big": -(2**40), "y": 70000, "none": None, "e": (),
        }  # fmt: skip
        path = write(tmp_path / "x.pt", pickle.dumps(values, protocol), {})
        found = open_files([path])
        assert found.values == values
        assert [type(found.values[k]) for k in "nib"] == [float, int, bool]


def test_shards_join_and_a_tensor_in_two_of_them_is_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "1.bin", {"a": tensor(), "step": 1})
    second = write(tmp_path / "2.bin", {"b": tensor((6,), (1,)), "step": 2, "more": 3})
    found = open_files([first, second])
    assert [(label, t.path, t.shape) for label, t in found.tensors.items()] == [
        ("a", first, (2, 3)), ("b", second, (6,))
    ]  # fmt: skip
    assert found.values == {"step": 1, "more": 3}
    with pytest.raises(UserError, match=r"a tensor occurs twice: 'a' in .*1.bin and .*1.bin"):
        open_files([first, second, first])


def test_a_checkpoint_without_checksums_and_one_of_an_older_pytorch(tmp_path: Path) -> None:
    """set_crc32_options(False) writes 0; the sizes follow the data; byteorder came in 2.1."""
    zeros: dict[str, int | bytes] = dict(crc=0, flags=8)
    made = parts({"w": tensor()})
    for part in made:
        part.central, part.local = dict(zeros), zeros | dict(size=0, packed=0)
    (tmp_path / "x.pt").write_bytes(archive([made[0], *made[2:]]))
    assert open_files([tmp_path / "x.pt"]).tensors["w"].read().tobytes() == bytes(range(24))


def test_large_archives_zip64_fields_are_read(tmp_path: Path) -> None:
    """As PyTorch writes them from 4 GiB on: here the offset alone is moved to the zip64 field."""
    made = parts({"w": tensor()})
    plain = archive(made)
    at = plain.index(b"PK\x03\x04", plain.index(b"a/byteorder"))
    size, most = 24, 0xFFFFFFFF
    field = b"".join(n.to_bytes(8, "little") for n in (size, size, at))
    made[2].central = dict(
        packed=most, size=most, header=most, extra=b"ZZ\0\0" + b"\1\0\x18\0" + field
    )
    (tmp_path / "x.pt").write_bytes(archive(made))
    assert open_files([tmp_path / "x.pt"]).tensors["w"].read().tobytes() == bytes(range(24))


def test_safetensors_give_the_same_bits(tmp_path: Path) -> None:
    arrays = {
        "b": mx.random.normal((3, 5)).astype(mx.bfloat16),
        "a": mx.arange(7),
        "s": mx.array(2),
    }
    save_safetensors(tmp_path / "x.safetensors", arrays, {"note": "kept"})
    save_safetensors(tmp_path / "y.safetensors", {"c": mx.zeros((2, 0))})
    found = open_safetensors([tmp_path / "x.safetensors", tmp_path / "y.safetensors"])
    assert set(found.tensors) == {"a", "b", "c", "s"}
    assert found.values["note"] == "kept"
    for label, array in arrays.items():
        read = read_bits(found.tensors[label].read(), found.tensors[label].dtype)
        assert read.dtype == array.dtype
        assert mx.array_equal(read, array)
    assert found.tensors["b"].read(1, 1).tobytes() == bits_of(arrays["b"])[1:2].tobytes()


@pytest.mark.parametrize("dtype", MLX_TYPES)
def test_bits_pass_through_mlx_unchanged(dtype: str) -> None:
    bits = BYTES.view(tensors.BITS[tensors.ITEM_SIZES[dtype]]).reshape(16, -1)
    bits = bits % 2 if dtype == "BOOL" else bits
    array = read_bits(bits, dtype)
    assert array.dtype == MLX_TYPES[dtype]
    assert array.shape == bits.shape
    assert np.array_equal(bits_of(array), bits)
    assert np.array_equal(bits_of(array.T), bits.T)
    assert bits_of(array[0, 0]).shape == ()


def test_a_type_mlx_lacks_is_refused() -> None:
    refused("MLX has no such type: F64", lambda: read_bits(np.zeros(1, np.uint64), "F64"))


def test_rows_that_are_computed_are_cut_and_turned_as_those_of_a_file(tmp_path):
    numbers = np.arange(24, dtype="<u4").reshape(6, 4)
    numbers.tofile(tmp_path / "x")
    plain = LazyTensor(tmp_path / "x", 0, "F32", (6, 4))
    computed = ComputedTensor(tmp_path / "x", 0, "F32", (6, 4), compute=plain.read)
    for ours in (plain, computed):
        assert np.array_equal(ours.rows(1, 4).rows(1, 2).read(1), numbers[3:4])
        assert np.array_equal(ours.T.rows(1, 3).read(1, 2), numbers.T[2:4])
        with pytest.raises(IndexError):
            ours.rows(1, 4).read(3, 2)
