"""The figures of a study: of each measure of each arm the values of all seeds.

Only the halves of facts and documents that no rate was chosen by are counted.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .file import Study, Sweep
from .results import read_results
from .runs import choice, figure, runs_of, search_of


@dataclass(frozen=True)
class Figure:
    """One number of the table: a value for each seed, and the error of each within its run."""

    values: tuple[float, ...]
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds; of one seed that within its run."""
        if len(self.values) == 1:
            return self.errors[0]
        return float(np.std(self.values, ddof=1) / math.sqrt(len(self.values)))

    def to_dict(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "standard_error": self.error,
            "by_seed": self.values,
            "errors_within": self.errors,
        }


Documents = dict[str, list[float]]  # `nats` and `tokens` of each document


@dataclass(frozen=True)
class Row:
    """One measure of one arm. ``recall`` is in per cent by times stated, None for all facts."""

    arm: str
    measure: str
    label: str
    setting: str | None
    seeds: tuple[int, ...]
    sizes: dict[str, int]
    recall: dict[int | None, Figure]
    perplexity: Figure | None
    documents: tuple[Documents, ...]  # of each seed

    def to_dict(self) -> dict[str, Any]:
        recall = {"all" if t is None else str(t): f.to_dict() for t, f in self.recall.items()}
        return {
            "arm": self.arm,
            "measure": self.measure,
            "label": self.label,
            "set": self.setting,
            "seeds": self.seeds,
            **self.sizes,
            "recall": recall,
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
        }


def collect(study: Study, out: Path, seeds: Collection[int] | None = None) -> list[Row]:
    """The rows that there are figures for, in the order of the study; of ``seeds`` alone, or of all
    that there are."""
    if seeds is None:
        seeds = {seed for arm in study.arms for seed in study.seeds_of(arm)}
    rows = []
    for arm in study.arms:
        runs = runs_of(study, out, seeds, [arm])
        measured = [run for run in runs if run.is_measured and not run.tries]
        for measure in study.arms[arm].measure if measured else ():
            each = ((run.seed, read_results(run.folder, measure)) for run in measured)
            results = {seed: values for seed, values in each if values is not None}
            rows.append(_row(study, arm, measure, measured[0].setting, results))
    return rows


def _row(
    study: Study, arm: str, measure: str, setting: str | None, results: dict[int, dict[str, Any]]
) -> Row:
    each, label = list(results.values()), study.arms[arm].label or arm
    if len(study.arms[arm].measure) > 1:
        label += f", {measure.replace('_', ' ')}"
    sizes = {key: value for key, value in each[0].items() if key.endswith("_parameters")}
    recall: dict[int | None, Figure] = {}
    if "recall" in each[0]:
        tests = [values["recall"]["test"] for values in each]
        for times in [*(bucket["times"] for bucket in tests[0]), None]:
            pairs = [_share(buckets, times) for buckets in tests]
            recall[times] = Figure(*zip(*pairs, strict=True))
    perplexity, documents = None, ()
    if "perplexity" in each[0]:
        tests = [values["perplexity"]["test"] for values in each]
        pairs = [(test["per_token"], test["per_token_error"]) for test in tests]
        perplexity = Figure(*zip(*pairs, strict=True))
        documents = tuple(values["perplexity"]["documents"] for values in each)
    seeds = tuple(results)
    return Row(arm, measure, label, setting, seeds, sizes, recall, perplexity, documents)


def _share(buckets: list[dict[str, int]], times: int | None) -> tuple[float, float]:
    """Per cent right of the facts stated ``times`` times, and the binomial standard error."""
    chosen = [b for b in buckets if times in (None, b["times"])]
    total = sum(b["total"] for b in chosen)
    share = sum(b["right"] for b in chosen) / total
    return 100 * share, 100 * math.sqrt(share * (1 - share) / total)


def leading(study: Study, rows: Iterable[Row]) -> dict[str, Row]:
    """The row of each arm's first measure."""
    return {row.arm: row for row in rows if row.measure == study.arms[row.arm].measure[0]}


def sweep_rows(study: Study, out: Path, sweep: Sweep) -> list[Row]:
    """The first measure of each arm of a sweep, over the seeds that all of them have; none while
    there is only one, which compares nothing."""
    own = [set(study.seeds_of(arm)) for arm in sweep.arms]
    first = leading(study, collect(study, out, set.intersection(*own)))
    rows = [first[arm] for arm in sweep.arms if arm in first]
    return rows if len(rows) > 1 else []


def searches(study: Study, out: Path) -> list[dict[str, Any]]:
    """Of each finished search what was tried, with what figure, and what was chosen."""
    found = []
    for arm in study.arms:
        runs = search_of(study, out, arm)
        if best := choice(runs, study.choose_by):
            tried = {str(run.setting): figure(run, study.choose_by) for run in runs}
            found.append({"arm": arm, "tried": tried, "chosen": best.setting})
    return found
