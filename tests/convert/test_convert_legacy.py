"""Checkpoints of before PyTorch 1.6, and what lies beside a model in one: read, and never built."""

import importlib.util
import json
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.torch_files.legacy import MAGIC
from convert.torch_files.names import TYPES
from convert.torch_files.pickle_machine import Machine
from convert.torch_files.pickles import open_files
from mlx_hmem.errors import UserError
from tests.convert.test_convert_hostile import running
from tests.helpers.anchor_checkpoints import bits, convert
from tests.helpers.faults import any_input
from tests.helpers.places import ROOT
from tests.helpers.programs import refused
from tests.helpers.torch_files import name, opcodes, pickled, refusal, tensor

HEAD = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}


def at(key: Any = "5", count: Any = 6, view: Any = None, kind: str = "FloatStorage") -> bytes:
    """A storage as this format refers to it."""
    return opcodes(("storage", name("torch", kind), key, "cpu", count, view)) + b"Q"


def file_of(
    value: Any, storages: Any = None, keys: Any = None, head: Any = None, version: int = 1001
) -> bytes:
    """A checkpoint; by default its storage is "5", of 24 bytes."""
    storages = {"5": (6, bytes(range(24)))} if storages is None else storages
    start = [pickled(MAGIC), pickled(version), pickled(HEAD if head is None else head)]
    value = value if isinstance(value, bytes) else pickled(value)
    names = pickled(list(storages) if keys is None else keys)
    data = (struct.pack("<q", count) + raw for count, raw in storages.values())
    return b"".join([*start, value, names, *data])


def write(path: Path, *arguments: Any, **options: Any) -> Path:
    path.write_bytes(file_of(*arguments, **options))
    return path


def test_tensors_are_read_where_they_lie(tmp_path: Path) -> None:
    storages = {"7": (2, b"abcd"), "5": (6, bytes(range(24)))}
    value = {
        "state_dict": {
            "w": tensor(at=at()), "turned": tensor((3, 2), (1, 3), at=at()),
            "h": tensor((2,), (1,), at=at("7", 2, kind="HalfStorage")),
        },
        "net": opcodes(("module", name("a.b", "Net"), "net.py", "class Net: ...")) + b"Q",
        "epoch": 3,
    }  # fmt: skip
    found = open_files([write(tmp_path / "x.pt", value, storages)])
    assert {n: (t.dtype, t.shape, t.strides) for n, t in found.tensors.items()} == {
        "w": ("F32", (2, 3), None), "turned": ("F32", (3, 2), (1, 3)), "h": ("F16", (2,), None)
    }  # fmt: skip
    assert found.tensors["w"].read().tobytes() == bytes(range(24))
    assert found.tensors["turned"].read()[0].tobytes() == bytes([0, 1, 2, 3, 12, 13, 14, 15])
    assert found.tensors["h"].read().tobytes() == b"abcd"
    assert (found.values, found.left_out) == ({"epoch": 3}, ("net (a.b.Net)",))
    oldest = name("torch._utils", "_rebuild_tensor") + opcodes((at(), 1, (2,), (3,))) + b"R"
    found = open_files([write(tmp_path / "y.pt", {"w": oldest})])  # as before PyTorch 0.4
    assert found.tensors["w"].read().tobytes() == bytes([4, 5, 6, 7, 16, 17, 18, 19])


def damaged() -> dict[str, bytes]:
    """Files that say something untrue."""
    good = {"w": tensor(at=at())}
    two = {"w": tensor(at=at()), "v": tensor(at=at("6"))}
    raw = bytes(24)
    return {
        "another version": file_of(good, version=1002),
        "big-endian": file_of(good, head=HEAD | {"little_endian": False}),
        "a head that is a list": file_of(good, head=[1]),
        "a storage longer than it says": file_of(good, {"5": (6, raw + b"1")}),
        "a storage shorter than it says": file_of(good, {"5": (6, raw[:-1])}),
        "a count that is not the pickle's": file_of(good, {"5": (5, raw[:20])}),
        "a count below zero": file_of(good, {"5": (-1, raw)}),
        "a count of 2^62": file_of(good, {"5": (2**62, raw)}),
        "no storage": file_of(good, {}),
        "one storage of two": file_of(two),
        "a storage of none": file_of({"a": 1}),
        "a name twice": file_of(two, {"5": (6, raw), "6": (6, raw)}, ["5", "5"]),
        "names that are numbers": file_of(good, keys=[5]),
        "names that are a text": file_of(good, keys="5"),
        "names that are lists": file_of(good, keys=[["5"]]),
        "storages in the names": file_of(good, keys=[at()]),
        "a storage in the head": file_of(good, head=HEAD | {"x": at()}),
        "a storage in two lengths": file_of({"w": tensor(at=at()), "v": tensor(at=at("5", 7))}),
        "a storage of two types": file_of(
            {"w": tensor(at=at()), "v": tensor(at=at(kind="IntStorage"))}
        ),
        "a part of a storage": file_of({"w": tensor(at=at(view=("8", 0, 3)))}),
        "a storage as zip has them": file_of({"w": tensor()}),
        "a storage of 2^62 elements": file_of({"w": tensor(at=at(count=2**62))}),
        "a tensor outside": file_of({"w": tensor((7,), (1,), at=at())}),
        "a module that is no class": file_of(
            {"w": tensor(at=at()), "m": opcodes(("module", [1], "", "")) + b"Q" + b")R"}
        ),
        "a storage of a stranger's": file_of(
            {"w": tensor(at=opcodes(("storage", name("a", "B"), "5", "cpu", 6, None)) + b"Q")}
        ),
    }


@pytest.mark.parametrize("what", damaged())
def test_a_file_that_says_something_untrue_is_refused(what: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(damaged()[what])
    assert "x.pt is not read" in refusal(tmp_path / "x.pt")


def test_a_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = file_of({"w": tensor(at=at())})
    for length in range(14, len(whole)):
        (tmp_path / "x.pt").write_bytes(whole[:length])
        assert "x.pt is not read" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("way", running(""))
def test_code_in_it_does_not_run(way: str, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    refusal(write(tmp_path / "x.pt", running(f"touch {mark}")[way]))
    assert not mark.exists()


WHOLE = file_of(
    {"state_dict": {"w": tensor(at=at())}, "n": [1, 2.0, {"a": name("b", "C") + b")R"}]}
)


@any_input(300)
@given(
    place=st.integers(14, len(WHOLE) - 1), put=st.binary(min_size=1, max_size=8), more=st.booleans()
)
def test_a_changed_file_gives_tensors_inside_it_or_one_line(place, put, more, tmp_path):
    path, data = tmp_path / "x.pt", bytearray(WHOLE)
    data[place : place + (0 if more else len(put))] = put
    path.write_bytes(data)
    try:
        found = open_files([path])
    except UserError:
        return
    for each in found.tensors.values():
        assert each.read().nbytes == each.nbytes <= 24 * 16


def torch_saved(*words: object) -> str:
    """What PyTorch says, in a process of its own."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("PyTorch is not installed: pip install torch")
    program = ROOT / "tests" / "helpers" / "torch_saved.py"
    done = subprocess.run(
        [sys.executable, str(program), *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("protocol", [4, 5])
def test_sets_and_bytearrays_of_later_protocols_are_names(protocol: int) -> None:
    value = {"seen": {1, 2}, "never": frozenset("ab"), "raw": bytearray(b"x"), "step": 3}
    found = Machine(pickle.dumps(value, protocol), {}, lambda key: key).run()
    assert found.pop("step") == 3
    names = {"seen": "builtins.set", "never": "builtins.frozenset", "raw": "builtins.bytearray"}
    assert {key: each.name for key, each in found.items()} == names
    with pytest.raises(ValueError, match="adds to what is no set"):
        Machine(b"\x80\x04](K\x01\x90.", {}, lambda key: key).run()


def test_what_pytorch_saves_beside_an_optimiser_and_a_namespace(tmp_path: Path) -> None:
    wanted = json.loads(torch_saved("old", tmp_path / "x.pt").splitlines()[-1])
    for file in ("x.pt", "x.pt.zip"):
        found = open_files([tmp_path / file])
        assert list(found.tensors) == list(wanted)
        for label, (dtype, shape, raw) in wanted.items():
            ours = found.tensors[label]
            assert (ours.dtype, list(ours.shape)) == (TYPES[dtype.removeprefix("torch.")], shape)
            assert ours.read().tobytes().hex() == raw, label
        assert found.values == {"epoch": 3}
        assert found.left_out == (
            "args (argparse.Namespace)", "optimizer (torch.optim.adam.Adam)",
            "counts (collections.Counter)", "scheduler (torch.optim.lr_scheduler.StepLR)",
            "layer (torch.nn.modules.linear.Linear)",
        )  # fmt: skip


def test_a_checkpoint_in_parts_is_refused_with_what_makes_it_whole(tmp_path: Path) -> None:
    folder = tmp_path / "it's here"
    torch_saved("sharded", folder)
    line = refused("in parts, as FSDP saves it", convert, folder, tmp_path / "no")
    command = re.search(r"where PyTorch is, run (.*) and convert again", line)
    assert command is not None
    words = shlex.split(command[1])
    refused("in parts, as FSDP saves it", convert, folder / "__0_0.distcp", tmp_path / "no")
    above = tmp_path / "above"
    shutil.copytree(folder, above / "pytorch_model_fsdp_0")
    (above / "config.json").write_text('{"model_type": "llama"}')
    line = refused("in parts, as FSDP saves it", convert, above, tmp_path / "no")
    assert f"{above}/pytorch_model_fsdp_0 {above}/pytorch_model.bin and" in line
    done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    torch_saved("whole", tmp_path / "whole.pt")
    wanted = convert(tmp_path / "whole.pt", tmp_path / "wanted", "--set", "n_heads=2")
    assert bits(convert(folder, tmp_path / "out", "--set", "n_heads=2")) == bits(wanted)
