"""One job per subtree: the blocks below one cluster of level 1, trained apart and merged later.

On a frozen anchor a step changes nothing but the blocks of its own subtree, and each subtree has
its own stream of sequences and its own schedule (:class:`train.data.order.SubtreeOrder`). So jobs
on several machines that never speak with each other, merged by :mod:`.merge`, give the bits of one
job. They need the finished stages before ``memories`` at hand: copies of one run folder.
"""

from pathlib import Path

import numpy as np

from mlx_hmem.errors import UserError

from ..loop.arms import sequences, train_memory
from ..loop.log import UNWATCHED, Watching
from ..ranks import Ranks
from ..recipe.recipe import Recipe
from ..stages import STAGES, alone, check_needs, is_done


def subtree_name(subtree: int) -> str:
    """The folder of a subtree's job within the run, also the name of what it trains."""
    return f"memories/subtree-{subtree:02d}"


def check_subtrees(recipe: Recipe) -> None:
    """Raises UserError unless the memories of the recipe can be trained by subtree."""
    if recipe.anchor_only:
        raise UserError(
            "there are no subtrees to train", "the recipe trains an anchor alone", "use another"
        )
    if not recipe.memories.group_by_subtree:
        raise UserError(
            "subtrees cannot be trained apart",
            "memories.group_by_subtree is false",
            "set it to true in the recipe, for all arms of the run",
        )
    if recipe.memories.cotrain is not None:
        raise UserError(
            "subtrees cannot be trained apart with co-training",
            "memories.cotrain trains one anchor for all of them",
            "train without --subtree, or with a frozen anchor",
        )


def run_subtree(recipe: Recipe, folder: Path, subtree: int, watching: Watching = UNWATCHED) -> None:
    """Trains the blocks below cluster ``subtree`` of level 1 into a store of their own."""
    check_subtrees(recipe)
    if not 0 <= subtree < recipe.tree.branching[0]:
        raise UserError(
            "there is no such subtree", subtree, f"use 0 to {recipe.tree.branching[0] - 1}"
        )
    ranks = Ranks.meet(folder)
    if ranks.size > 1:
        remedy = "start it without mlx.launch"
        raise UserError("a subtree is trained by one process", f"{ranks.size} ranks", remedy)
    stage = STAGES["memories"]
    if is_done(stage, recipe, folder):
        print(f"memories: done before, in {folder / stage.name}")
        return
    check_needs(stage, recipe, folder)
    name = subtree_name(subtree)
    if not np.any(sequences(folder)[1][:, 0] == subtree):
        print(f"{name}: no sequence belongs to it, nothing to train")
        return
    with alone(f"training of {name}", folder / name):
        train_memory(recipe, folder, name, ranks, watching, subtree)
