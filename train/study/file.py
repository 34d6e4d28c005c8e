"""A study: one recipe and the arms that are compared, each a few keys of it set anew.

The file is YAML. ``rates`` is the learning-rate search of an arm: one key of the recipe and the
values that are tried with the study's first seed. What an arm is chosen by is never what the
tables show: facts and held-out documents are dealt into two halves, one to choose by and one to
show (:mod:`train.study.results`).
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError

from ..recipe.keys import NEEDED, check_keys, key
from ..recipe.recipe import Recipe, load_recipe, read_yaml

CHOOSE_BY = ("recall", "perplexity")
FETCHED = ("fetched", "oracle", "random", "first_sentence")
MEASURES = ("none", "dense", "generic", *FETCHED)
AXES = ("fetched_parameters", "bank_parameters")


@dataclass(frozen=True)
class Arm(JsonConfig):
    measure: tuple[str, ...] = key(
        NEEDED, f"rows of the table, of {', '.join(MEASURES)}; the first one chooses"
    )
    label: str = key("", "its name in tables; default: its key")
    set: tuple[str, ...] = key((), "keys of the recipe set anew, as --set takes them")
    rates: dict[str, Any] = key(dict, "one key and the values to choose from")
    seeds: tuple[int, ...] | None = key(None, "null: those of the study")

    def __post_init__(self) -> None:
        check_keys(self, "")
        unknown = [m for m in self.measure if m not in MEASURES]
        if unknown or not self.measure:
            known = ", ".join(MEASURES)
            raise UserError("unknown `measure` of an arm", unknown, f"use some of {known}")
        rates = self.rates.values() if isinstance(self.rates, dict) else ()
        if self.rates and not (len(rates) == 1 and all(isinstance(r, list) and r for r in rates)):
            raise UserError("`rates` of an arm", self.rates, "give one KEY: [VALUE, …]")

    @property
    def settings(self) -> list[str]:
        """The ``set`` values of the search, one for each rate; empty without a search."""
        return [f"{key}={value}" for key, values in self.rates.items() for value in values]


@dataclass(frozen=True)
class Sweep(JsonConfig):
    """Arms that are drawn side by side: the first measure of each."""

    name: str
    arms: tuple[str, ...]
    x: str | None = key(None, f"axis: one of {AXES}; null: names")

    def __post_init__(self) -> None:
        check_keys(self, "of a sweep, ")
        if self.x not in (None, *AXES):
            raise UserError(f"unknown x of sweep {self.name}", self.x, f"use one of {AXES}")


@dataclass(frozen=True)
class Study(JsonConfig):
    recipe: str = key(NEEDED, "the recipe that all arms begin with, a path from here")
    choose_by: str = key(NEEDED, f"one of {CHOOSE_BY}")
    arms: dict[str, Any] = key(NEEDED, "the arms by name, in the order of the table")
    seeds: tuple[int, ...] = key((0,), "the first one chooses rates")
    against: tuple[str, ...] = key((), "arms that every row's perplexity is compared with in pairs")
    sweeps: tuple[Any, ...] = key((), "arms drawn side by side")

    def __post_init__(self) -> None:
        check_keys(self, "")
        if self.choose_by not in CHOOSE_BY:
            raise UserError("unknown `choose_by`", self.choose_by, f"use one of {CHOOSE_BY}")
        if not isinstance(self.arms, dict) or not self.arms:
            raise UserError("a study without arms", self.arms, "give `arms:`")
        if odd := [name for name in self.arms if not _is_name(name)]:
            raise UserError("not the name of an arm", repr(odd[0]), "use letters, digits, - and .")
        named = [("against", self.against), *((f"sweep {s.name}", s.arms) for s in self.sweeps)]
        for where, names in named:
            if unknown := [name for name in names if name not in self.arms]:
                raise UserError(f"{where} has an unknown arm", unknown[0], "define it")

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        return self.seeds if self.arms[arm].seeds is None else self.arms[arm].seeds

    def recipe_of(self, arm: str, seed: int, setting: str | None = None) -> Recipe:
        """The recipe of one run; ``setting`` is the rate, as a ``set`` value."""
        settings = [*self.arms[arm].set, f"seed={seed}", *([setting] if setting else [])]
        return load_recipe(Path(self.recipe), settings)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name != "" and name.replace("-", "").replace(".", "").isalnum()


def load_study(path: Path) -> Study:
    """Reads and checks a study and the recipe of each arm; UserError if something is wrong."""
    values = read_yaml(path, "study")
    where = str(path)
    if isinstance(values, dict) and isinstance(values.get("arms"), dict):
        arms = {k: Arm.from_dict(v, f"{where}, {k}") for k, v in values["arms"].items()}
        sweeps = values.get("sweeps", [])
        if not isinstance(sweeps, list):
            raise UserError("`sweeps` is not a list", repr(sweeps), "begin each with `- name:`")
        sweeps = [Sweep.from_dict(v, f"{where}, sweeps") for v in sweeps]
        values = values | {"arms": arms, "sweeps": sweeps}
    study = Study.from_dict(values, where)
    study = replace(study, recipe=str(path.parent / study.recipe))
    for name, arm in study.arms.items():
        for setting in arm.settings or [None]:
            try:
                _check_arm(arm, study.recipe_of(name, study.seeds[0], setting))
            except UserError as error:
                raise UserError(f"arm {name}: {error.what}", error.value, error.remedy) from None
    return study


def _check_arm(arm: Arm, recipe: Recipe) -> None:
    """That the recipe of the arm makes what the arm measures."""
    if recipe.anchor_only and arm.measure != ("none",):
        raise UserError("an anchor alone has no memory to measure", arm.measure, "measure none")
    if "dense" in arm.measure and recipe.dense is None:
        raise UserError("`dense` is measured but not trained", "dense null", "give its training")
