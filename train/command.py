"""``mlx_hmem.train RECIPE.yaml --corpus FOLDER --out runs/NAME``: makes a model from text."""

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mlx_hmem.budget.resident import SIZE_HELP, parse_bytes
from mlx_hmem.errors import ArgumentParser, UserError, run_verb

from .corpus.facts import FACT_KINDS
from .corpus.readers import FOLDER_HELP
from .corpus.stage import run_corpus
from .cost.budget import fit, keep_to
from .loop.log import SERVICES, UNWATCHED, Reporting, Watching
from .parallel.subtrees import run_subtree
from .recipe.keys import help_text
from .recipe.recipe import Recipe, add_recipe_arguments, load_recipe
from .stages import STAGES, run_stages

# Programs of their own, by their first word.
VERBS = {
    "plan": (".cost.plan", "what a recipe makes, takes and lasts"),
    "plot": (".loop.plot", "a picture of a run"),
    "merge": (".parallel.merge", "puts subtrees that were trained apart together"),
    "study": (".study.command", "several arms and seeds of a recipe, with tables and plots"),
    "encoder": (".tree.static_encoder", "distils the static encoder from MiniLM"),
    "remember": (".remember.command", "mlx_hmem.remember"),
    "forget": (".remember.forget", "mlx_hmem.forget"),
}


def main(words: Sequence[str]) -> None:
    if run_verb(words, VERBS, __package__):
        return
    parser = ArgumentParser(
        prog="mlx_hmem.train",
        usage="mlx_hmem.train RECIPE --out FOLDER [options]",
        description="Makes a model with hierarchical memories from text. Finished stages are "
        "skipped, so a stopped run goes on with the same command."
        "\n\nMakes the folder of the run, in it model/, a model directory. Try --out runs/facts "
        "with the recipe facts.yaml.",
        verbs=VERBS,
    )
    add_recipe_arguments(parser)
    parser.add_argument(
        "--help-recipe", action="version", version=help_text(Recipe, FACT_KINDS),
        help="show every key of a recipe, its type, default and meaning, and exit",
    )  # fmt: skip
    parser.add_argument("--corpus", type=Path, help=FOLDER_HELP)
    parser.add_argument(
        "--facts", type=Path, help="JSON table of elements, where corpus.facts has that kind"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only", choices=STAGES, metavar="STAGE", help=f"one stage alone: {', '.join(STAGES)}"
    )
    which.add_argument("--until", choices=STAGES, metavar="STAGE", help="the stages up to this one")
    parser.add_argument(
        "--subtree", type=int, metavar="N", help="with --only memories: train the blocks below "
        "cluster N of level 1 alone, for mlx_hmem.train merge",
    )  # fmt: skip
    parser.add_argument(
        "--report-to", metavar="SERVICE", help=f"logs trainings there too: {' or '.join(SERVICES)}"
    )
    parser.add_argument("--project-name", help="for --report-to (default: the recipe's name)")
    parser.add_argument(
        "--memory-budget", metavar="BYTES", help="chooses settings of the recipe with which the "
        f"stages that train keep to it, {SIZE_HELP}",
    )  # fmt: skip
    args = parser.parse_args(words)
    if args.subtree is not None and args.only != "memories":
        raise UserError("--subtree is for one stage", args.subtree, "add --only memories")

    names = list(STAGES)
    if args.only:
        names = [args.only]
    elif args.until:
        names = names[: names.index(args.until) + 1]
    corpus = functools.partial(run_corpus, corpus=args.corpus, table=args.facts)
    recipe = load_recipe(args.recipe, args.set)
    watching = UNWATCHED
    if args.memory_budget is not None:
        budget = parse_bytes(args.memory_budget)
        recipe, chosen = fit(recipe, budget, names, args.out)
        watching = Watching(check=keep_to(budget))
        print(chosen, file=sys.stderr)
    if args.report_to is not None:
        reporting = Reporting(args.report_to, args.project_name or recipe.name)
        watching = replace(watching, reporting=reporting)
    if args.subtree is not None:
        run_subtree(recipe, args.out, args.subtree, watching)
        return
    run_stages(recipe, args.out, names, {"corpus": corpus}, watching)
