"""Run as a program, with PyTorch: checkpoints as it saves them, and numbers as it reads them.

``python tests/helpers/torch_saved.py old FILE`` saves a checkpoint without zip, with a Namespace in
it and an optimiser, and prints of each tensor of its model dtype, shape and bytes; ``… fp8`` prints
the numbers of all codes of both kinds; ``… sharded FOLDER`` saves an OpenLM model as FSDP does,
``… whole FILE`` the same in one file. A process of its own, as torch_models.py is.
"""

import argparse
import collections
import json
import pathlib
import sys

import torch


def old(file: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
    state = {f"k.{str(kind)[6:]}": torch.randn(3, 2).mul(9).to(kind) for kind in kinds}
    state |= {"view": base[2:5, 1:4], "turned": base.T, "scalar": torch.tensor(2.5)}
    state |= {"tied": base, "parameter": torch.nn.Parameter(torch.randn(4)), "none": base[:0]}
    weight = torch.nn.Parameter(torch.randn(5))
    optimiser = torch.optim.Adam([weight])
    weight.sum().backward()
    optimiser.step()
    saved = {
        "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/a")),
        "optimizer": optimiser,
        "counts": collections.Counter("aab"),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimiser, 1),
        "model": collections.OrderedDict(state),
        "layer": torch.nn.Linear(2, 2),
        "epoch": 3,
    }
    torch.save(saved, file, _use_new_zipfile_serialization=False)
    torch.save(saved, file + ".zip")
    found = {}
    for name, tensor in state.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = [str(tensor.dtype), list(tensor.shape), bytes(raw.tolist()).hex()]
    print(json.dumps(found))


def fp8() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    print(json.dumps({n: codes.view(k).float().tolist() for n, k in kinds.items()}))


def openlm() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"tok_embeddings": (11, 8), "norm": (8,), "output": (11, 8)}
    shapes |= {
        "layers.0.attention.in_proj": (24, 8), "layers.0.attention.out_proj": (8, 8),
        "layers.0.feed_forward.w12": (32, 8), "layers.0.feed_forward.w3": (8, 16),
        "layers.0.attention_norm": (8,), "layers.0.ffn_norm": (8,),
    }  # fmt: skip
    return {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}


def main(words: list[str]) -> None:
    if words[0] == "old":
        old(words[1])
    elif words[0] == "fp8":
        fp8()
    elif words[0] == "sharded":
        import torch.distributed.checkpoint as sharded

        sharded.save({"model": openlm()}, checkpoint_id=words[1], no_dist=True)
    else:
        torch.save({"model": openlm()}, words[1])


if __name__ == "__main__":
    main(sys.argv[1:])
