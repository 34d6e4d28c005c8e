"""``mlx_hmem.train merge RECIPE --out RUN``: subtrees that were trained apart become one store.

The blocks of every subtree (``mlx_hmem.train --only memories --subtree N``) are copied into the
store of the stage ``memories``, in one commit, and the stage is done: the same bits as if one job
had trained them all. The stores of the subtrees stay where they are. Memory is bounded by a
transaction of the store; the disk has to hold the blocks twice.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from mlx_hmem.bank.format import Key
from mlx_hmem.errors import ArgumentParser, UserError

from ..data.order import SubtreeOrder
from ..loop.arms import made_from, open_store, sequences, subtree_order, train_memory
from ..loop.log import Watching
from ..loop.loop import identity_of
from ..ranks import Ranks
from ..recipe.recipe import Recipe, add_recipe_arguments, load_recipe
from ..stages import run_stages
from ..step.memories import identity_of_memory
from ..store.blocks import BlockStore
from ..store.checkpoint import Progress, check_identity
from ..store.sound import check_free_space
from .subtrees import check_subtrees, subtree_name


class TrainedSubtree(NamedTuple):
    """The finished store of a subtree."""

    folder: Path
    progress: Progress
    keys: list[Key]


def subtree_folders(folders: list[Path], run: Path) -> list[Path]:
    """The folders of subtrees' jobs in ``run`` and in each of ``folders``: other runs, their
    folders ``memories``, or such a folder itself."""
    found = sorted((run / "memories").glob("subtree-*"))
    for folder in folders:
        inside = sorted([*folder.glob("subtree-*"), *folder.glob("memories/subtree-*")])
        if not inside and (folder / "store").is_dir():
            inside = [folder]
        if not inside:
            remedy = "give the folder of a run or one of its folders memories/subtree-*"
            raise UserError("no subtree was trained here", folder, remedy)
        found += inside
    return [folder for folder in found if (folder / "store" / "data.mdb").exists()]


def read_parts(
    recipe: Recipe, run: Path, order: SubtreeOrder, others: list[Path]
) -> list[TrainedSubtree]:
    """The finished subtree of every level-1 cluster that has sequences, by cluster. Raises
    UserError if one is of another run, not finished, or missing."""
    whole = identity_of(
        "memories", order, recipe.memories.training,
        identity_of_memory(recipe.memory_config, None), made_from(run),
    )  # fmt: skip
    finished: dict[int, TrainedSubtree] = {}
    begun: dict[int, str] = {}
    for folder in subtree_folders(others, run):
        with _open(recipe, folder) as store:
            progress = store.progress()
            if progress is None:
                continue  # killed before its first checkpoint
            found = progress.identity.get("subtree")
            subtree = found if isinstance(found, int) else 0
            wanted = whole | {"stage": subtree_name(subtree), "subtree": subtree}
            check_identity(progress.identity, wanted, folder)
            num_steps = order.steps_of[subtree]
            if progress.step < num_steps:
                begun[subtree] = f"{folder} at step {progress.step} of {num_steps}"
            elif subtree not in finished:
                finished[subtree] = TrainedSubtree(folder, progress, store.touched())
    missing = [subtree for subtree in order.steps_of if subtree not in finished]
    if unfinished := [begun[subtree] for subtree in missing if subtree in begun]:
        remedy = "run mlx_hmem.train with --only memories --subtree for each of them to its end"
        raise UserError("subtrees are not finished", ", ".join(unfinished), remedy)
    if missing:
        remedy = "train each with --only memories --subtree, or give its folder with --from"
        raise UserError("subtrees are missing", ", ".join(map(str, missing)), remedy)
    return [finished[subtree] for subtree in order.steps_of]


def _open(recipe: Recipe, folder: Path) -> BlockStore:
    return open_store(recipe, folder.parent, folder.name, readonly=True)


def merged_progress(order: SubtreeOrder, parts: list[TrainedSubtree]) -> Progress:
    """That of the one job: the curves of the subtrees, in its order."""
    identity = parts[0].progress.identity | {"stage": "memories", "subtree": None}
    curves = {
        part.progress.identity["subtree"]: {step: row for step, *row in part.progress.curve}
        for part in parts
    }
    curve = []
    for step in range(order.num_steps):
        subtree, own = order.place(step)
        if (row := curves[subtree].get(own)) is not None:  # else it was skipped
            curve.append((step, row[0], row[1]))
    return Progress(identity, order.num_steps, curve)


def merge_subtrees(
    recipe: Recipe, run: Path, ranks: Ranks, watching: Watching, others: list[Path]
) -> None:
    """Fills the store of the stage ``memories`` and ends the stage."""
    order = subtree_order(recipe, sequences(run)[1])
    parts = read_parts(recipe, run, order, others)
    with open_store(recipe, run, "memories") as store:
        progress = store.progress()
        if progress is not None and progress.step < order.num_steps:
            raise UserError(
                f"{store.folder} holds an unfinished training of all subtrees",
                f"step {progress.step} of {order.num_steps}",
                "go on with mlx_hmem.train, or merge into another --out",
            )
        if progress is None:
            _copy(recipe, store, parts)
            store.commit(merged_progress(order, parts))
    train_memory(recipe, run, "memories", ranks, watching)  # finds nothing left to train
    print(f"merge: {len(parts)} subtrees, {sum(len(p.keys) for p in parts)} blocks, in {run}")


def _copy(recipe: Recipe, store: BlockStore, parts: list[TrainedSubtree]) -> None:
    counts = Counter(level for part in parts for level, _ in part.keys)
    check_free_space(store.folder, sum(n * store.record_bytes(i) for i, n in counts.items()))
    with tqdm(total=counts.total(), desc="merge", unit="block") as bar:
        for part in parts:
            with _open(recipe, part.folder) as source:
                store.take(source, part.keys)
            bar.update(len(part.keys))


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.train merge",
        description="Puts subtrees that were trained apart together, as if one job had trained "
        "them; then mlx_hmem.train goes on with the stages that follow.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--from", dest="others", type=Path, nargs="+", default=[], metavar="FOLDER",
        help="subtrees from other machines: folders of runs, or memories/subtree-* of them",
    )  # fmt: skip
    args = parser.parse_args(words)
    recipe = load_recipe(args.recipe, args.set)
    check_subtrees(recipe)
    merge = functools.partial(merge_subtrees, others=args.others)
    run_stages(recipe, args.out, ["memories"], {"memories": merge})
