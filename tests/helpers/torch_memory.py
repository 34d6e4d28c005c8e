"""Run as a program, with PyTorch: an OpenLM with the memory module of docs/pytorch_layout.md.

``python tests/helpers/torch_memory.py FOLDER`` makes one with random weights of the sizes that the
folder's marker tells, saves it as one checkpoint, to which it changes the marker, and saves ids,
paths and logits beside it. It is a process of its own, outside the package of the tests, since
PyTorch and the OpenBLAS that MLX uses do not share one.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

PAGE = Path(__file__).parents[2] / "docs" / "pytorch_layout.md"
HIDDEN, INNER, HEADS, DIM, FFN, VOCAB, LAYERS = 16, 16, 2, 8, 32, 400, 2


def memory_module() -> Any:
    """The class ``Memory`` of the documentation, run as it stands there."""
    source = PAGE.read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), names)
    return names["Memory"]


class Norm(nn.LayerNorm):
    def __init__(self, size: int):
        super().__init__(size, eps=1e-5, bias=False)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.in_proj = nn.Linear(HIDDEN, 3 * INNER, bias=False)
        self.out_proj = nn.Linear(INNER, HIDDEN, bias=False)
        self.q_norm, self.k_norm = Norm(INNER), Norm(INNER)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.in_proj(x).chunk(3, dim=-1)
        heads = (*x.shape[:2], HEADS, DIM)
        q, k = (_rotated(a.view(heads).mT.mT) for a in (self.q_norm(q), self.k_norm(k)))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v.view(heads)))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(found.transpose(1, 2).flatten(2))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions, halves of a head; x (batch, time, heads, dim)."""
    frequencies = 1e5 ** (-torch.arange(0, DIM, 2) / DIM)
    angles = torch.outer(torch.arange(x.shape[1]), frequencies)[:, None].repeat(1, 1, 2)
    turned = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], dim=-1)
    return x * angles.cos() + turned * angles.sin()


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w12 = nn.Linear(HIDDEN, 2 * FFN, bias=False)
        self.w3 = nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, memory: nn.Module):
        super().__init__()
        self.attention, self.feed_forward, self.memory = Attention(), FeedForward(), memory
        self.attention_norm, self.ffn_norm = Norm(HIDDEN), Norm(HIDDEN)

    def forward(self, h: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor:
        h = h + self.attention(self.attention_norm(h))
        x = self.ffn_norm(h)
        return h + self.feed_forward(x) + self.memory(x, path)


class OpenLM(nn.Module):
    def __init__(self, r: list[int], branching: list[int]):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, HIDDEN)
        memory = memory_module()
        self.layers = nn.ModuleList(Layer(memory(r, branching, HIDDEN)) for _ in range(LAYERS))
        self.norm, self.output = Norm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, ids: torch.Tensor, path: torch.Tensor | None) -> torch.Tensor:
        h = self.tok_embeddings(ids)
        for layer in self.layers:
            h = layer(h, path)
        return self.output(self.norm(h))


def main(folder: Path) -> None:
    marker = json.loads((folder / "hmem_pytorch.json").read_text())
    torch.manual_seed(0)
    model = OpenLM(marker["memory"]["r"], marker["memory"]["branching"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        ids, paths = (
            torch.randint(0, VOCAB, (3, 20)),
            torch.tensor([[0, 1, 2], [2, 5, 11], [1, 2, 4]]),
        )
        np.save(folder / "fetched.npy", model(ids, paths).numpy())
        np.save(folder / "generic.npy", model(ids, None).numpy())
    np.save(folder / "ids.npy", ids.numpy())
    np.save(folder / "paths.npy", paths.numpy())
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, folder / "anchor" / "model.pt")
    for name in marker["tensors"]:
        (folder / name).unlink()
    marker |= {"anchor": "anchor", "tensors": ["anchor/model.pt"]}
    (folder / "hmem_pytorch.json").write_text(json.dumps(marker))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
