"""The stages of a run: their order, what each depends on, and the marker that one is done.

A run's folder holds one folder per stage. ``done.json`` in it is written last and records the parts
of the recipe that the stage and all before it used: a finished stage is skipped, and a recipe that
changed under a finished stage is refused rather than mixed with it.
"""

import contextlib
import fcntl
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hmem.config import read_json
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from train.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """``function`` is `module:name` with the signature ``(recipe, folder) -> None``; the module is
    imported when the stage runs. ``needs`` are the stages whose files it reads."""

    name: str
    function: str
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def load(self) -> Callable[[Recipe, Path], None]:
        module, name = self.function.split(":")
        function: Callable[[Recipe, Path], None] = getattr(importlib.import_module(module), name)
        return function


STAGES = {
    stage.name: stage
    for stage in (
        Stage("corpus", "train.corpus:run_corpus", ("seed", "corpus")),
        Stage("tokenizer", "train.tokenizer:run_tokenizer", ("tokenizer",), ("corpus",)),
        Stage("windows", "train.windows:run_windows", ("windows",), ("tokenizer",)),
        Stage("anchor-sequences", "train.sequences:run_anchor_sequences", (), ("windows",)),
        Stage("anchor", "train.arms:run_anchor", ("anchor",), ("anchor-sequences",)),
        Stage("tree", "train.tree:run_tree", ("tree",), ("windows",)),
        Stage("sequences", "train.sequences:run_sequences", (), ("tree",)),
        Stage("memories", "train.arms:run_memories", ("memories",), ("anchor", "sequences")),
        Stage("generic", "train.arms:run_generic", ("memories",), ("anchor", "sequences")),
        Stage("dense", "train.arms:run_dense", ("dense",), ("anchor", "sequences")),
        Stage("export", "train.export:run_export", ("name", "export"), ("memories", "generic")),
        Stage("report", "train.report:run_report", (), ("export", "dense")),
    )
}


def _sections(stage: Stage) -> set[str]:
    """The parts of the recipe that the stage depends on, by itself or by what it reads."""
    return set(stage.sections).union(*(_sections(STAGES[name]) for name in stage.needs))


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def is_done(stage: Stage, recipe: Recipe, folder: Path) -> bool:
    """Whether the stage is finished; one that was made with another recipe is refused."""
    path = folder / stage.name / "done.json"
    if not path.exists():
        return False
    wanted = recipe.sections(sorted(_sections(stage)))
    done = read_json(path)
    if done.get("hash") == _digest(wanted):
        return True
    made_with = done.get("recipe", {})
    changed = [name for name in wanted if _digest(wanted[name]) != _digest(made_with.get(name))]
    raise UserError(
        f"stage {stage.name} in {folder} was made with another recipe",
        f"changed: {', '.join(changed) or 'the stages'}",
        f"give another --out, or delete {folder / stage.name} and the stages after it",
    )


def mark_done(stage: Stage, recipe: Recipe, folder: Path) -> None:
    wanted = recipe.sections(sorted(_sections(stage)))
    values = {"stage": stage.name, "hash": _digest(wanted), "recipe": wanted}
    write_atomic(folder / stage.name / "done.json", json.dumps(values, indent=2) + "\n")


@contextlib.contextmanager
def _alone(stage: Stage, folder: Path) -> Iterator[None]:
    """One process per stage; the lock dies with its process."""
    with (folder / stage.name / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"stage {stage.name} is running in another process",
                folder,
                "wait for it, or stop it first",
            ) from None
        yield


def run_stages(
    recipe: Recipe,
    folder: Path,
    names: list[str],
    functions: dict[str, Callable[[Recipe, Path], None]] | None = None,
) -> None:
    """Runs the named stages in order, skipping those that are done.

    ``functions`` stand in for the stages' own; ``__main__`` binds the corpus folder that way.
    """
    for name in names:
        stage = STAGES[name]
        if is_done(stage, recipe, folder):
            print(f"{name}: done before, in {folder / name}")
            continue
        for need in stage.needs:
            if not is_done(STAGES[need], recipe, folder):
                raise UserError(
                    f"stage {name} needs a stage that is not done", need, "run without --only first"
                )
        os.makedirs(folder / name, exist_ok=True)
        with _alone(stage, folder):
            function = (functions or {}).get(name) or stage.load()
            function(recipe, folder)
            mark_done(stage, recipe, folder)
