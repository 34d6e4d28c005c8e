"""The conversions that are killed, each of small models that are made for it."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from convert.command import main as convert
from convert.gguf.header import read_gguf
from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.errors import UserError
from mlx_hmem.files import save_safetensors
from mlx_hmem.model.load import DEMO, load
from tests.helpers.gguf_models import to_q8, write_gguf
from tests.helpers.mlx_adapters import save_adapter
from tests.helpers.tiny_tokenizers import save_byte_level

# The command itself, with shards so small that there are many moments between two.
PROGRAM = """
import sys
import mlx_hmem
import convert.anchors.weights
from convert.command import main
from convert.memory.bank import write_tensors_as_bank
from mlx_hmem.bank.writer import rewrite_bank
from mlx_hmem.errors import run_program
size = int(sys.argv.pop(1))
convert.anchors.weights.SHARD_BYTES = size
rewrite_bank.__kwdefaults__["shard_bytes"] = size
write_tensors_as_bank.__kwdefaults__["shard_bytes"] = size
run_program(lambda: main(sys.argv[1:]))
"""
OUT = object()


def load_whole(folder: Path) -> None:
    """Loads a model with its memory; a UserError says why it is none."""
    bank = load(folder).bank
    if bank is None:
        raise UserError("a model has lost its memory", folder, "find out why")
    bank.close()


class Case(NamedTuple):
    """A conversion to kill. ``words``: its command, where OUT stands for the destination;
    ``older``: the model that lies there before."""

    name: str
    words: Sequence[object]
    older: Path | None = None
    load: Callable[[Path], object] = load_anchor

    def command(self, out: Path, shard_bytes: int) -> list[str]:
        words = [str(out if word is OUT else word) for word in self.words]
        return [sys.executable, "-c", PROGRAM, str(shard_bytes), *words]

    def part(self, out: Path) -> Path:
        """Where it writes: into a folder beside the destination, a file into a hidden one."""
        return out.with_name(f".{out.name}.part" if self.load is read_gguf else f"{out.name}.part")

    def load_result(self, out: Path) -> None:
        """Loads what has been made, if it is a model of ours."""
        if "pytorch" not in self.words:
            self.load(out)


def save_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> Path:
    """A random anchor as a model directory, in four shards."""
    folder.mkdir(parents=True)
    weights = list(named_parameters(model).items())
    for i in range(4):
        save_safetensors(folder / f"model-{i + 1:05}-of-00004.safetensors", dict(weights[i::4]))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def cases(folder: Path, layers: int = 16) -> Iterator[Case]:
    """Conversions of an anchor; of 32 MB with 16 layers."""
    args, checkpoint = ModelArgs("openlm", 192, layers, 576, 6, 32, 1024), folder / "checkpoint"
    mx.random.seed(0)
    model, older = (save_model(folder / n, Model(args), vars(args)) for n in ("model", "older"))
    convert([str(model), str(checkpoint), "--to", "pytorch"])
    # As transformers names it.
    config = dict(
        model_type="llama", hidden_size=192, num_hidden_layers=layers, intermediate_size=576,
        num_attention_heads=6, num_key_value_heads=6, rms_norm_eps=1e-5, vocab_size=1024,
        rope_theta=1e4, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    other = llama.Model(llama.ModelArgs.from_dict(config))
    llama_folder = save_byte_level(save_model(folder / "llama", other, config))
    gguf = write_gguf(folder / "llama.gguf", llama_folder, "llama", to_q8)
    q8 = ["--to", "gguf", "--dtype", "q8_0"]
    yield Case("openlm", [checkpoint, OUT])
    yield Case("huggingface", [llama_folder, OUT])
    yield Case("gguf", [gguf, OUT])
    yield Case("to gguf", [llama_folder, OUT, *q8], load=read_gguf)
    yield from adapter_cases(folder, llama_folder)
    yield Case("to pytorch", [model, OUT, "--to", "pytorch"])
    yield Case("overwrite", [checkpoint, OUT, "--overwrite"], older)


def adapter_cases(folder: Path, anchor: Path) -> Iterator[Case]:
    """Two adapters of an anchor, of 2 MB each: in, and out again."""
    given: list[object] = [
        save_adapter(anchor, folder / f"adapter-{i}", i, rank=16) for i in range(2)
    ]
    words, joined = ["adapters", *given, "--anchor", anchor], folder / "adapters"
    convert([str(word) for word in (*words, joined)])
    fuse = ["fuse", joined, OUT, "--memory-name", "adapter-1"]
    yield Case("adapters", [*words, OUT], load=load_whole)
    yield Case("fuse", fuse)
    yield Case("fuse as gguf", [*fuse, "--as", "gguf"], load=read_gguf)


def whole_cases(folder: Path) -> Iterator[Case]:
    """Conversions of the demo model: an anchor, a memory bank, a cluster tree and an encoder."""
    checkpoint, model, older = (folder / f"whole-{n}" for n in ("checkpoint", "model", "older"))
    convert([str(DEMO), str(checkpoint), "--to", "pytorch", "--dtype", "float16"])
    convert([str(checkpoint), str(model)])  # the demo's own bank is quantised
    convert(["quantize", str(model), str(older), "--bank-bits", "4"])
    yield Case("whole from pytorch", [checkpoint, OUT], load=load_whole)
    yield Case("whole to pytorch", [model, OUT, "--to", "pytorch"], load=load_whole)
    bits = ["--anchor-bits", "4", "--bank-bits", "8", "--overwrite"]
    yield Case("whole quantised", ["quantize", model, OUT, *bits], older, load_whole)
