"""What ``generate`` and ``chat`` are both asked: which model, which memory, sampling."""

import argparse
import sys
from pathlib import Path
from typing import Any

from mlx_hmem.bank.views import barred_path
from mlx_hmem.budget.resident import SIZE_HELP, parse_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.generation.passages import Passages
from mlx_hmem.model.load import load
from mlx_hmem.model.model import MemoryModel


def say(line: str) -> None:
    """To standard error, all but the answers."""
    print(line, file=sys.stderr, flush=True)


def read_input(what: str, one_line: bool = False) -> str:
    """Standard input, or the next line of it; UserError where there is no text for ``what``."""
    if sys.stdin is None:
        raise UserError("standard input is closed", what, "pipe a text into it")
    try:
        return (sys.stdin.buffer.readline() if one_line else sys.stdin.buffer.read()).decode()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text", error, "convert it") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="demo",
        help="folder, Hub id or Hub id@REVISION (default: demo, the bundled model)",
    )
    parser.add_argument(
        "--system-prompt",
        metavar="TEXT",
        help="how the model is to behave; for models with a chat template",
    )
    parser.add_argument(
        "--stop",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="an answer ends before the first of these; \\n is a new line",
    )
    sampling = parser.add_argument_group("sampling (greedy without --temp)")
    sampling.add_argument(
        "--temp", type=float, default=0.0, help="0 is greedy (default), 1 as trained"
    )
    sampling.add_argument(
        "--top-p", type=float, default=1.0, help="from the likeliest tokens of this probability"
    )
    sampling.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="from the N likeliest tokens; 0 is all"
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        help="from the tokens that are this likely, as a part of the likeliest",
    )
    sampling.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--memory",
        choices=("fetched", "generic", "none"),
        help="which memory to attach (default: fetched, but none beside passages)",
    )
    memory.add_argument(
        "--memory-name",
        metavar="NAME",
        help="the memory of this name, instead of the one that the text chooses",
    )
    memory.add_argument(
        "--with-passages",
        type=int,
        metavar="N",
        help="put up to N passages of remembered documents that are near before the prompt",
    )
    memory.add_argument(
        "--run",
        type=Path,
        metavar="FOLDER",
        help="where the text of these lies (default: MODEL.run, as remember made it)",
    )
    memory.add_argument(
        "--block",
        nargs="+",
        default=[],
        metavar="PATH",
        help="clusters that may not be fetched, each as its path: 3 or 3,51, after the name of a "
        "bank that was added: NAME or NAME:3,51",
    )
    memory.add_argument(
        "--view",
        metavar="NAME",
        help="fetch no more than this view of the memory allows (default: default, if there is "
        "one); mlx_hmem.bank block makes views",
    )
    memory.add_argument(
        "--strict-memory",
        action="store_true",
        help="stop at a block that cannot be read (default: go on without it, and say so)",
    )
    machine = add_machine(parser)
    machine.add_argument(
        "--resident-levels",
        type=int,
        nargs="+",
        default=[],
        metavar="LEVEL",
        help="levels whose blocks stay in memory once they are read (1 = coarsest)",
    )
    machine.add_argument(
        "--level-folder",
        nargs="+",
        default=[],
        metavar="LEVEL=FOLDER",
        help="levels of the bank that lie elsewhere, such as on another disk",
    )


def add_machine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What a model may take, in a group of its own, to which more may be added."""
    machine = parser.add_argument_group("memory and disk of this machine")
    machine.add_argument(
        "--memory-budget",
        metavar="BYTES",
        help=f"most bytes to take, {SIZE_HELP}. What is chosen for it is said in one line",
    )
    machine.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default: those of the anchor)",
    )
    machine.add_argument(
        "--lazy",
        action="store_true",
        help="of a Hub id, fetch the parts of the bank only when they are needed",
    )
    return machine


def level_folder(text: str) -> tuple[int, Path]:
    level, equals, folder = text.partition("=")
    if not (level.isdecimal() and equals and Path(folder).is_dir()):
        raise UserError(
            "--level-folder names no folder", repr(text), "write it as 3=/Volumes/DISK/bank"
        )
    return int(level), Path(folder)


def open_model(args: argparse.Namespace) -> MemoryModel:
    model = load(
        args.model,
        memory_budget=None if args.memory_budget is None else parse_bytes(args.memory_budget),
        context=args.context,
        lazy=args.lazy,
        resident_levels=tuple(args.resident_levels),
        level_folders=dict(level_folder(text) for text in args.level_folder),
        view=args.view,
    )
    if model.plan is not None:
        say(model.plan.line())
    if not model.bound:
        say("a model of before: that config.json and tokenizer are its own is not checked")
    return model


def memory_options(args: argparse.Namespace) -> dict[str, Any]:
    """What to fetch, as the model takes it."""
    return {
        "memory": args.memory or "fetched",
        "memory_name": args.memory_name,
        "blocked": [barred_path(text) for text in args.block],
        "damaged": "stop" if args.strict_memory else "skip",
    }


def passages_of_run(args: argparse.Namespace, model: MemoryModel) -> Passages | None:
    """The passages that may stand beside the prompt, None where none are asked for."""
    if args.with_passages is None:
        if args.run is not None:
            raise UserError("--run alone has no use", args.run, "give --with-passages N with it")
        return None
    if args.with_passages < 1:
        what = "--with-passages is not 1 or more"
        raise UserError(what, args.with_passages, "give the number of passages")
    run = Path(f"{Path(args.model)}.run") if args.run is None else args.run
    return Passages(run, model, [barred_path(text) for text in args.block])


def stops_of(args: argparse.Namespace) -> list[str]:
    """The stop texts; a shell makes it hard to write a new line."""
    return [text.replace("\\n", "\n") for text in args.stop]


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("temp", "top_p", "top_k", "min_p", "seed")}
