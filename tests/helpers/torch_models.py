"""Run as a program, with PyTorch: tiny random models of transformers, and logits of theirs.

``python tests/helpers/torch_models.py make FOLDER NAME…`` saves each model in ``FOLDER/NAME``, as
shards of safetensors, and in ``FOLDER/NAME-bin``, as pickles, with ``ids.npy`` and ``logits.npy``;
``… read FOLDER…`` loads folders and prints how far their logits lie from ``logits.npy``; ``… gguf
FOLDER…`` saves the logits of ``ids.npy`` that the GGUF file of each gives, float32, as
``logits.npy``; ``… hash FILE`` prints dtype, shape and SHA-256 of each tensor in a checkpoint. It
is a process of its own, outside the package of the tests, since PyTorch and the OpenBLAS that MLX
uses do not share one.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
SIZES = dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64, vocab_size=64)
ENDS = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
COMMON = SIZES | HEADS | ENDS | dict(max_position_embeddings=128)
ROPE = {"rope_type": "default", "rope_theta": 5000.0}  # no library's default
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
OTHERS = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
    "qwen2": {"attention_bias": True},
    "gemma3_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 16,
        "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "sliding_attention": ROPE,
            "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
        },
    },
    "mistral": {"sliding_window": None},
    "granite": {"logits_scaling": 2.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0,
                "residual_multiplier": 0.7},
    "phi3": {"sliding_window": None},
    "starcoder2": {"hidden_act": "gelu", "sliding_window": None},
    "nemotron": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gpt2": {"n_embd": 32, "n_head": 4, "n_layer": 3, "n_positions": 128, "vocab_size": 64,
             "bos_token_id": 0, "eos_token_id": 0},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                  "norm_topk_prob": True, "mlp_only_layers": [0], "decoder_sparse_step": 1},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    torch.manual_seed(0)
    values = {} if name == "gpt2" else COMMON | {"rope_parameters": ROPE}
    config = AutoConfig.for_model(name, **(values | OTHERS.get(name, {})))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at 0 or 1, where a mistake would not show
            parameter.add_(0.05 * torch.randn_like(parameter))
        ids = torch.randint(0, 64, (2, 40))
        logits = model(ids).logits
    model.save_pretrained(folder, max_shard_size="30KB")
    config.save_pretrained(folder.with_name(f"{name}-bin"))
    saved = sorted(folder.glob("model*.safetensors"))  # a state_dict() may name experts otherwise
    _save_bin(
        {k: v for f in saved for k, v in load_file(f).items()}, folder.with_name(f"{name}-bin")
    )
    for place in (folder, folder.with_name(f"{name}-bin")):
        np.save(place / "ids.npy", ids.numpy())
        np.save(place / "logits.npy", logits.numpy())


def _save_bin(state: dict[str, torch.Tensor], folder: Path) -> None:
    names = list(state)
    where = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05}-of-00002.bin"
        torch.save({name: state[name] for name in names[i::2]}, folder / file)
        where |= dict.fromkeys(names[i::2], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))


def read(folder: Path) -> dict[str, Any]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, dtype=torch.float32
    )
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(np.load(folder / "ids.npy"))).logits.numpy()
    expected = np.load(folder / "logits.npy")
    difference = float(np.abs(logits - expected).max())
    tokens = int((logits.argmax(-1) != expected.argmax(-1)).sum())
    info = dict(info) | {"tokens": [tokens] if tokens else []}
    return {"difference": difference} | {key: sorted(map(str, v)) for key, v in info.items() if v}


def gguf(folder: Path) -> None:
    (file,) = folder.glob("*.gguf")
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():  # row by row: a large vocabulary takes its memory
        rows = [
            model(row[None]).logits[0].numpy()
            for row in torch.from_numpy(np.load(folder / "ids.npy"))
        ]
    np.save(folder / "logits.npy", np.stack(rows))


def hashes(file: Path) -> dict[str, Any]:
    state = torch.load(file, weights_only=True)["state_dict"]
    return {
        name: (
            str(tensor.dtype),
            tuple(tensor.shape),
            hashlib.sha256(tensor.view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for name, tensor in state.items()
    }


if __name__ == "__main__":
    if sys.argv[1] == "make":
        for name in sys.argv[3:]:
            make(name, Path(sys.argv[2]) / name)
    elif sys.argv[1] == "gguf":
        for name in sys.argv[2:]:
            gguf(Path(name))
    elif sys.argv[1] == "hash":
        print(json.dumps(hashes(Path(sys.argv[2]))))
    else:
        print(json.dumps({folder: read(Path(folder)) for folder in sys.argv[2:]}))
