"""Archives and headers from strangers that say something untrue are refused with one line each."""

import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.torch_files import pickle_machine, zips
from convert.torch_files.pickles import open_files
from convert.torch_files.tensors import Checkpoint, open_safetensors
from mlx_hmem.errors import UserError
from tests.helpers.faults import any_input
from tests.helpers.programs import refused
from tests.helpers.torch_files import Part, archive, parts, pickled, refusal, tensor, write


def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = archive(parts({"w": tensor()}))
    path = tmp_path / "x.pt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "x.pt is not a" in refusal(path)
    path.write_bytes(whole + b"\0")
    assert "cut off or added to" in refusal(path)


def test_a_tensor_that_does_not_match_its_checksum_is_refused(tmp_path: Path) -> None:
    """Its bytes are read later: a flipped bit was other weights, without a word."""
    path = tmp_path / "x.pt"
    path.write_bytes(archive(parts({"w": tensor()})))
    with path.open("r+b") as file:
        entries = zips.read_directory(file, path.stat().st_size)
        place = next(entry for name, entry in entries.items() if "/data/" in name)
        assert place.crc
        file.seek(place.start + place.size - 1)
        file.write(b"\x55")
    assert "does not match its checksum" in refusal(path)


LARGE = 0xFFFFFFFF


def damaged() -> dict[str, bytes]:
    """Archives that say something untrue."""
    good = {"w": tensor()}
    made: dict[str, bytes] = {}

    def add(
        what: str, index: int = 2, local: dict | None = None, central: dict | None = None,
        **end: int,
    ) -> None:  # fmt: skip
        entries = parts(good)
        entries[index].local, entries[index].central = local or {}, central or {}
        made[what] = archive(entries, end)

    deflated = dict(method=8, size=2**30)
    add("compressed", local=deflated, central=deflated)
    add("compressed, says the directory alone", central=deflated)
    add("compressed, says the entry alone", local=dict(method=8))
    add("a compressed pickle", 0, dict(method=8), dict(method=8))
    add("an unknown method", local=dict(method=99), central=dict(method=99))
    add("encrypted", local=dict(flags=1), central=dict(flags=1))
    add("flags that differ", local=dict(flags=8))
    add("a size quoted huge", central=dict(size=2**31, packed=2**31))
    add("a size quoted huge in both", 2, dict(size=2**31, packed=2**31),
        dict(size=2**31, packed=2**31))  # fmt: skip
    add("packed smaller than it is", central=dict(packed=1))
    add("a name that differs", local=dict(name=b"a/data/1"))
    add("a longer name", local=dict(name=b"a/data/0" * 50))
    add("a checksum that differs", local=dict(crc=1))
    add("a pickle with another checksum", 0, dict(crc=1), dict(crc=1))
    add("a byte order with another checksum", 1, dict(crc=1), dict(crc=1))
    add("a header outside", central=dict(header=2**31))
    add("a header in the directory", central=dict(header=archive(parts(good)).index(b"PK\x01")))
    add("a header that is none", central=dict(header=5))
    add("another disk", central=dict(disk=1))
    add("zip64 sizes that are missing", central=dict(size=LARGE, packed=LARGE))
    add("zip64 sizes cut short", central=dict(size=LARGE, extra=b"\1\0\x08\0abc"))
    add("zip64 sizes without bound",
        central=dict(size=LARGE, packed=LARGE, extra=b"\1\0\x10\0" + b"\xff" * 16))  # fmt: skip
    add("a zip64 offset without bound",
        central=dict(header=LARGE, extra=b"\1\0\x08\0" + b"\xff" * 8))  # fmt: skip
    add("zip64 sizes before the data alone", local=dict(size=LARGE, packed=LARGE))
    add("an extra field beyond the directory", 3, central=dict(extra=b"x" * 60000), length=300)
    add("names that are not UTF-8", 3, dict(name=b"a/\xff"), dict(name=b"a/\xff"))
    add("more entries than there are", count=9, here=9)
    add("fewer entries than there are", count=3, here=3)
    add("65535 entries", count=0xFFFF, here=0xFFFF)
    add("entries in other files", here=1)
    add("another disk at the end", disk=1)
    add("a directory elsewhere", start=3)
    add("a directory beyond the end", start=2**31)
    add("a directory of 4 GB", length=LARGE)
    entries = parts(good)
    made["two entries of one name"] = archive([*entries, entries[2]])
    # One entry inside another, as in the bombs of overlapping files.
    inner = Part("a/data/1", bytes(4))
    outer = Part("a/data/0", archive([inner])[:42])
    before = archive([entries[0], entries[1], outer])
    inside = Part("a/data/1", b"", central=dict(size=4, packed=4, crc=zlib.crc32(bytes(4))))
    inside.central["header"] = before.index(outer.data)
    made["overlapping entries"] = archive([entries[0], entries[1], outer, inside])
    size: dict[str, int | bytes] = dict(size=24, packed=24, crc=0)
    quoted = archive([*entries, Part("a/data/1", b"", size, size)])
    made["an entry over the directory"] = quoted
    nested = Part("a/data/9", archive(entries))
    made["an archive in the archive"] = archive([nested])
    made["no pickle"] = archive(entries[1:])
    made["a pickle too deep"] = archive([Part("a/b/data.pkl", entries[0].data), *entries[1:]])
    made["two pickles"] = archive([*entries, Part("b/data.pkl", entries[0].data)])
    made["big-endian"] = archive([entries[0], Part("a/byteorder", b"big"), *entries[2:]])
    made["an endless byte order"] = archive([entries[0], Part("a/byteorder", b"x" * 99)])
    made["bytes before it"] = b"PK\x03\x04" + archive(entries)
    made["nothing in it"] = archive([])
    return made


@pytest.mark.parametrize("what", damaged())
def test_an_archive_that_says_something_untrue_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(damaged()[what])
    assert "x.pt is not a whole checkpoint" in refusal(tmp_path / "x.pt")


def with_zip64(change: dict[int, int], locator: bytes = b"") -> bytes:
    """A checkpoint with a zip64 record at its end, some of whose ten numbers are changed."""
    plain = archive(parts({"w": tensor()}))
    end = plain[-22:]
    count, length, start = struct.unpack("<HII", end[10:20])
    numbers = [44, 45, 45, 0, 0, count, count, length, start]
    for index, number in change.items():
        numbers[index] = number
    record = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", *numbers)
    locator = locator or b"PK\x06\x07" + struct.pack("<IQI", 0, len(plain) - 22, 1)
    return plain[:-22] + record + locator + end


def test_zip64_records_are_read_and_extremes_of_them_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(with_zip64({}))
    assert open_files([path]).tensors["w"].read().tobytes() == bytes(range(24))
    most = 2**64 - 1
    changes: list[dict[int, int]] = [{index: most} for index in (0, 5, 6, 7, 8)]
    changes += [{3: 1}, {4: 1}, {0: 45}, {5: 0, 6: 0}, {7: 0}, {8: 0}, {7: most, 8: 1}]
    for change in changes:
        path.write_bytes(with_zip64(change))
        assert "not a whole checkpoint" in refusal(path)
    for locator in (struct.pack("<IQI", 0, most, 1), struct.pack("<IQI", 0, 0, 1)):
        path.write_bytes(with_zip64({}, b"PK\x06\x07" + locator))
        assert "its zip64 locator points elsewhere" in refusal(path)


def test_a_directory_of_too_many_entries_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zips, "MAX_ENTRIES", 3)
    assert "4 entries in a directory" in refusal(write(tmp_path / "x.pt", {"w": tensor()}))


def test_programs_old_formats_and_other_files_are_refused(tmp_path: Path) -> None:
    good = parts({"w": tensor()})
    tar = b"storages".ljust(257, b"\0") + b"ustar\0"
    legacy = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    code = dict(method=8, size=1000)
    for data, says in (
        (archive([*good, Part("a/constants.pkl", b"\x80\x02).")]), "a TorchScript archive"),
        (archive([*good, Part("a/code/x.py", b"ab", code, code)]), "a TorchScript archive"),
        (legacy, "its pickle ends too early"),
        (pickled({"w": 1}), "is no checkpoint of torch.save, or one of PyTorch before 0.1.10"),
        (tar, "a bare pickle or a tar archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (b"<html>", "is not a PyTorch checkpoint: it begins b'<html>'"),
        (b"", "is not a PyTorch checkpoint"),
    ):
        (tmp_path / "x.pt").write_bytes(data)
        assert says in refusal(tmp_path / "x.pt")
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path)
    assert "a file is missing" in refusal(tmp_path / "none.pt")


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x01", b"\xff" * 8, (2**63).to_bytes(8, "little") + b"{}",
        (99_000_000).to_bytes(8, "little") + b"{}",
        *(len(text).to_bytes(8, "little") + text for text in (
            b'{"a":' + b'{"a":' * 50_000, b"[" * 100_000, b'{"a":{"dtype":"F32","shape":[1]}}',
            b'{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,0]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b'{"__metadata__":{"a":1}}', b'{"a":' + b"9" * 100_000 + b"}",
        )),
    ],
)  # fmt: skip
def test_a_header_bomb_in_a_safetensors_file_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(data)
    tracemalloc.start()
    refused("safetensors", open_safetensors, [tmp_path / "x.safetensors"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50 * len(data) + 10_000_000


def outline(found: Checkpoint) -> dict[str, tuple]:
    return {label: (t.dtype, t.shape, t.strides) for label, t in found.tensors.items()}


WHOLE = archive(
    parts(
        {
            "epoch": 3,
            "state_dict": {"w": tensor(), "t": tensor((3, 2), (1, 3)), "e": tensor((4,), (0,), 2)},
            "optimizer": {"state": [tensor()], "lr": 0.1},
        }
    )
)


@any_input(300)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_a_flipped_byte_is_refused_or_changes_no_name_and_no_shape(changes, tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(WHOLE)
    want = outline(open_files([path]))
    data = bytearray(WHOLE)
    for at, flip in changes:
        data[at] ^= flip
    path.write_bytes(data)
    try:
        found = open_files([path])
    except UserError:
        return
    assert outline(found) == want
    for found_tensor in found.tensors.values():
        assert found_tensor.read().nbytes == found_tensor.nbytes


@any_input(400)
@given(
    start=st.integers(0, 300),
    put=st.binary(min_size=1, max_size=12),
    shuffled=st.lists(st.sampled_from(sorted(pickle_machine.STEPS)), max_size=8),
)
def test_a_changed_pickle_gives_tensors_inside_the_file_or_one_line(start, put, shuffled, tmp_path):
    """The checksum of the changed pickle is right, as an attacker makes it."""
    data = bytearray(parts({"w": tensor(), "n": [1, 2.0, {"a": "b"}]})[0].data)
    data[start : start + len(put)] = put
    data[start // 2 : start // 2] = b"".join(shuffled)
    path = write(tmp_path / "x.pt", bytes(data))
    try:
        found = open_files([path])
    except UserError:
        return
    for found_tensor in found.tensors.values():
        assert found_tensor.read().nbytes == found_tensor.nbytes <= 24 * 16
