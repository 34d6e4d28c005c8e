"""The header of GGUF files: what llama.cpp's own package writes, and what strangers may."""

import contextlib
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.gguf import header
from convert.gguf.header import TYPES, is_gguf, read_gguf, read_header
from mlx_hmem.errors import UserError
from tests.helpers.gguf_files import gguf, save, tensor, text, value
from tests.helpers.programs import refused

VALUES = {"general.architecture": "llama", "llama.block_count": 2, "a": [1.5, 2.0], "b": True,
          "tokens": ["", "é", "<s>"]}  # fmt: skip
TENSORS = [tensor("t", (2, 32), 0, 0), tensor("u", (64,), 8, 256)]
DATA = bytes(256 + 68)
SOUND = gguf(VALUES, TENSORS, DATA)


def nested(depth: int) -> bytes:
    return struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * depth + struct.pack("<IQI", 4, 1, 7)


def array(kind: int, count: int) -> bytes:
    return struct.pack("<IIQ", 9, kind, count)


FAULTS = {
    "an empty file": (b"", "not a GGUF file"),
    "another magic": (gguf(magic=b"GGML"), "not a GGUF file"),
    "the magic alone": (b"GGUF", "it ends at byte 4"),
    "version 1": (gguf(version=1), "version 1; versions 2 and 3"),
    "big-endian": (gguf(version=3 << 24), "a big-endian file"),
    "more values than are there": (gguf(VALUES, counts=(0, 1 << 40)), "it ends at byte"),
    "more tensors than are there": (gguf(counts=(2, 0)), "it ends at byte"),
    "tensors without end": (gguf(counts=(1 << 60, 0)), "65536 are the most"),
    "a text beyond the file": (gguf([(b"a" * 8, value("x")[:4] + text("x", 1 << 30))]), "it ends"),
    "a text of 2^63": (gguf([("a", value("x")[:4] + text("x", 1 << 63))]), "it ends at byte"),
    "a text that is no text": (gguf([(b"\xff\xfe", 1)]), "is not UTF-8"),
    "a key twice": (gguf([("a", 1), ("b", 2), ("a", 1)]), "the key 'a' occurs twice"),
    "a type of 13": (gguf([("a", struct.pack("<IQ", 13, 0))]), "a type that is not known: 13"),
    "arrays of arrays": (gguf([("a", nested(1))]), "a type that is not known: 9"),
    "arrays without bottom": (gguf([("a", nested(100_000))]), "a type that is not known: 9"),
    "texts without end": (gguf([("a", array(8, 1 << 62))]), "counts 4611686018427387904 texts"),
    "numbers without end": (gguf([("a", array(4, 1 << 62))]), "it ends at byte"),
    "a truth of 2": (gguf([("a", struct.pack("<IB", 7, 2))]), "neither true nor false: 2"),
    "an alignment of 0": (gguf({"general.alignment": 0}), "no power of two: 0"),
    "an alignment of 24": (gguf({"general.alignment": 24}), "no power of two: 24"),
    "an alignment of text": (gguf({"general.alignment": "32"}), "no power of two: 32"),
    "a tensor twice": (gguf({}, [TENSORS[0], TENSORS[0]], DATA), "the tensor 't' occurs twice"),
    "five dimensions": (gguf({}, [tensor("t", (1,) * 5)], DATA), "has 5 dimensions"),
    "dimensions without end": (
        gguf({}, [text("t") + struct.pack("<I", 1 << 31)], DATA),
        "has 2147483648 dimensions",
    ),
    "a shape beyond MLX's": (gguf({}, [tensor("t", (1 << 40,))], DATA), "a wrong shape"),
    "a product beyond 64 bits": (
        gguf({}, [tensor("t", (2**31 - 1,) * 4)], DATA),
        "a wrong shape",
    ),
    "a type of 99": (gguf({}, [tensor("t", (2, 32), 99)], DATA), "a type that is not known: 99"),
    "half a block": (gguf({}, [tensor("t", (2, 33), 8)], DATA), "no whole blocks of Q8_0"),
    "an offset between": (gguf({}, [tensor("t", (4,), 0, 16)], DATA), "at a multiple of 32"),
    "an offset beyond": (gguf({}, [tensor("t", (4,), 0, 1 << 40)], DATA), "outside the file"),
    "an offset of 2^64 - 32": (gguf({}, [tensor("t", (4,), 0, 2**64 - 32)], DATA), "outside"),
    "a tensor longer than the file": (gguf({}, [tensor("t", (2, 128))], DATA), "outside the file"),
    "an overlap": (
        gguf({}, [tensor("t", (32,), 0, 0), tensor("u", (32,), 0, 96)], DATA),
        "the tensor 'u' overlaps another",
    ),
    "one place for two": (
        gguf({}, [tensor("t", (8,), 0, 0), tensor("u", (8,), 0, 0)], DATA),
        "overlaps another",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_header_is_one_line(tmp_path, fault):
    data, words = FAULTS[fault]
    (tmp_path / "m.gguf").write_bytes(data)
    tracemalloc.start()
    refused(words, read_gguf, tmp_path / "m.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_limits_are_those_of_the_whole_header(tmp_path, monkeypatch):
    monkeypatch.setattr(header, "MAX_TEXTS", 8)
    file = save(tmp_path / "m.gguf", {"a": ["x"] * 4, "b": ["x"] * 4})
    refused("more than 8 texts", read_header, file)
    monkeypatch.setattr(header, "MAX_HEADER", 100)
    monkeypatch.setattr(header, "PIECE", 50)
    refused("longer than 100 bytes", read_header, save(file, {"a": [1] * 100}))


def test_a_sound_header_is_read_and_its_strangers_are_not(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(SOUND)
    found = read_gguf(file)
    assert found.values.pop("a").tolist() == VALUES["a"]
    assert found.values == {key: each for key, each in VALUES.items() if key != "a"}
    base = len(SOUND) - len(DATA)
    assert [each[1:] for each in found.tensors.values()] == [
        (TYPES[0], (2, 32), base, 256),
        (TYPES[8], (64,), base + 256, 68),
    ]
    assert is_gguf(file)
    assert not is_gguf(tmp_path)
    assert not is_gguf(Path(__file__))
    refused("a file is missing", read_gguf, tmp_path / "none.gguf")
    refused("not a file", read_gguf, tmp_path)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, len(SOUND)),
    st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4),
)
def test_damage_is_refused_or_leads_to_places_within_the_file(length, changes):
    data = bytearray(SOUND)
    for at, byte in changes:
        data[at] = byte
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data[:length])
        file.flush()
        with contextlib.suppress(UserError):
            for each in read_gguf(Path(file.name)).tensors.values():
                assert 0 <= each.start <= each.start + each.nbytes <= length


def test_llama_cpps_own_package_agrees(tmp_path):
    package = pytest.importorskip("gguf", reason="pip install gguf")
    sizes = {int(n): (n.name, *size) for n, size in package.GGML_QUANT_SIZES.items()}
    assert sizes == {number: tuple(kind) for number, kind in TYPES.items()}
    writer = package.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "Ġb", "🙂"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_add_bos_token(True)
    writer.add_custom_alignment(64)
    rng = np.random.default_rng(0)
    arrays = {
        "x": rng.normal(size=(3, 5)),
        "y": rng.normal(size=7),
        "z": rng.normal(size=(2, 2, 4)),
    }
    for name, each in arrays.items():
        writer.add_tensor(name, each.astype("f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, theirs = read_gguf(tmp_path / "m.gguf"), package.GGUFReader(tmp_path / "m.gguf")
    for key, each in found.values.items():
        made = each.tolist() if isinstance(each, np.ndarray) else each
        assert made == theirs.fields[key].contents(), key
    data = (tmp_path / "m.gguf").read_bytes()
    for each in theirs.tensors:
        ours = found.tensors[each.name]
        assert ours.shape == arrays[each.name].shape
        assert data[ours.start : ours.start + ours.nbytes] == each.data.tobytes()


def shards(folder: Path, **options: object) -> list[Path]:
    files = []
    for i in range(3):
        values = {} if i else dict(VALUES)
        values |= {"split.no": i, "split.count": 3, "split.tensors.count": 3}
        name = f"m-{i + 1:05}-of-00003.gguf"
        files.append(save(folder / name, values, [tensor(f"t{i}", (4,))], bytes(16)))
    return files


def test_shards_are_one_file_whichever_is_named(tmp_path):
    files = shards(tmp_path)
    for file in files:
        found = read_gguf(file)
        assert list(found.tensors) == ["t0", "t1", "t2"]
        assert [each.path for each in found.tensors.values()] == files
        assert found.files == files
        assert found.values["general.architecture"] == "llama"
    first, second, third = files
    other = second.read_bytes()
    save(second, {"split.no": 2, "split.count": 3}, [tensor("t1", (4,))], bytes(16))
    refused("a shard of another set", read_gguf, first)
    save(second, {"split.no": 1, "split.count": 3}, [tensor("t0", (4,))], bytes(16))
    refused("two shards have one tensor: t0", read_gguf, first)
    save(second, {"split.no": 1, "split.count": 3})
    refused("do not hold all tensors: 2 of 3", read_gguf, first)
    second.write_bytes(other)
    third.unlink()
    refused("1 of 3 shards are missing: m-00003-of-00003.gguf", read_gguf, first)
    lone = first.rename(tmp_path / "m.gguf")
    refused("is one of 3 shards, and its name", read_gguf, lone)
