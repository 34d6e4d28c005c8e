"""The stages that train: the anchor, then the arms that start from it and see the same rows.

``memories`` and ``generic`` train blocks on the frozen anchor; ``dense`` trains the anchor itself
on the same sequences in the same order, to compare with. Each arm leaves its result in its own
folder and can run in a process of its own.
"""

import json
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.files import load_safetensors, save_safetensors, write_atomic
from train.anchor import AnchorTrainee, initialise
from train.loop import train
from train.memories import MemoryTrainee, generic_config
from train.recipe import Recipe, TrainerConfig
from train.tokenizer import EOT_ID


def model_args(recipe: Recipe) -> ModelArgs:
    anchor = recipe.anchor
    return ModelArgs(
        model_type="openlm",
        hidden_size=anchor.hidden_size,
        num_hidden_layers=anchor.num_hidden_layers,
        intermediate_size=anchor.intermediate_size,
        num_attention_heads=anchor.num_attention_heads,
        head_dim=anchor.head_dim,
        vocab_size=recipe.tokenizer.vocab_size,
        tie_word_embeddings=anchor.tie_word_embeddings,
        max_position_embeddings=recipe.windows.context,
    )


def _train_all_weights(
    model: Model, tokens: np.ndarray, training: TrainerConfig, folder: Path, seed: int, name: str
) -> None:
    """Trains ``model`` and leaves it in ``folder`` as an anchor that ``load_anchor`` takes."""
    train(AnchorTrainee(model, tokens, EOT_ID, training), len(tokens), training, folder, seed, name)
    save_safetensors(folder / "model.safetensors", named_parameters(model))
    config = asdict(model.args) | {"bos_token_id": EOT_ID, "eos_token_id": EOT_ID}
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    parameters = sum(array.size for array in named_parameters(model).values())
    print(f"{name}: {parameters:,} parameters in {folder}")


def run_anchor(recipe: Recipe, folder: Path) -> None:
    tokens = np.load(folder / "anchor-sequences" / "tokens.npy", mmap_mode="r")
    model = Model(model_args(recipe))
    initialise(model, recipe.seed)
    _train_all_weights(
        model, tokens, recipe.anchor.training, folder / "anchor", recipe.seed, "anchor"
    )


def run_dense(recipe: Recipe, folder: Path) -> None:
    if recipe.dense is None:
        print("dense: the recipe has none")
        return
    model, _ = load_anchor(folder / "anchor")
    assert isinstance(model, Model)
    tokens = np.load(folder / "sequences" / "tokens.npy", mmap_mode="r")
    training = recipe.dense.training
    _train_all_weights(model, tokens, training, folder / "dense", recipe.seed, "dense")


def _train_memory(recipe: Recipe, folder: Path, name: str, generic: bool) -> None:
    anchor, _ = load_anchor(folder / "anchor")
    tokens = np.load(folder / "sequences" / "tokens.npy", mmap_mode="r")
    paths = np.load(folder / "sequences" / "paths.npy", mmap_mode="r")
    config, training = recipe.memory_config, recipe.memories.training
    if generic:
        config, paths = generic_config(config), np.zeros((len(tokens), 1), np.int32)
    trainee = MemoryTrainee(anchor, config, tokens, paths, EOT_ID, training, recipe.seed)
    train(trainee, len(tokens), training, folder / name, recipe.seed, name)
    touched = sum(int((table.steps > 0).sum()) for table in trainee.tables)
    print(f"{name}: {touched} blocks trained, in {folder / name}")


def run_memories(recipe: Recipe, folder: Path) -> None:
    _train_memory(recipe, folder, "memories", generic=False)


def run_generic(recipe: Recipe, folder: Path) -> None:
    _train_memory(recipe, folder, "generic", generic=True)


def trained_blocks(folder: Path) -> dict[int, mx.array]:
    """The blocks of a finished memory stage by level, (clusters, layers, 3, r, hidden), float32."""
    state = load_safetensors(folder / "checkpoint.safetensors")
    return {
        int(name.removeprefix("level-").removesuffix(".weights")): array
        for name, array in state.items()
        if name.endswith(".weights")
    }
