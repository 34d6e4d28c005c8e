"""The anchor that a run starts from: of the recipe's sizes, or a model of any architecture that
memory can be attached to (``anchor.path``). In the run's folder both look alike.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_hmem.anchors.load import (
    INDEX,
    anchor_of_config,
    load_anchor,
    named_parameters,
    weight_files,
)
from mlx_hmem.anchors.openlm import Model, ModelArgs
from mlx_hmem.files import save_safetensors, write_atomic
from mlx_hmem.model.find import find_model

from ..recipe.recipe import Recipe
from ..store.checkpoint import check_finite
from .anchor import initialise

MODEL_FILES = ["config.json", "model*.safetensors", INDEX]


def model_args(recipe: Recipe) -> ModelArgs:
    """Those of an anchor of the recipe's sizes."""
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
        max_position_embeddings=recipe.windows.of_anchor,
    )


def anchor_shape(recipe: Recipe) -> nn.Module:
    """An anchor of the right shapes, none of whose arrays is made before it is used."""
    if recipe.anchor.config is not None:
        return anchor_of_config(recipe.anchor.config)
    return Model(model_args(recipe))


def starting_anchor(recipe: Recipe, eot: int) -> tuple[nn.Module, dict[str, Any]]:
    """The anchor before its own training, and its config, for the stage ``anchor``; ``eot`` is the
    end of text of the run's tokenizer."""
    if recipe.anchor.path is not None:
        assert recipe.anchor.config is not None
        return trainable_anchor(find_model(recipe.anchor.path, MODEL_FILES)), recipe.anchor.config
    model = Model(model_args(recipe))
    initialise(model, recipe.seed)
    return model, asdict(model.args) | {"bos_token_id": eot, "eos_token_id": eot}


def trainable_anchor(folder: Path) -> nn.Module:
    """The anchor in float32, whatever it is stored as: small steps are lost in fewer bits."""
    anchor = sound_anchor(folder)
    anchor.set_dtype(mx.float32)
    return anchor


def sound_anchor(folder: Path) -> nn.Module:
    """The anchor in ``folder``. Raises UserError for a weight that is not finite: all that is
    trained with it would be NaN."""
    anchor, _ = load_anchor(folder)
    check_finite(named_parameters(anchor), f"the anchor in {folder}", "use one that is sound")
    return anchor


def save_anchor(model: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Writes ``model`` as an anchor that ``load_anchor`` takes."""
    save_safetensors(folder / "model.safetensors", named_parameters(model))
    write_atomic(folder / "config.json", json.dumps(config, indent=2) + "\n")
    print(f"{folder.name}: {num_parameters(model):,} parameters in {folder}")


def take_anchor(path: str, folder: Path) -> None:
    """Copies the anchor of a model as it is."""
    copy_anchor_files(find_model(path, MODEL_FILES), folder)
    sound_anchor(folder)
    print(f"{folder.name}: that of {path}, in {folder}")


def copy_anchor_files(source: Path, folder: Path) -> None:
    """config.json and weights, in one file or several."""
    for file in (source / "config.json", *weight_files(source), *source.glob(INDEX)):
        shutil.copyfile(file, folder / file.name)


def num_parameters(model: nn.Module) -> int:
    return sum(array.size for array in named_parameters(model).values())
