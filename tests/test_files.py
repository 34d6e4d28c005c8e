"""Strict safetensors headers, atomic writes and fingerprints."""

import json
import os
import stat
import struct
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_hmem import files
from mlx_hmem.errors import UserError
from tests.helpers.faults import any_input, kill_half_way
from tests.helpers.programs import refused


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: object = (2,), start: object = 0, end: object = 8, dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = raw({"a": tensor()}, bytes(8))
HOSTILE = {
    "empty file": b"",
    "seven bytes": GOOD[:7],
    "length beyond the file": raw({"a": tensor()}, bytes(8), length=10_000),
    "length of 2**64 - 1": raw({"a": tensor()}, bytes(8), length=2**64 - 1),
    "length over the limit": raw({"a": tensor()}, bytes(8), length=100_000_001),
    "length 0": raw(b"", bytes(8)),
    "not JSON": raw(b"{nonsense}"),
    "not UTF-8": raw(b'{"\xff\xfe": 1}'),
    "a list": raw(b"[]"),
    "space before the brace": raw(b" {}"),
    "nested without end": raw(b'{"a":' * 100_000),
    "a number of 5,000 digits": raw(b'{"a": ' + b"9" * 5000 + b"}"),
    "a name twice": raw(b'{"a": %b, "a": %b}' % ((json.dumps(tensor()).encode(),) * 2), bytes(8)),
    "a key twice": raw(
        b'{"a":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}', bytes(8)
    ),
    "a lone surrogate": raw(b'{"\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
    "NaN": raw(b'{"a": {"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', bytes(8)),
    "metadata of numbers": raw({"__metadata__": {"a": 1}}),
    "metadata a list": raw({"__metadata__": []}),
    "tensor a number": raw({"a": 1}),
    "tensor without offsets": raw({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "tensor with more keys": raw({"a": {**tensor(), "b": 1}}, bytes(8)),
    "unknown dtype": raw({"a": tensor(dtype="F33")}, bytes(8)),
    "dtype MLX lacks": raw({"a": tensor((1,), dtype="F64")}, bytes(8)),
    "dtype a list": raw({"a": tensor(dtype=["F32"])}, bytes(8)),
    "negative dimensions": raw({"a": tensor((-1, -2))}, bytes(8)),
    "dimension a float": raw({"a": tensor((2.0,))}, bytes(8)),
    "dimension true": raw({"a": tensor((2, True))}, bytes(8)),
    "dimension of 32 bits": raw({"a": tensor((2**31, 0), 0, 0)}),
    "product wraps to 8 bytes": raw({"a": tensor((2**31 - 1,) * 3 + (2,))}, bytes(8)),
    "product too large beside 0": raw({"a": tensor((2**31 - 1,) * 4 + (0,), 0, 0)}),
    "rank of 1,000": raw({"a": tensor((1,) * 1000, 0, 4)}, bytes(4)),
    "shape a text": raw({"a": tensor("22")}, bytes(8)),
    "shape and bytes disagree": raw({"a": tensor((3,))}, bytes(8)),
    "end before start": raw({"a": tensor((2,), 8, 0)}, bytes(8)),
    "start negative": raw({"a": tensor((2,), -8, 0)}, bytes(8)),
    "end out of the file": raw({"a": tensor((2,), 4, 12)}, bytes(8)),
    "offset a float": raw({"a": tensor((2,), 0, 8.0)}, bytes(8)),
    "three offsets": raw({"a": {**tensor(), "data_offsets": [0, 8, 8]}}, bytes(8)),
    "overlap": raw({"a": tensor(), "b": tensor((2,), 4, 12)}, bytes(12)),
    "the same bytes twice": raw({"a": tensor(), "b": tensor()}, bytes(8)),
    "hole": raw({"a": tensor(), "b": tensor((2,), 12, 20)}, bytes(20)),
    "hole at the start": raw({"a": tensor((2,), 4, 12)}, bytes(12)),
    "trailing data": raw({"a": tensor()}, bytes(9)),
    "data without a tensor": raw({}, bytes(1)),
    "cut off by a byte": GOOD[:-1],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file_is_one_line_with_a_remedy(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[name])
    for read in (files.read_safetensors_header, files.load_safetensors):
        text = refused("x.safetensors.*make the file again", read, path)
        assert len(text) < 500


def test_a_header_over_the_limit_and_what_is_no_file_are_not_read(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    os.truncate(path, 200_000_000)
    refused("header of 100000001 bytes", files.read_safetensors_header, path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none", "a\0b", "/dev/zero"):
        refused("", files.read_safetensors_header, path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
SIZES = st.integers(-1, 9) | st.sampled_from([2**31, 2**32 + 1, 2**63, 2**64 - 1])
LIKELY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F64"]) | JSON,
        "shape": st.lists(SIZES, max_size=3) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    }
)


def read_or_refuse(path: Path) -> None:
    """What the header promises, MLX loads; anything else is a UserError."""
    try:
        tensors, _ = files.read_safetensors_header(path)
    except UserError:
        return
    arrays = files.load_safetensors(path)
    mx.eval(arrays)
    assert {name: a.shape for name, a in arrays.items()} == {
        name: info.shape for name, info in tensors.items()
    }


@any_input(300)
@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), LIKELY | JSON) | JSON,
    data=st.integers(0, 16),
)
def test_any_header_is_read_or_refused(tmp_path: Path, header: object, data: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(json.dumps(header).encode(), bytes(data)))
    read_or_refuse(path)


@any_input(300)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_any_changed_byte_and_any_cut_is_read_or_refused(tmp_path, at, value, cut):
    path = tmp_path / "x.safetensors"
    changed = bytearray(GOOD)
    changed[at] = value
    path.write_bytes(changed[:cut])
    read_or_refuse(path)


def test_arrays_come_back_and_metadata_too(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    arrays = {
        "a": mx.arange(6).reshape(2, 3),
        "half": mx.array([1.5, -2], dtype=mx.bfloat16),
        "none": mx.zeros((0, 3)),
        "scalar": mx.array(True),
    }
    files.save_safetensors(path, arrays, {"k": "v"})
    assert files.read_safetensors_header(path)[1] == {"k": "v"}
    back = files.load_safetensors(path)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert mx.array_equal(back[name], array)
    assert [p.name for p in path.parent.iterdir()] == ["x.safetensors"]


def test_header_offsets_are_those_of_the_bytes_and_a_file_may_be_saved_over_itself(tmp_path: Path):
    values = np.arange(5, dtype=np.float32)
    files.save_safetensors(tmp_path / "x.safetensors", {"b": mx.array(values), "a": mx.zeros((3,))})
    tensors, _ = files.read_safetensors_header(tmp_path / "x.safetensors")
    info = tensors["b"]
    data = (tmp_path / "x.safetensors").read_bytes()[info.start : info.end]
    assert np.array_equal(np.frombuffer(data, np.float32), values)
    path = tmp_path / "x.safetensors"
    files.save_safetensors(path, {"a": mx.arange(1000)})
    files.save_safetensors(path, {"a": files.load_safetensors(path)["a"] + 1})
    assert files.load_safetensors(path)["a"].tolist() == list(range(1, 1001))


def test_failed_write_leaves_the_old_file_and_no_part(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    files.save_safetensors(path, {"a": mx.array([1.0])})
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        files.save_safetensors(path, {"a": mx.array([2.0])}, {"k": 1})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


KILLED = """
import sys
from mlx_hmem.files import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write(b"new" * 100000)
    file.flush()
    print("half", flush=True)
    sys.stdin.read()
"""


def test_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_atomic(path, "old")
    kill_half_way(KILLED, path)
    assert path.read_text() == "old"
    files.write_atomic(path, b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"new")]


def test_a_file_keeps_its_permissions_and_a_private_one_is_its_owners(tmp_path: Path) -> None:
    """Written over, what its owner had made private was everyone's."""
    path, new = tmp_path / "x", tmp_path / "new"
    for mode in (0o600, 0o444, 0o664):
        files.write_atomic(path, "old")
        path.chmod(mode)
        files.write_atomic(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode
    with files.atomic_file(new, private=True) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600
    assert stat.S_IMODE(new.stat().st_mode) == 0o600


def test_a_link_in_the_place_of_the_part_is_not_followed(tmp_path: Path) -> None:
    """Who may write into the folder had us write over any file of ours."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / ".x.part").symlink_to(mine)
    with pytest.raises(OSError, match="symbolic links"):
        files.write_atomic(tmp_path / "x", "new")
    assert mine.read_text() == "mine"


def test_fingerprint_follows_contents_not_place(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        files.write_atomic(folder / "a", b"one")
        files.write_atomic(folder / "b", b"two")
    first = files.fingerprint(here / "a", here / "b")
    assert first == files.fingerprint(there / "b", there / "a")
    assert first.startswith("xxh3:")
    assert len(first) == len("xxh3:") + 32
    files.write_atomic(there / "b", b"tw0")
    assert first != files.fingerprint(there / "a", there / "b")
    # The cut between the files counts: "on" + "etwo" is not "one" + "two".
    files.write_atomic(there / "a", b"on")
    files.write_atomic(there / "b", b"etwo")
    assert first != files.fingerprint(there / "a", there / "b")


def test_fingerprint_of_a_large_file_sees_each_layer(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    layers = {f"layer.{i}": mx.full((1024, 256), i, dtype=mx.float32) for i in range(24)}
    files.save_safetensors(path, layers)
    assert path.stat().st_size > 16 << 20
    before = files.fingerprint(path)
    tensors, _ = files.read_safetensors_header(path)
    for name in ("layer.0", "layer.11", "layer.23"):
        data = bytearray(path.read_bytes())
        data[tensors[name].start : tensors[name].end] = bytes([1]) * (1 << 20)
        files.write_atomic(tmp_path / "other.safetensors", bytes(data))
        assert files.fingerprint(tmp_path / "other.safetensors") != before


def test_part_of_a_running_write_is_not_the_file(tmp_path: Path) -> None:
    from mlx_hmem.files import atomic_file

    with atomic_file(tmp_path / "model.safetensors") as file:
        file.write(b"x")
        assert not (tmp_path / "model.safetensors").exists()
        assert not list(tmp_path.glob("*.safetensors"))
    assert (tmp_path / "model.safetensors").read_bytes() == b"x"


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    """Both wrote into the same file beside it: a mixture of the two was renamed, with status 0."""
    path = tmp_path / "file"
    with files.atomic_file(path) as file:
        file.write(b"first")
        refused("another program is writing this file", files.write_atomic, path, b"second writer")
    assert path.read_bytes() == b"first"
    files.write_atomic(path, b"second")
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_bytes() == b"second"


def test_a_file_is_linked_where_there_are_links_and_else_copied_whole(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.write_bytes(b"abc" * 1000)
    files.link_or_copy(source, tmp_path / "a" / "linked")
    assert (tmp_path / "a" / "linked").samefile(source)

    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    files.link_or_copy(source, tmp_path / "b" / "copied")
    assert (tmp_path / "b" / "copied").read_bytes() == source.read_bytes()
    assert not (tmp_path / "b" / "copied").samefile(source)
    (tmp_path / "pointer").symlink_to(source)
    files.link_or_copy(tmp_path / "pointer", tmp_path / "c")
    assert not (tmp_path / "c").is_symlink()


def test_on_macos_bytes_are_put_on_the_disk_itself_before_the_name_is_there(tmp_path, monkeypatch):
    """fsync leaves them in the disk's own cache there; a network file system may know no other."""
    said, known = list[str](), True

    def fcntl(handle: int, operation: int, *given: object) -> int:
        said.append("full" if (tmp_path / "a").exists() is False else "late")
        if not known:
            raise OSError(45, "not supported")
        return 0

    monkeypatch.setattr(files, "sys", SimpleNamespace(platform="darwin"))
    monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(files.fcntl, "fcntl", fcntl)
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    files.write_atomic(tmp_path / "a", "text")
    assert (said, len(synced)) == (["full"], 1)  # of the folder, for the name
    (tmp_path / "a").unlink()
    known = False
    files.write_atomic(tmp_path / "a", "text")
    assert (said, len(synced)) == (["full", "full"], 3)


def test_two_folders_change_places_at_once(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "is.txt").write_text(name)
    assert files.exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one" / "is.txt").read_text() == "two"
    assert (tmp_path / "two" / "is.txt").read_text() == "one"
    assert not files.exchange(tmp_path / "one", tmp_path / "none")
    monkeypatch.setattr("ctypes.CDLL", lambda *given, **options: object())  # a system without it
    assert not files.exchange(tmp_path / "one", tmp_path / "two")
