"""How the benchmarks of the memory bank give their results: a table or JSON, and a picture."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def add_outputs(parser: argparse.ArgumentParser, repeats: int) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG picture")
    parser.add_argument("--repeats", type=int, default=repeats, help="default: %(default)s")


def report(
    result: Result,
    args: argparse.Namespace,
    show: Callable[[Result], None],
    plot: Callable[[Result, Path], None],
) -> None:
    """Prints the result first: a picture that cannot be drawn must not lose it."""
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    if args.plot:
        plot(result, args.plot)
