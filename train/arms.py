"""The stages that train: the anchor, then the arms that start from it and see the same rows.

``memories`` and ``generic`` train blocks on the frozen anchor. With ``memories.cotrain`` the stage
``memories`` trains anchor, memories and generic memory together, and ``generic`` has nothing to do.
``dense`` trains the anchor itself on the same sequences in the same order, to compare with. Each
arm leaves its result in its own folder and can run in a process of its own.
"""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from mlx_hmem.anchors.load import load_anchor, named_parameters
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.files import fingerprint, save_safetensors, write_atomic
from train.anchor import AnchorTrainee, initialise
from train.loop import train
from train.memories import MemoryTrainee, generic_block, generic_config
from train.order import ShuffledOrder
from train.recipe import Recipe, TrainerConfig
from train.store import BlockStore
from train.tokenizer import EOT_ID

# What a stage's numbers come from, beside the recipe: a run goes on only with the same files.
SOURCES = {
    "tokenizer": "tokenizer/tokenizer.json",
    "tree": "tree/tree.safetensors",
    "anchor": "anchor/model.safetensors",
}


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


def _made_from(run: Path, *names: str) -> dict[str, str]:
    return {name: fingerprint(run / SOURCES[name]) for name in names}


def _train_all_weights(
    model: Model, rows: Path, training: TrainerConfig, folder: Path, seed: int, *sources: str
) -> None:
    """Trains ``model`` and leaves it in ``folder``."""
    tokens, name = np.load(rows / "tokens.npy", mmap_mode="r"), folder.name
    made_from = _made_from(folder.parent, *sources)
    trainee = AnchorTrainee(model, tokens, EOT_ID, training)
    train(trainee, ShuffledOrder(len(tokens), training, seed), training, folder, name, made_from)
    _save_anchor(model, folder)


def _save_anchor(model: Model, folder: Path) -> None:
    """Writes ``model`` as an anchor that ``load_anchor`` takes."""
    save_safetensors(folder / "model.safetensors", named_parameters(model))
    config = asdict(model.args) | {"bos_token_id": EOT_ID, "eos_token_id": EOT_ID}
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    parameters = sum(array.size for array in named_parameters(model).values())
    print(f"{folder.name}: {parameters:,} parameters in {folder}")


def run_anchor(recipe: Recipe, folder: Path) -> None:
    model = Model(model_args(recipe))
    initialise(model, recipe.seed)
    rows, training = folder / "anchor-sequences", recipe.anchor.training
    if training is None:
        _save_anchor(model, folder / "anchor")
        return
    _train_all_weights(model, rows, training, folder / "anchor", recipe.seed, "tokenizer")


def run_dense(recipe: Recipe, folder: Path) -> None:
    if recipe.dense is None:
        print("dense: the recipe has none")
        return
    model = _load(folder / "anchor")
    rows, training = folder / "sequences", recipe.dense.training
    _train_all_weights(model, rows, training, folder / "dense", recipe.seed, *SOURCES)


def _load(folder: Path) -> Model:
    model, _ = load_anchor(folder)
    assert isinstance(model, Model)
    return model


def trained_anchor(recipe: Recipe, folder: Path) -> Path:
    """The folder of the anchor that the memories belong to."""
    return folder / ("anchor" if recipe.memories.cotrain is None else "memories")


def _store(recipe: Recipe, folder: Path, name: str, readonly: bool = False) -> BlockStore:
    config, size = recipe.memory_config, recipe.memories.cache_bytes
    if name == "generic":
        config = generic_config(config)
    return BlockStore(folder / name / "store", config, recipe.seed, size, readonly=readonly)


def _train_memory(recipe: Recipe, folder: Path, name: str) -> None:
    anchor = _load(folder / "anchor")
    tokens = np.load(folder / "sequences" / "tokens.npy", mmap_mode="r")
    paths = np.load(folder / "sequences" / "paths.npy", mmap_mode="r")
    if name == "generic":
        paths = np.zeros((len(tokens), 1), np.int32)
    training, cotrain = recipe.memories.training, recipe.memories.cotrain
    with _store(recipe, folder, name) as store:
        trainee = MemoryTrainee(anchor, store, tokens, paths, EOT_ID, training, cotrain)
        sources = _made_from(folder, *SOURCES)
        order = ShuffledOrder(len(tokens), training, recipe.seed)
        train(trainee, order, training, folder / name, name, sources)
        if cotrain is not None:
            _save_anchor(anchor, folder / name)
        print(f"{name}: {store.num_touched} blocks trained, in {folder / name}")


def run_memories(recipe: Recipe, folder: Path) -> None:
    _train_memory(recipe, folder, "memories")


def run_generic(recipe: Recipe, folder: Path) -> None:
    if recipe.memories.cotrain is not None:
        print("generic: trained along with the memories")
        return
    _train_memory(recipe, folder, "generic")


def trained_blocks(recipe: Recipe, folder: Path) -> BlockStore:
    """The blocks of the finished stage ``memories``, to read and to close."""
    return _store(recipe, folder, "memories", readonly=True)


def trained_generic(recipe: Recipe, folder: Path) -> np.ndarray:
    """The generic memory, one block of sum(r) rows."""
    if recipe.memories.cotrain is not None:
        with trained_blocks(recipe, folder) as store:
            return generic_block(store)
    with _store(recipe, folder, "generic", readonly=True) as store:
        return store.block(1, 0)
