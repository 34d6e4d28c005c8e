"""Pickles from strangers: none runs code, fills the memory or is read beyond its end.

Each is refused with one line. That a pickle here is dangerous is shown first: Python's own pickle
runs it.
"""

import copyreg
import os
import pickle
import posix
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from convert.torch_files import names as torch_names
from convert.torch_files import pickle_machine, pickles
from convert.torch_files.pickles import open_files
from tests.helpers.torch_files import name, opcodes, refusal, storage, tensor, write


class Trap:
    """Runs a command when a pickle sets its state."""

    def __setstate__(self, state: str) -> None:
        os.system(state)

    def __new__(cls, *command: str, **named: str) -> "Trap":
        if command or named:
            os.system(*command, **named)
        return super().__new__(cls)


def running(command: str) -> dict[str, bytes]:
    """Pickles that run a command, one for each way a pickle has of doing it."""
    text, system = opcodes(command), name("posix", "system")
    trap = name(__name__, "Trap")
    line = command.encode() + b"\n"
    return {
        "REDUCE": b"\x80\x02" + system + text + b"\x85R.",
        "STACK_GLOBAL": b"\x80\x04" + opcodes("posix") + opcodes("system") + b"\x93"
        + text + b"\x85R.",
        "text of protocol 0": b"cposix\nsystem\n(S'" + command.encode() + b"'\ntR.",
        "INST": b"(S'" + command.encode() + b"'\niposix\nsystem\n.",
        "OBJ": b"(" + system + text + b"o.",
        "BUILD": b"\x80\x02" + trap + b")\x81" + text + b"b.",
        "NEWOBJ": b"\x80\x02" + trap + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04" + trap + b")" + opcodes({"command": command}) + b"\x92.",
        "EXT1": b"\x80\x02\x82\xf0" + text + b"\x85R.",
        "EXT2": b"\x80\x02\x83\xf0\x00" + text + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + text + b"\x85R.",
        "exec": b"\x80\x02" + name("builtins", "exec")
        + opcodes(f"import os; os.system({command!r})") + b"\x85R.",
        "getattr": b"\x80\x02" + name("builtins", "getattr") + name("builtins", "__import__")
        + opcodes("os") + b"\x85R" + opcodes("system") + b"\x86R" + text + b"\x85R.",
        "dotted name": b"\x80\x04" + opcodes("os") + opcodes("sys.modules") + b"\x93"
        + name("operator", "getitem") + b"0" + system + text + b"\x85R.",
        "a name with spaces": b"V" + line + b"0\x80\x02" + system + text + b"\x85R.",
    }  # fmt: skip


@pytest.mark.parametrize("way", running(""))
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(way: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    data = running(f"touch {mark}")[way]
    copyreg.add_extension("posix", "system", 0xF0)
    try:
        pickle.loads(data)
        assert mark.exists()
        mark.unlink()
        line = refusal(write(tmp_path / "x.pt", data))
    finally:
        copyreg.remove_extension("posix", "system", 0xF0)
        copyreg.clear_extension_cache()
    assert not mark.exists()
    assert "x.pt is not read" in line
    assert "could run code" in line or "an opcode torch.save does not write" in line
    assert "weights_only=True" in line


def test_nothing_the_allow_list_names_is_of_another_module() -> None:
    ours = [value for value in torch_names.NAMES.values() if callable(value)]
    assert ours
    assert all(type(value) is pickle_machine.Function for value in ours)
    assert {value.call.__module__ for value in ours} == {"convert.torch_files.names"}
    assert posix.system not in [value.call for value in ours]


@pytest.mark.parametrize("way", running(""))
def test_a_pickle_that_runs_code_beside_tensors_does_not_run(way: str, tmp_path: Path) -> None:
    """The tensors are read; what would run is a name and no more, or an opcode nobody knows."""
    mark = tmp_path / "ran"
    does = running(f"touch {mark}")[way].removeprefix(b"\x80\x02").removeprefix(b"\x80\x04")
    path = write(tmp_path / "x.pt", {"w": tensor(), "x": does.removesuffix(b"."), "y": [1]})
    if way in ("text of protocol 0", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "dotted name",
               "a name with spaces"):  # fmt: skip
        assert "an opcode torch.save does not write" in refusal(path)
    else:
        found = open_files([path])
        assert (list(found.tensors), found.values) == (["w"], {"y": [1]})
        assert found.left_out[0].startswith("x (")
    assert not mark.exists()


@pytest.mark.parametrize(
    "full",
    [
        "torch.storage._load_from_bytes", "torch.load", "torch.hub.load", "torch._utils.os",
        "torch.serialization.load", "numpy.load", "collections.OrderedDict.__init__",
        "torch._utils._rebuild_tensor_v2.__globals__", "builtins.eval", "torch.nn.Linear",
        "torch.FloatStorage.from_file", "functools.partial", "\u202ecollections.OrderedDict",
        "x" * 200 + ".y",
    ],
)  # fmt: skip
def test_other_names_are_names_and_nothing_more(full: str, tmp_path: Path) -> None:
    module, _, word = full.rpartition(".")
    for made in (name(module, word), opcodes(module) + opcodes(word) + b"\x93"):
        for used in (made, made + b")R", made + b"N\x85\x81}b", made + b")R(NNu", made + b")RNa"):
            found = open_files([write(tmp_path / "x.pt", {"w": used, "v": tensor()})])
            assert (list(found.tensors), found.values) == (["v"], {})
            assert found.left_out == (f"w ({full[:80]})",)
        for misused in (made, made + b")R"):
            values = {"a tensor of one": tensor(at=misused), "a storage": storage(kind=misused),
                      "a shape": tensor(misused, (1,)),
                      "a pair": ORDERED + opcodes(([misused],)) + b"R",
                      "a key": b"}" + misused + b"Ns",
                      "another class": name("torch._tensor", "_rebuild_from_type_v2")
                      + opcodes((misused, name("torch", "Tensor"), (), {})) + b"R"}  # fmt: skip
            for value in values.values():
                path = write(tmp_path / "x.pt", {"w": value})
                assert "x.pt is not read" in refusal(path)


ORDERED = name("collections", "OrderedDict")
HOOKS = ORDERED + b")R"
MISUSE = {
    "a list is called": opcodes([]) + b")R",
    "arguments are a list": ORDERED + b"]R",
    "too many arguments": ORDERED + opcodes(([], [])) + b"R",
    "an ordered dictionary of texts": ORDERED + opcodes((["ab"],)) + b"R",
    "an ordered dictionary of a number": ORDERED + opcodes((5,)) + b"R",
    "keys that are lists": ORDERED + opcodes(([([], 1)],)) + b"R",
    "keys that are tuples": b"}" + opcodes((1, 2)) + b"Ns",
    "a key twice": b"}(" + opcodes("a") + b"N" + opcodes("a") + b"Nu",
    "an odd number of items": b"}(" + opcodes("a") + b"u",
    "items of a list": b"](NNu",
    "appending to a dictionary": b"}Na",
    "appending to a tuple": b")Na",
    "a state for a dictionary": b"}}b",
    "a state for a tensor": tensor() + b"}b",
    "a state for a function": ORDERED + b"}b",
    "a parameter of nothing": name("torch._utils", "_rebuild_parameter") + b"NNN\x87R",
    "a tensor of nothing": tensor(at=b"N"),
    "a tensor of a storage class": tensor(at=name("torch", "FloatStorage")),
    "a tensor of bytes": tensor(at=storage(kind=name("torch.storage", "UntypedStorage"))),
    "another class with attributes": name("torch._tensor", "_rebuild_from_type_v2")
    + opcodes((ORDERED, name("torch", "Tensor"), (), {})) + b"R",
    "attributes of a list": name("torch._tensor", "_rebuild_from_type_v2")
    + opcodes(([], name("torch", "Tensor"), (), {})) + b"R",
    "an unknown type": name("torch._utils", "_rebuild_tensor_v3")
    + opcodes((storage(), 0, (1,), (1,), False, HOOKS, "torch.float32")) + b"R",
    "a conjugated tensor": name("torch._utils", "_rebuild_tensor_v2")
    + opcodes((storage(), 0, (1,), (1,), False, HOOKS, {"conj": True})) + b"R",
    "bytes of another encoding": name("_codecs", "encode") + opcodes(("a", "rot13")) + b"R",
    "bytes that are not latin": name("_codecs", "encode") + opcodes(("\u4e00", "latin1")) + b"R",
    "a size of texts": name("torch", "Size") + opcodes((("a",),)) + b"R",
    "a device of a number": name("torch", "device") + opcodes((1,)) + b"R",
    "an array of objects": name("numpy", "dtype") + opcodes(("O8", False, True)) + b"R",
    "a number too short": name("numpy.core.multiarray", "scalar") + name("numpy", "dtype")
    + opcodes(("f8",)) + b"R" + b"C\x01a" + b"\x86R",
    "a big-endian number": name("numpy", "dtype") + opcodes(("f8",)) + b"R"
    + opcodes((3, ">", None)) + b"b",
    "a number of a number": name("numpy.core.multiarray", "scalar") + b"NN\x86R",
    "text that is not UTF-8": b"X\x01\0\0\0\xff",
    "a name that is no text": b"NN\x93",
    "a memo that is empty": b"h\x07",
    "a mark that is missing": b"t",
    "a stack that is empty": b"R",
    "values left over": b"NN",
    "a name without an end": b"c" + b"x" * 5000,
    "protocol 0": b"\x80\x00N",
    "persistent id as text": opcodes("0") + b"Q",
    "persistent id of protocol 0": b"P0\n",
    "persistent id of four": opcodes(("storage", name("torch", "FloatStorage"), "0", "cpu")) + b"Q",
    "persistent id of a module": storage(word="module"),
    "persistent id without a word": storage(word=0),
    "persistent id of no class": storage(kind=b"N"),
    "persistent id of another class": storage(kind=name("torch", "Tensor")),
    "a key that is a number": storage(key=0),
    "a key that is a path": storage(key="../data.pkl"),
    "a storage that is missing": storage(key="1"),
    "a storage of a text": storage(count="6"),
    "a storage of a float": storage(count=6.0),
    "a storage of True": storage(count=True),
    "a storage of less than nothing": storage(count=-1),
    "a storage larger than its entry": storage(count=7),
    "a storage of 2^62 elements": storage(count=2**62),
    "a storage of 2^70 elements": storage(count=2**70),
}  # fmt: skip


@pytest.mark.parametrize("what", MISUSE)
def test_an_allowed_thing_misused_is_refused(what: str, tmp_path: Path) -> None:
    data = b"\x80\x02}" + opcodes("w") + MISUSE[what] + b"s."
    assert "x.pt is not read" in refusal(write(tmp_path / "x.pt", data))


OUTSIDE: dict[str, tuple[Any, Any, Any]] = {
    "one element more": ((7,), (1,), 0),
    "an offset": ((2, 3), (3, 1), 1),
    "an offset far away": ((1,), (1,), 2**59),
    "an offset beyond 64 bits": ((1,), (1,), 2**64 - 1),
    "a negative offset": ((1,), (1,), -1),
    "a negative offset made good by strides": ((2,), (3,), -1),
    "a long stride": ((2, 3), (4, 1), 0),
    "a negative stride": ((2,), (-1,), 3),
    "strides that overflow": ((2, 2), (2**63, 2**63), 0),
    "strides that cancel": ((2, 2), (2**60, -(2**60)), 0),
    "a shape that overflows": ((2**31, 2**31, 2**31), (0, 0, 0), 0),
    "a shape whose product is 0 in 64 bits": ((2**32, 2**32), (1, 1), 0),
    "a negative size": ((-1,), (1,), 0),
    "two negative sizes": ((-2, -3), (3, 1), 0),
    "a float": ((2.0,), (1,), 0),
    "True": ((True,), (1,), 0),
    "a stride of a float": ((2,), (1.0,), 0),
    "an offset of True": ((2,), (1,), True),
    "a text": ("ab", (1, 1), 0),
    "a list": ([2], [1], 0),
    "too few strides": ((2, 3), (1,), 0),
    "too many dimensions": ((1,) * 33, (1,) * 33, 0),
    "an empty tensor too large": ((0, 2**31 - 1, 2**31 - 1, 2**31 - 1), (1, 1, 1, 1), 0),
    "one element many times": ((2**31 - 1,), (0,), 0),
    "a row many times": ((2**27, 6), (0, 1), 0),
}


@pytest.mark.parametrize("what", OUTSIDE)
def test_a_tensor_outside_its_storage_is_refused(what: str, tmp_path: Path) -> None:
    shape, strides, offset = OUTSIDE[what]
    line = refusal(write(tmp_path / "x.pt", {"w": tensor(shape, strides, offset)}))
    assert "x.pt is not read" in line
    assert ("repeats" if "many times" in what else "tensor") in line


def test_many_tensors_of_one_storage_are_refused(tmp_path: Path) -> None:
    """Each is 8 MiB of an expanded row; together they are 2 GiB in a file of some kilobytes."""
    rows = {f"w{index}": tensor((2**19, 4), (0, 1)) for index in range(256)}
    assert "far more than the file's" in refusal(write(tmp_path / "x.pt", rows))


def doubled(times: int) -> bytes:
    """A tuple of itself twice, ``times`` over: 2^times values in a few bytes."""
    steps = b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(times))
    return b")" + steps


BOMBS = {
    "doubled tuples": b"}" + opcodes("w") + doubled(60) + b"s",
    "doubled tuples with a tensor": b"}" + opcodes("w")
    + doubled(60).replace(b")", tensor((6,), (1,)), 1) + b"s",
    "doubled tuples under a model": b"}" + opcodes("model") + b"}"
    + opcodes("w") + doubled(40) + b"ss",
    "doubled tuples as a key": b"}" + doubled(60) + b"Ns",
    "doubled pairs of an ordered dictionary": ORDERED + doubled(60) + b"R",
    "doubled by DUP": b"}" + opcodes("w") + b")" + b"2\x86" * 60 + b"s",
    "a list in itself": b"}" + opcodes("w") + b"]q\0h\0as",
    "a dictionary in itself": b"}q\0" + opcodes("model") + b"h\0s" + opcodes("w") + tensor() + b"s",
    "the root in itself": b"]q\0h\0a",
    "the root in itself without a name": b"}q\0" + opcodes("") + b"h\0s"
    + opcodes("w") + tensor() + b"s",
    # An error that shows them as text would have no end, or none on the stack.
    "a shape of doubled tuples": b"}" + opcodes("w") + tensor(doubled(60), (1,)) + b"s",
    "a deep shape": b"}" + opcodes("w") + tensor(b")" + b"\x85" * 50_000, (1,)) + b"s",
    "deep strides": b"}" + opcodes("w") + tensor((1,), b")" + b"\x85" * 50_000) + b"s",
    "a text made bytes again and again": opcodes("x" * 10_000) + b"q\x01" + opcodes("latin1")
    + b"q\x02" + name("_codecs", "encode") + b"q\x03" + b"h\x03h\x01h\x02\x86R" * 4000,
    "names without end": name("a", "b") * 100_000,
    "deep lists": b"}" + opcodes("w") + b"]" * 100_000 + b"a" * 99_999 + b"s",
    "deep dictionaries with a tensor": (b"}" + opcodes("w")) * 10_000 + tensor() + b"s" * 10_000,
    "deep tuples": b"}" + opcodes("w") + b")" + b"\x85" * 100_000 + b"s",
    "marks": b"(" * 100_000,
    "a text of 4 GB": b"X\xff\xff\xff\xff",
    "a text of 2^64 bytes": b"\x8d" + b"\xff" * 8,
    "bytes of 4 GB": b"B\xff\xff\xff\xff",
    "bytes of 2^63 bytes": b"\x8e" + b"\0" * 7 + b"\x80",
    "a byte array of 2^40 bytes": b"\x96" + (2**40).to_bytes(8, "little"),
    "a number of 2 GB": b"\x8b\xff\xff\xff\x7f",
    "a number of -1 bytes": b"\x8b\xff\xff\xff\xff",
    "a frame of 2^64 bytes": b"\x95" + b"\xff" * 8,
    "a memo of 2^32": b"Nr\xff\xff\xff\xff",
    "a long name": b"}" + opcodes("w" * 600) + tensor() + b"s",
    "names that multiply": b"}" + opcodes("w") + tensor() + b"s" + opcodes("n" * 300) + b"}"
    + opcodes("m" * 300) + tensor() + b"ss",
}  # fmt: skip


@pytest.mark.parametrize("what", BOMBS)
def test_a_small_pickle_does_not_grow(what: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", b"\x80\x02" + BOMBS[what] + b".")
    # Counting visits, not memory, ends these; fewer are enough to show it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pickles, "MAX_VISITS", 100_000)
        tracemalloc.start()
        line = refusal(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert "x.pt is not read" in line
    assert peak < 100 * path.stat().st_size + 10_000_000


def test_a_long_pickle_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_machine, "MAX_STEPS", 1000)
    path = write(tmp_path / "x.pt", b"\x80\x02" + b"]" * 2000 + b".")
    assert "takes more than 1000 steps" in refusal(path)
    path = write(tmp_path / "x.pt", b"\x80\x02}.]")
    assert "goes on after its end" in refusal(path)
    path = write(tmp_path / "x.pt", bytes(pickle_machine.MAX_PICKLE + 1))
    assert "should have 33554432 at most" in refusal(path)
    monkeypatch.setattr(pickles, "MAX_TENSORS", 3)
    path = write(tmp_path / "x.pt", {str(index): tensor() for index in range(5)})
    assert "too many" in refusal(path)
