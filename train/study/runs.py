"""The runs of a study: one for each seed and arm, and for each rate that is tried.

``OUT/SEED/ARM`` is an ordinary run folder, ``OUT/SEED/ARM@RATE`` that of an arm whose learning rate
is searched for. A stage that another run of the seed has made with the same recipe is taken from
it, as hard links. Several processes with the same command share the work: each takes runs that no
other has, and waits for a stage that another is making. The locks die with their process.
"""

import functools
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hmem.folders import locked

from ..corpus.stage import run_corpus
from ..recipe.recipe import Recipe
from ..stages import ANCHOR_STAGES, identity, is_done, run_stages, stages_of, take_stage
from .file import Study
from .results import chosen_by, measure_run, memories_of, read_results

POLL = 2.0  # seconds between looks at what another process is doing


@dataclass(frozen=True)
class Run:
    """One folder of a study; ``setting`` is its rate, as a ``set`` value. One that only ``tries``
    the rate is measured by what the rate is chosen by, and no more."""

    study: Study
    out: Path
    seed: int
    arm: str
    setting: str | None
    tries: bool = False

    @property
    def folder(self) -> Path:
        rate = "" if self.setting is None else "@" + self.setting.partition("=")[2]
        return self.out / str(self.seed) / f"{self.arm}{rate}"

    @property
    def title(self) -> str:
        return f"seed {self.seed}, {self.folder.name}{', a trial' if self.tries else ''}"

    @property
    def measures(self) -> tuple[str, ...]:
        measures: tuple[str, ...] = self.study.arms[self.arm].measure
        return measures[:1] if self.tries else measures

    @property
    def is_measured(self) -> bool:
        return all(read_results(self.folder, m) is not None for m in self.measures)

    @functools.cached_property
    def recipe(self) -> Recipe:
        return self.study.recipe_of(self.arm, self.seed, self.setting)

    def stages(self) -> list[str]:
        """The stages that its measures need."""
        memories = memories_of(self.recipe, self.measures)
        names = [*ANCHOR_STAGES]
        if memories or "dense" in self.measures:
            names += ["tree", "sequences", *memories]
        return names + (["dense"] if "dense" in self.measures else [])


def runs_of(study: Study, out: Path, seeds: Collection[int], arms: Collection[str]) -> list[Run]:
    """The runs that can be said so far: an arm whose search is not finished has only the runs of
    its search, which all try a rate."""
    runs: list[Run] = []
    for arm in study.arms:
        own = [seed for seed in study.seeds_of(arm) if seed in seeds]
        if arm not in arms or not own:
            continue
        search = search_of(study, out, arm)
        best = choice(search, study.choose_by)
        if search and best is None:
            runs += search
        else:
            setting = best.setting if best else None
            runs += [Run(study, out, seed, arm, setting) for seed in own]
    order = list(dict.fromkeys(run.seed for run in runs))
    return sorted(runs, key=lambda run: order.index(run.seed))


def search_of(study: Study, out: Path, arm: str) -> list[Run]:
    """The runs that an arm's learning rate is chosen from."""
    settings = study.arms[arm].settings
    return [Run(study, out, study.seeds[0], arm, setting, tries=True) for setting in settings]


def choice(search: list[Run], choose_by: str) -> Run | None:
    """The best run of a search by its first measure; None while one is not measured, and without
    a search. Of equals the first."""
    if not all(run.is_measured for run in search):
        return None
    return max(search, key=lambda run: figure(run, choose_by), default=None)


def figure(run: Run, choose_by: str) -> float:
    results = read_results(run.folder, run.measures[0])
    assert results is not None, "is_measured says so"
    return chosen_by(results, choose_by)


def make_run(run: Run, functions: dict[str, Callable[..., None]]) -> None:
    """Makes what is missing of a run, and measures it."""
    recipe, folder = run.recipe, run.folder
    stages, taken = stages_of(recipe), []
    for name in run.stages():
        stage = stages[name]
        if is_done(stage, recipe, folder):
            continue
        lock = folder.parent / ".making" / f"{name}-{identity(stage, recipe)[:16]}"
        with locked(lock, wait=f"{name}: another process is making it; waiting"):
            others = {path.parent for path in folder.parent.glob("*/" + name)} - {folder}
            if take_stage(stage, recipe, folder, sorted(others)):
                taken.append(name)
                continue
            if taken:
                print(f"taken from other arms: {', '.join(taken)}", flush=True)
                taken = []
            run_stages(recipe, folder, [name], functions)
    measure_run(recipe, folder, run.measures)


def make_all(
    study: Study,
    out: Path,
    seeds: Collection[int],
    arms: Collection[str],
    corpus: Path | None = None,
    table: Path | None = None,
) -> None:
    """Makes all runs of the study, along with other processes that do the same."""
    make_corpus: Any = functools.partial(run_corpus, corpus=corpus, table=table)
    done: set[tuple[Path, bool]] = set()
    told = False
    while True:
        runs = runs_of(study, out, seeds, arms)
        todo = [run for run in runs if (run.folder, run.tries) not in done]
        if not todo and not any(run.tries for run in runs):
            return
        for run in todo:
            with locked(run.folder / "study.lock") as got:
                if got is None:
                    continue
                state = "done before" if run.is_measured else "begins"
                print(f"{run.title}: {state}, {len(todo) - 1} more runs", flush=True)
                make_run(run, {"corpus": make_corpus})
                done.add((run.folder, run.tries))
                told = False
                break
        else:
            if not told:
                print("waiting for the runs of other processes", flush=True)
            told = True
            time.sleep(POLL)
