"""The stages that train: the anchor, then the arms that start from it and see the same rows.

``memories`` and ``generic`` train blocks on the frozen anchor. With ``memories.cotrain`` the stage
``memories`` trains anchor, memories and generic memory together, and ``generic`` has nothing to do.
``dense`` trains the anchor itself on the same sequences in the same order, to compare with. Each
arm leaves its result in its own folder and can run in a process of its own.
"""

from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_hmem.anchors.load import read_config
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint

from ..data.arrays import load_mapped
from ..data.buckets import Buckets
from ..data.order import BucketOrder, Order, ShuffledOrder, SubtreeOrder
from ..data.tokenizer import eot_of
from ..ranks import Ranks
from ..recipe.recipe import Recipe, TrainerConfig
from ..step.anchor import AnchorTrainee
from ..step.memories import MemoryTrainee, generic_block, generic_config
from ..step.start import save_anchor, sound_anchor, starting_anchor, take_anchor, trainable_anchor
from ..store.blocks import BlockStore
from ..store.sound import check_store
from .log import Watching
from .loop import train
from .validation import validation_of_anchor, validation_of_memory

# What a stage's numbers come from, beside the recipe: a run goes on only with the same files.
SOURCES = {
    "tokenizer": "tokenizer/tokenizer.json",
    "tree": "tree/tree.safetensors",
    "anchor": "anchor/model*.safetensors",
    "sequences": "sequences/*.npy",
}
OF_ANCHOR = {"tokenizer": SOURCES["tokenizer"], "sequences": "anchor-sequences/*.npy"}


def made_from(run: Path, sources: dict[str, str] = SOURCES) -> dict[str, str]:
    """Fingerprints of what a stage's numbers come from."""
    return {name: fingerprint(*sorted(run.glob(files))) for name, files in sources.items()}


def _train_all_weights(
    model: nn.Module,
    config: dict[str, Any],
    tokens: np.ndarray | Buckets,
    order: Order,
    training: TrainerConfig,
    folder: Path,
    context: int,
    ranks: Ranks,
    watching: Watching,
    sources: dict[str, str],
) -> None:
    """Trains ``model`` and leaves it in ``folder``."""
    files = made_from(folder.parent, sources)
    validate = validation_of_anchor(folder.parent, training, context, model)
    trainee = AnchorTrainee(model, tokens, eot_of(folder.parent), training, ranks)
    train(trainee, order, training, folder, folder.name, files, validate, watching)
    if ranks.first:
        save_anchor(model, config, folder)


def run_anchor(recipe: Recipe, folder: Path, ranks: Ranks, watching: Watching) -> None:
    training, out = recipe.anchor.training, folder / "anchor"
    if training is None:
        if ranks.first and recipe.anchor.path is not None:
            take_anchor(recipe.anchor.path, out)
        elif ranks.first:
            save_anchor(*starting_anchor(recipe, eot_of(folder)), out)
        return
    model, config = starting_anchor(recipe, eot_of(folder))
    tokens, order = anchor_sequences(recipe, folder, training)
    context = recipe.windows.of_anchor
    _train_all_weights(
        model, config, tokens, order, training, out, context, ranks, watching, OF_ANCHOR
    )


def anchor_sequences(
    recipe: Recipe, folder: Path, training: TrainerConfig
) -> tuple[np.ndarray | Buckets, Order]:
    """What the anchor is trained on, and in which order."""
    files = folder / "anchor-sequences"
    if recipe.windows.decompose:
        buckets = Buckets.load(files, recipe.windows.of_anchor)
        return buckets, BucketOrder(buckets.counts, training, recipe.seed)
    tokens = load_mapped(files / "tokens.npy")
    return tokens, ShuffledOrder(len(tokens), training, recipe.seed)


def run_dense(recipe: Recipe, folder: Path, ranks: Ranks, watching: Watching) -> None:
    if recipe.dense is None:
        print("dense: the recipe has none")
        return
    model, config = trainable_anchor(folder / "anchor"), read_config(folder / "anchor")
    training = recipe.dense.training
    tokens, paths = sequences(folder)
    order = arm_order(recipe, paths, training)
    out, context = folder / "dense", recipe.windows.context
    _train_all_weights(
        model, config, tokens, order, training, out, context, ranks, watching, SOURCES
    )


def sequences(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and cluster paths of the sequences that all arms see."""
    tokens, paths = (folder / "sequences" / f"{name}.npy" for name in ("tokens", "paths"))
    return load_mapped(tokens), load_mapped(paths)


def arm_order(recipe: Recipe, paths: np.ndarray, training: TrainerConfig) -> Order:
    """The order of the sequences, the same in all arms."""
    if not recipe.memories.group_by_subtree:
        return ShuffledOrder(len(paths), training, recipe.seed)
    return SubtreeOrder(paths[:, 0], training, recipe.seed, one_schedule=True)


def subtree_order(recipe: Recipe, paths: np.ndarray, subtree: int | None = None) -> SubtreeOrder:
    return SubtreeOrder(paths[:, 0], recipe.memories.training, recipe.seed, subtree)


def trained_anchor(recipe: Recipe, folder: Path) -> Path:
    """The folder of the anchor that the memories belong to."""
    alone = recipe.anchor_only or recipe.memories.cotrain is None
    return folder / ("anchor" if alone else "memories")


def open_store(
    recipe: Recipe, folder: Path, name: str, readonly: bool = False, own: str = "store"
) -> BlockStore:
    config, memories = recipe.memory_config, recipe.memories
    check_store(folder / name / own)
    if name == "generic":
        config = generic_config(config)
    return BlockStore(
        folder / name / own,
        config,
        recipe.seed,
        memories.cache_bytes,
        readonly=readonly,
        cache_level_1=memories.cache_level_1,
    )


def train_memory(
    recipe: Recipe,
    folder: Path,
    name: str,
    ranks: Ranks,
    watching: Watching,
    subtree: int | None = None,
) -> None:
    """Trains the arm ``name`` in its folder of the run, or its part for a cluster of level 1."""
    training, cotrain = recipe.memories.training, recipe.memories.cotrain
    if cotrain is None:
        anchor = sound_anchor(folder / "anchor")
    else:
        anchor = trainable_anchor(folder / "anchor")
    eot, (tokens, paths) = eot_of(folder), sequences(folder)
    order: Order
    if name != "generic" and cotrain is None and recipe.memories.group_by_subtree:
        # Blocks on a frozen anchor follow the schedule of their subtree, trained apart or not.
        order = subtree_order(recipe, paths, subtree)
    else:
        order = arm_order(recipe, paths, training)
    if name == "generic":
        paths = np.zeros((len(tokens), 1), np.int32)
    own = "store" if ranks.first else f"store-rank-{ranks.rank}"
    grouped = recipe.memories.group_by_subtree
    with open_store(recipe, folder, name, own=own) as store:
        trainee = MemoryTrainee(
            anchor, store, tokens, paths, eot, training, cotrain, ranks, subtree, grouped=grouped
        )
        sources = made_from(folder)
        validate = validation_of_memory(folder, recipe, name, anchor, trainee)
        train(trainee, order, training, folder / name, name, sources, validate, watching)
        if cotrain is not None and ranks.first:
            save_anchor(anchor, read_config(folder / "anchor"), folder / name)
        print(f"{name}: {len(store.touched())} blocks trained, in {folder / name}")


def run_memories(recipe: Recipe, folder: Path, ranks: Ranks, watching: Watching) -> None:
    if apart := sorted((folder / "memories").glob("subtree-*")):
        raise UserError(
            "subtrees of this run are trained apart",
            ", ".join(map(str, apart)),
            "put them together with mlx_hmem.train merge, or train all in another --out",
        )
    train_memory(recipe, folder, "memories", ranks, watching)


def run_generic(recipe: Recipe, folder: Path, ranks: Ranks, watching: Watching) -> None:
    if recipe.memories.cotrain is not None:
        print("generic: trained along with the memories")
        return
    train_memory(recipe, folder, "generic", ranks, watching)


def trained_blocks(recipe: Recipe, folder: Path) -> BlockStore:
    """The blocks of the finished stage ``memories``, to read and to close."""
    return open_store(recipe, folder, "memories", readonly=True)


def trained_generic(recipe: Recipe, folder: Path) -> np.ndarray:
    """The generic memory, one block of sum(r) rows."""
    if recipe.memories.cotrain is not None:
        with trained_blocks(recipe, folder) as store:
            return generic_block(store)
    with open_store(recipe, folder, "generic", readonly=True) as store:
        return store.block(1, 0)
