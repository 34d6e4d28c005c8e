"""Run as a program, with PyTorch and PEFT: ``python tests/helpers/peft_adapters.py FOLDER NAME…``
saves a tiny random model of transformers of each architecture in ``FOLDER/NAME``, with ``ids.npy``,
and beside it adapters of PEFT with a random B, each with what the model says with it in
``logits.npy`` and, merged into the weights, in ``merged.npy``.

A process of its own, outside the package of the tests, as ``torch_models.py`` is.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(
    hidden_size=32, num_hidden_layers=3, intermediate_size=64, vocab_size=400, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=96, pad_token_id=0,
    bos_token_id=1, eos_token_id=1,
)  # fmt: skip
ADAPTERS: dict[str, dict[str, Any]] = {
    "every": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.1},
    "root": {"r": 3, "lora_alpha": 5, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 4, "target_modules": ["k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"o_proj": 2, "model.layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"layers.2.self_attn.o_proj": 12},
    },
    "layer": {"r": 2, "target_modules": ["up_proj"], "layers_to_transform": [1]},
}  # fmt: skip
FUSED: dict[str, dict[str, Any]] = {
    "every": ADAPTERS["every"],
    "qkv": {"r": 3, "target_modules": ["qkv_proj"]},
}


def make(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(0, 400, (2, 20))
    model.save_pretrained(folder)
    np.save(folder / "ids.npy", ids.numpy())
    for adapter, options in (FUSED if name == "phi3" else ADAPTERS).items():
        anchor = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        changed = get_peft_model(anchor, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        place = folder.with_name(f"{name}-{adapter}")
        with torch.no_grad():
            for part, parameter in changed.named_parameters():
                if "lora_B" in part:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
            changed.save_pretrained(place, safe_serialization=adapter != "root")
            np.save(place / "logits.npy", changed(ids).logits.numpy())
            np.save(place / "merged.npy", changed.merge_and_unload()(ids).logits.numpy())


if __name__ == "__main__":
    for name in sys.argv[2:]:
        make(name, Path(sys.argv[1]) / name)
