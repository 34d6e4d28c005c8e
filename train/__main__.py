"""``python -m train RECIPE.yaml --corpus FOLDER --out runs/NAME``: makes a model from text."""

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from mlx_hmem.budget.resident import SIZE_HELP, parse_bytes
from mlx_hmem.errors import ArgumentParser, UserError, run_program

from .corpus.readers import FOLDER_HELP
from .corpus.stage import run_corpus
from .cost.budget import fit, keep_to
from .loop.log import SERVICES, Reporting
from .parallel.subtrees import run_subtree
from .recipe.recipe import add_recipe_arguments, load_recipe
from .stages import STAGES, run_stages


def main() -> None:
    if sys.argv[1:2] == ["remember"]:
        from .remember.command import main as remember

        return remember(sys.argv[2:])
    parser = ArgumentParser(
        prog="python -m train",
        description="Makes a model with hierarchical memories from text. Finished stages are "
        "skipped, so a stopped run goes on with the same command.",
    )
    add_recipe_arguments(parser)
    parser.add_argument("--corpus", type=Path, help=FOLDER_HELP)
    parser.add_argument(
        "--facts", type=Path, help="JSON table of elements, where corpus.facts has that kind"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=STAGES, help="run this stage alone")
    which.add_argument("--until", choices=STAGES, help="stop after this stage")
    parser.add_argument(
        "--subtree", type=int, metavar="N", help="with --only memories: train the blocks below "
        "cluster N of level 1 alone, for python -m train merge",
    )  # fmt: skip
    parser.add_argument(
        "--report-to", metavar="SERVICE", help=f"logs trainings there too: {' or '.join(SERVICES)}"
    )
    parser.add_argument("--project-name", help="for --report-to (default: the recipe's name)")
    parser.add_argument(
        "--memory-budget", metavar="BYTES", help="chooses settings of the recipe with which the "
        f"stages that train keep to it, {SIZE_HELP}",
    )  # fmt: skip
    args = parser.parse_args()
    if args.subtree is not None and args.only != "memories":
        raise UserError("--subtree is for one stage", args.subtree, "add --only memories")

    names = list(STAGES)
    if args.only:
        names = [args.only]
    elif args.until:
        names = names[: names.index(args.until) + 1]
    corpus = functools.partial(run_corpus, corpus=args.corpus, table=args.facts)
    recipe = load_recipe(args.recipe, args.set)
    if args.memory_budget is not None:
        budget = parse_bytes(args.memory_budget)
        recipe, chosen = fit(recipe, budget, names, args.out)
        keep_to(budget)
        print(chosen, file=sys.stderr)
    functions: dict[str, Callable[..., None]] = {"corpus": corpus}
    reporting = None
    if args.report_to is not None:
        reporting = Reporting(args.report_to, args.project_name or recipe.name)
    if args.subtree is not None:
        run_subtree(recipe, args.out, args.subtree, reporting)
        return None
    if reporting is not None:
        for name in names:
            if STAGES[name].trains:
                function: Callable[..., None] = STAGES[name].load()
                functions[name] = functools.partial(function, reporting=reporting)
    run_stages(recipe, args.out, names, functions)
    return None


if __name__ == "__main__":
    run_program(main, "stopped; run the same command again to go on where it was")
