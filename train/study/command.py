"""``mlx_hmem.train study STUDY.yaml --out runs/small``: several arms, several seeds, one table.

Every arm is the study's recipe with a few keys set anew (:mod:`train.study.file`). What arms have
in common is made once. A stopped study goes on with the same command; the same command in a second
shell shares the work. At the end ``table.txt``, ``results.json`` and the plots are in the folder.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.folders import locked

from ..corpus.readers import FOLDER_HELP
from .file import load_study
from .plan import print_plan
from .plot import plot_study
from .rows import collect
from .runs import make_all
from .table import write_tables


def _chosen(option: str, text: str | None, known: Iterable[Any]) -> list[Any]:
    """Those of ``known`` that the option's text names; all of them without it."""
    names = {str(each): each for each in known}
    parts = list(names) if text is None else [part.strip() for part in text.split(",")]
    if odd := [part for part in parts if part not in names]:
        remedy = f"use some of {', '.join(names)}"
        raise UserError(f"{option} has one that the study has not", odd[0], remedy)
    return [names[part] for part in parts]


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.train study",
        description="Makes a recipe in several arms with several seeds, measures them and draws up "
        "tables and plots. Stopped, it goes on with the same command; the same command in a second "
        "shell shares the work.",
    )
    parser.add_argument("study", type=Path, help="YAML file, or small/facts.yaml, small/text.yaml")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    parser.add_argument("--corpus", type=Path, help=FOLDER_HELP)
    parser.add_argument("--facts", type=Path, help="as of mlx_hmem.train")
    parser.add_argument("--seeds", help="some of the study's, with commas")
    parser.add_argument("--arms", help="some of the study's, with commas")
    parser.add_argument("--plan", action="store_true", help="say what is to be done, and how long")
    args = parser.parse_args(words)
    study = load_study(args.study)
    known = sorted({*study.seeds, *(s for arm in study.arms for s in study.seeds_of(arm))})
    seeds = _chosen("--seeds", args.seeds, known)
    arms = _chosen("--arms", args.arms, study.arms)
    if args.plan:
        print_plan(study, args.out, seeds, arms)
        return
    make_all(study, args.out, seeds, arms, args.corpus, args.facts)
    waiting = "waiting for another process that writes the tables"
    with locked(args.out / "study.lock", wait=waiting):
        rows = collect(study, args.out)
        print("\n" + write_tables(study, args.out, rows))
        plot_study(study, args.out, rows)
    print(f"study: table.txt, results.json and the plots are in {args.out}")
