"""How far we are from numbers made elsewhere, and from ourselves computed another way.

``python -m benchmarks.parity FIXTURES [--json]``: FIXTURES is a folder with ``openlm_tiny_*.npz``
and ``minilm_golden.*``. Prints the largest absolute differences that ``docs/parity.md`` quotes.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_hmem.anchors.attach import attach_memory
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.memory import initial_block
from mlx_hmem.retriever import load_encoder
from mlx_hmem.retriever.minilm import MiniLMEncoder

MEMORY = MemoryConfig(hidden_size=64, num_hidden_layers=3, r=(8, 4), branching=(4, 4))


def tiny_model(weights: dict[str, np.ndarray], tied: bool) -> Model:
    args = ModelArgs(
        model_type="openlm",
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=160,
        num_attention_heads=6,
        head_dim=8,
        vocab_size=101,
        tie_word_embeddings=tied,
    )
    model = Model(args)
    arrays = {name: mx.array(array) for name, array in weights.items()}
    model.load_weights(list(model.sanitize(arrays).items()))
    return model


def part(data: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}


def openlm(data: dict[str, np.ndarray], tied: bool) -> dict[str, float]:
    """Logits, loss and every gradient of a tiny OpenLM against PyTorch's."""
    model, ids = tiny_model(part(data, "w/"), tied), mx.array(data["ids"])

    def loss(model: nn.Module) -> mx.array:
        return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")

    value, gradients = nn.value_and_grad(model, loss)(model)
    golden = {name: mx.array(array) for name, array in part(data, "g/").items()}
    expected = model.sanitize(golden)
    pairs: Any = tree_flatten(gradients)
    worst = max(difference(a, expected[name]) for name, a in pairs)
    return {
        "logits": difference(model(ids), mx.array(data["logits"])),
        "loss": difference(value, mx.array(data["loss"])),
        "gradients": worst,
    }


def difference(a: object, b: object) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def memory(data: dict[str, np.ndarray]) -> dict[str, float]:
    """Attached memory against a widened FFN, at its start, and rows of a batch against rows."""
    weights, ids = part(data, "w/"), mx.array(data["ids"])
    anchor, rng = tiny_model(weights, True), np.random.default_rng(0)
    alone, slot = anchor(ids), attach_memory(anchor, MEMORY)
    shape = (3, 3, sum(MEMORY.r), 64)
    rows = [mx.array(0.1 * rng.standard_normal(shape, np.float32)) for _ in range(2)]
    with slot.using((mx.array(initial_block(MEMORY, sum(MEMORY.r), rng)),)):
        start = anchor(ids)
    with slot.using((rows[0],)):
        attached = anchor(ids)
    with slot.using((mx.stack(rows),)):
        together = anchor(ids)
    widened = tiny_model(weights, True)
    for layer, (gate, up, down) in zip(widened.layers, rows[0], strict=True):
        mlp = layer.mlp
        mlp.gate_proj.weight = mx.concatenate([mlp.gate_proj.weight, gate])
        mlp.up_proj.weight = mx.concatenate([mlp.up_proj.weight, up])
        mlp.down_proj.weight = mx.concatenate([mlp.down_proj.weight, down.T], axis=1)
    singles = []
    for i, row in enumerate(rows):
        with slot.using((row,)):
            singles.append(anchor(ids[i : i + 1]))
    return {
        "at its start against the anchor alone": difference(start, alone),
        "against a widened FFN": difference(attached, widened(ids)),
        "row of a batch against the row alone": difference(together, mx.concatenate(singles)),
        "what this memory changes in the logits": difference(attached, alone),
    }


def minilm(folder: Path) -> dict[str, float]:
    """Token ids and vectors of MiniLM against sentence-transformers'."""
    data = np.load(folder / "minilm_golden.npz")
    texts = json.loads((folder / "minilm_golden.texts.json").read_text())
    encoder = load_encoder("minilm")
    assert isinstance(encoder, MiniLMEncoder)
    ids = [encoding.ids for encoding in encoder.tokenizer.encode_batch(texts)]
    golden = [row[:n].tolist() for row, n in zip(data["input_ids"], data["lengths"], strict=True)]
    return {
        "texts whose token ids differ": float(
            sum(a != b for a, b in zip(ids, golden, strict=True))
        ),
        "vectors": difference(encoder.encode(texts), data["vectors"]),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("fixtures", type=Path, help="folder of the golden numbers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    results = {}
    for name in ("tied", "sep"):
        path = args.fixtures / f"openlm_tiny_ln_{name}.npz"
        if not path.exists():
            raise UserError("no golden numbers", path, "name the folder that holds them")
        data = dict(np.load(path))
        results[f"OpenLM ({name}) against PyTorch"] = openlm(data, name == "tied")
        if name == "tied":
            results["FFN memory"] = memory(data)
    results["MiniLM against sentence-transformers"] = minilm(args.fixtures)
    if args.json:
        print(json.dumps(results))
        return
    for title, figures in results.items():
        print(title)
        for name, value in figures.items():
            print(f"  {name:42s} {value:.2g}")


if __name__ == "__main__":
    run_program(main)
