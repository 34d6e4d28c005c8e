"""``--plan``: the runs of a study that are missing, and how long their trainings take.

A step of each kind and size is measured once, on random tokens. How many steps there are is known
when a run of the study has its sequences; until then the time is a question mark.
"""

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mlx_hmem.evaluate.tables import table

from ..cost.costs import anchor_sizes_of, check_memory, context_of, has_memory, trainings_of
from ..cost.plan import seconds_per_step, sequences_of
from ..stages import identity, identity_made, stages_of
from .file import Study
from .runs import Run, choice, runs_of, search_of


def print_plan(study: Study, out: Path, seeds: Collection[int], arms: Collection[str]) -> None:
    """Prints a line per run: what it trains itself, and for how many minutes."""
    runs = [*runs_of(study, out, seeds, arms), *_later(study, out, seeds, arms)]
    made = {(run.seed, key) for run in runs for key in _made(out / str(run.seed))}
    timed: dict[Any, float] = {}
    total, lines = 0.0, [["run", "trains", "minutes"]]
    for run in runs:
        names, minutes = [], 0.0
        for name in run.stages():
            key = run.seed, (name, identity(stages_of(run.recipe)[name], run.recipe))
            if key in made:
                continue
            made.add(key)
            if name in trainings_of(run.recipe):
                names.append(name)
                minutes += _minutes(run, name, timed)
        total += minutes
        lines.append([run.title, ", ".join(names) or "–", _text(minutes) if names else "–"])
    print(table(lines))
    print(f"{_text(total)} minutes of training on this machine, as busy as it is now")
    if math.isnan(total):
        print("the minutes are known when a run of the study has its sequences")


def _later(study: Study, out: Path, seeds: Collection[int], arms: Collection[str]) -> list[Run]:
    """The runs of the other seeds of arms whose rate is not chosen yet, with one of the rates."""
    runs = []
    for arm in arms:
        search = search_of(study, out, arm)
        if search and choice(search, study.choose_by) is None:
            others = [s for s in study.seeds_of(arm) if s in seeds and s != study.seeds[0]]
            runs += [Run(study, out, seed, arm, search[0].setting) for seed in others]
    return runs


def _text(minutes: float) -> str:
    return "?" if math.isnan(minutes) else f"{minutes:.0f}"


def _made(seed: Path) -> set[tuple[str, str]]:
    """The stages that runs in the folder of a seed have finished."""
    made = ((done.parent.name, identity_made(done.parent)) for done in seed.glob("*/*/done.json"))
    return {(name, key) for name, key in made if key is not None}


def _minutes(run: Run, name: str, timed: dict[Any, float]) -> float:
    """NaN where the number of sequences is not known yet."""
    recipe, rows = run.recipe, 0
    for sequences in run.out.glob("*/*/sequences/done.json"):
        first, others, _ = sequences_of(recipe, sequences.parents[1], None)
        rows = first if name == "anchor" else others
        break
    training = trainings_of(recipe)[name]
    if not rows and training.steps is None:
        return math.nan
    memory = recipe.memory_config if has_memory(name) else None
    sizes = (
        anchor_sizes_of(recipe),
        memory,
        context_of(recipe, name),
        training.batch_size,
        name if memory else "",
        recipe.memories.cotrain is None,
    )
    if sizes not in timed:
        peak = check_memory(recipe, name, training)
        timed[sizes] = seconds_per_step(recipe, name, training, peak)[0]
    return training.num_steps(rows) * timed[sizes] / 60
