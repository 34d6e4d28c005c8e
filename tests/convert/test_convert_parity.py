"""What PyTorch saves is read as PyTorch reads it, bit for bit."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.torch_files.names import STORAGES, TYPES
from convert.torch_files.pickles import open_files
from tests.helpers.programs import refused
from tests.helpers.torch_files import tensor, write

torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity is not tested")


def bytes_of(array: Any) -> bytes:
    return array.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def test_every_tensor_equals_torch_load(tmp_path: Path) -> None:
    base = torch.arange(120, dtype=torch.float32).reshape(2, 3, 4, 5)
    layer = torch.nn.Linear(4, 3)
    layer.weight.note = "an attribute"
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(4)).sum().backward()
    optimizer.step()
    state: dict[str, Any] = OrderedDict(layer.state_dict())
    state |= {f"t.{kind}": torch.arange(6).to(getattr(torch, kind)) for kind in TYPES}
    state |= {
        "transposed": base.permute(3, 1, 0, 2), "cut": base[:, 1:, ::2, 2:4], "row": base[1, 2, 3],
        "expanded": base[0, 0, 0].expand(7, 5), "scalar": base[0, 1, 2, 3], "none": base[:, :0],
        "one": base.as_strided((1, 4), (77, 2), 3),
        "parameter": layer.weight, "nan": torch.tensor([float("nan"), -0.0]),
        "buffer": torch.nn.Buffer(torch.ones(2)), "pinned": torch.zeros(3, requires_grad=True),
    }  # fmt: skip
    whole = {
        "epoch": 3, "state_dict": state, "optimizer": optimizer.state_dict(), "size": base.shape,
        "dtype": torch.bfloat16, "device": torch.device("cpu"), "loss": np.float32(0.5),
    }  # fmt: skip
    typed = set(STORAGES.values())
    old = {"_use_new_zipfile_serialization": False}
    for options in ({}, {"pickle_protocol": 4}, old, old | {"pickle_protocol": 4}):
        if "_use_new_zipfile_serialization" in options:  # itself does not load what has no storage
            untyped = {f"t.{kind}" for kind, ours in TYPES.items() if ours not in typed}
            whole["state_dict"] = OrderedDict((k, v) for k, v in state.items() if k not in untyped)
        torch.save(whole, tmp_path / "x.pt", **options)
        found = open_files([tmp_path / "x.pt"])
        loaded = torch.load(tmp_path / "x.pt", weights_only=False)["state_dict"]
        assert list(found.tensors) == list(loaded)
        for label, want in loaded.items():
            mine = found.tensors[label]
            assert mine.shape == tuple(want.shape), label
            assert mine.read().tobytes() == bytes_of(want), label
            if mine.shape:
                assert mine.read(0, 1).tobytes() == bytes_of(want[:1]), label
        assert found.left_out == ("optimizer",)
        assert found.values == {
            "epoch": 3, "size": (2, 3, 4, 5), "dtype": "torch.bfloat16", "device": "cpu",
            "loss": 0.5,
        }  # fmt: skip


def test_whole_modules_programs_and_other_tensors_are_refused(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    torch.save(layer, tmp_path / "module.pt")
    torch.save(layer, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(layer), tmp_path / "script.pt")
    torch.save({"s": torch.eye(2).to_sparse()}, tmp_path / "sparse.pt")
    for file, says in (
        ("module", "is one 'torch.nn.modules.linear.Linear', which is not built"),
        ("old", "is one 'torch.nn.modules.linear.Linear', which is not built"),
        ("script", "a TorchScript archive"),
        ("sparse", "a sparse, nested or quantised tensor, which is not read"),
    ):
        refused(says, open_files, [tmp_path / f"{file}.pt"])


def test_the_files_made_by_hand_are_such_as_pytorch_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "x.pt", {"n": [1, 2.5], "w": tensor(), "t": tensor((2, 2), (1, 3), 1)})
    loaded = torch.load(path, weights_only=True)
    assert loaded["n"] == open_files([path]).values["n"]
    for label, found in open_files([path]).tensors.items():
        assert np.array_equal(found.read().view(np.float32), loaded[label].numpy())
