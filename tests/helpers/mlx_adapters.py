"""LoRA adapters as mlx-lm saves them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from convert.command import main
from mlx_hmem.anchors.load import load_anchor
from mlx_hmem.files import save_safetensors

ADAPTERS = ("sql", "law", "verse")


def save_adapter(anchor: Path, folder: Path, seed: int, scale: float = 20.0, **config: Any) -> Path:
    """An adapter as mlx_lm.lora saves it, on the last two layers, with a random B."""
    own, _ = load_anchor(anchor)
    parameters = {"rank": 3, "scale": scale, "dropout": 0.0, **config}
    linear_to_lora_layers(own, 2, parameters)
    mx.random.seed(seed)
    leaves: Any = tree_flatten(own.parameters())
    tensors = {
        name: mx.random.normal(array.shape) * 0.06
        for name, array in leaves
        if name.endswith(("lora_a", "lora_b"))
    }
    folder.mkdir(parents=True)
    save_safetensors(folder / "adapters.safetensors", tensors)
    values = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def adapters(*words: object, anchor: Path, out: Path, texts: Sequence[str] = ()) -> Path:
    options = ["--texts", *texts] if texts else []
    main(["adapters", *map(str, words), "--anchor", str(anchor), str(out), *options])
    return out
