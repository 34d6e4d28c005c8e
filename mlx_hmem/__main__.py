"""``mlx_hmem NAME …``: every program under one name; ``mlx_hmem.NAME …`` is the same."""

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_hmem.errors import GO_ON, UserError, nearest, run_program, version


class Program(NamedTuple):
    """``module`` has a ``main`` that takes the words of the command line."""

    module: str
    about: str
    stopped: str = "stopped"  # what Ctrl-C prints


PROGRAMS = {
    "generate": Program("mlx_hmem.generation.command", "a prompt in, text out"),
    "chat": Program("mlx_hmem.generation.chat", "a conversation whose memory follows the topic"),
    "server": Program("mlx_hmem.server.command", "OpenAI's /v1, a memory for each request"),
    "remember": Program("mlx_hmem.train.remember.command", "teach a model your documents", GO_ON),
    "forget": Program("mlx_hmem.train.remember.forget", "and make it forget one of them", GO_ON),
    "bank": Program("mlx_hmem.bank_tools.command", "look into a bank, bar, join and split it"),
    "convert": Program("mlx_hmem.convert.command", "checkpoints in and out, fewer bits", GO_ON),
    "train": Program("mlx_hmem.train.command", "make a model from text by a recipe", GO_ON),
    "doctor": Program("mlx_hmem.doctor.command", "is all well on this machine, and how fast is it"),
    "evaluate": Program("mlx_hmem.evaluate.command", "perplexity, facts, benchmark tasks", GO_ON),
}
HELP = "\n".join(
    [
        "usage: mlx_hmem NAME …    or mlx_hmem.NAME …; NAME --help says more, --version which",
        "",
        *(f"  {name:<10}{program.about}" for name, program in PROGRAMS.items()),
    ]
)


def run(name: str, words: Sequence[str]) -> None:
    module = PROGRAMS[name].module
    try:
        main = importlib.import_module(module).main
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or module):
            raise
        here = Path(__file__).parent.parent
        remedy = f"pip install -e {here}"  # until then it lies beside mlx_hmem
        raise UserError(f"{error.name} is not installed", here, remedy) from None
    main(list(words))


def main() -> None:
    """``mlx_hmem NAME …``"""
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(HELP)
    elif name == "--version":
        print(version())
    elif name in PROGRAMS:
        run_program(functools.partial(run, name, words), PROGRAMS[name].stopped)
    else:
        raise UserError("no such program", name, nearest(name, PROGRAMS))


def script() -> None:
    """``mlx_hmem`` and ``mlx_hmem.NAME``: the installed script's own name says which."""
    sys.argv[:1] = Path(sys.argv[0]).name.split(".", 1)
    run_program(main)


if __name__ == "__main__":
    run_program(main)
