"""``python -m train RECIPE.yaml --corpus FOLDER --out runs/NAME``: makes a model from text."""

import functools
from pathlib import Path

from mlx_hmem.errors import ArgumentParser, run_program
from train.corpus import run_corpus
from train.readers import FOLDER_HELP
from train.recipe import load_recipe
from train.stages import STAGES, run_stages


def main() -> None:
    parser = ArgumentParser(
        prog="python -m train",
        description="Makes a model with hierarchical memories from text. Finished stages are "
        "skipped, so a stopped run goes on with the same command.",
    )
    parser.add_argument("recipe", type=Path, help="YAML file, see train/recipes")
    parser.add_argument("--corpus", type=Path, help=FOLDER_HELP)
    parser.add_argument(
        "--facts", type=Path, help="JSON table of elements, where corpus.facts has that kind"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=STAGES, help="run this stage alone")
    which.add_argument("--until", choices=STAGES, help="stop after this stage")
    args = parser.parse_args()

    names = list(STAGES)
    if args.only:
        names = [args.only]
    elif args.until:
        names = names[: names.index(args.until) + 1]
    corpus = functools.partial(run_corpus, corpus=args.corpus, table=args.facts)
    run_stages(load_recipe(args.recipe), args.out, names, {"corpus": corpus})


if __name__ == "__main__":
    run_program(main, "stopped; run the same command again to go on where it was")
