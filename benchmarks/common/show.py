"""The face of every benchmark: its options, and its result as tables, as JSON or as a picture.

A result has figures by name; a table is a dictionary of rows, a row one of figures by column. What
a benchmark calls may print what it likes: that goes to standard error.
"""

import argparse
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from benchmarks.common.counting import machine
from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.evaluate.tables import table
from train.loop.plot import import_pyplot

Result = dict[str, Any]
WIDE = 7  # a table with more columns is turned on its side
Measure = Callable[..., Result]


def benchmark(
    doc: str | None, parts: Measure | Mapping[str, Measure], bars: Sequence[str] = ()
) -> None:
    """The whole program: a function that measures, or several by a word that is the program's first
    argument. Their parameters are the program's: one without a default stands for itself, others
    are options. ``bars`` are the columns of the tables that --plot draws."""

    def main() -> None:
        spec = sys.modules["__main__"].__spec__
        name = spec.name.removesuffix(".__main__") if spec else None
        parser = ArgumentParser(prog=f"python -m {name}", description=doc)
        if isinstance(parts, Mapping):
            words = parser.add_subparsers(dest="part", required=True, metavar="|".join(parts))
            for name, part in parts.items():
                _add_options(words.add_parser(name), part, bars)
        else:
            _add_options(parser, parts, bars)
        args = parser.parse_args()
        measure = parts[args.part] if isinstance(parts, Mapping) else parts
        with redirect_stdout(sys.stderr):
            given = {name: getattr(args, name) for name in inspect.signature(measure).parameters}
            result = machine() | measure(**given)
        # Printed first: a picture that cannot be drawn must not lose it.
        print(json.dumps(result, indent=2) if args.json else shown(result))
        if bars and args.plot:
            draw(result, bars, args.plot)

    run_program(main)


def _add_options(parser: argparse.ArgumentParser, measure: Measure, bars: Sequence[str]) -> None:
    kinds = get_type_hints(measure)
    for name, parameter in inspect.signature(measure).parameters.items():
        kind, settings, option = kinds[name], dict[str, Any](), f"--{name.replace('_', '-')}"
        empty = parameter.default is parameter.empty
        if isinstance(kind, UnionType):  # or None
            kind = get_args(kind)[0]
        if get_origin(kind) is Sequence:
            kind, settings["nargs"] = get_args(kind)[0], "+" if empty else "*"
        if get_origin(kind) is Literal:
            settings["choices"] = get_args(kind)
            kind = type(get_args(kind)[0])
        if not empty:
            settings |= {"default": parameter.default, "help": "default: %(default)s"}
        elif parameter.kind is parameter.KEYWORD_ONLY:
            settings["required"] = True
        else:
            option = name
        parser.add_argument(option, type=kind, **settings)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if bars:
        parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG picture")


def tables_of(result: Result) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        name: value
        for name, value in result.items()
        if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values())
    }


def shown(result: Result) -> str:
    """A result as text."""
    lines, tables = list[str](), tables_of(result)
    for name, value in result.items():
        if name in tables:
            lines += ["", _aligned(name, tables[name])]
        elif isinstance(value, dict):
            lines.append(
                f"{_words(name)}: " + ", ".join(f"{_words(k)} {_cell(v)}" for k, v in value.items())
            )
        else:
            lines.append(f"{_words(name)}: {_cell(value)}")
    return "\n".join(lines)


def _aligned(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[_words(name) for name in (title, *columns)]]
    cells += [
        [_words(name), *(_cell(row.get(c, "")) for c in columns)] for name, row in rows.items()
    ]
    return table(list(zip(*cells, strict=True)) if len(columns) > WIDE else cells)


def _words(name: str) -> str:
    return name if "/" in name else name.replace("_", " ")


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_cell, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def draw(result: Result, columns: Sequence[str], target: Path) -> None:
    """Horizontal bars of some columns of all tables that have them, one panel below the other, into
    the PNG file ``target``.

    Raises UserError where matplotlib is missing or the file cannot be written.
    """
    pyplot = import_pyplot()
    panels = []
    for title, rows in tables_of(result).items():
        for column in columns:
            bars = {_words(name): row[column] for name, row in rows.items() if row.get(column)}
            if bars:
                panels.append((f"{_words(title)}: {_words(column)}", bars))
    heights = [len(bars) + 1.5 for _, bars in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(8, 0.28 * sum(heights) + 0.4),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for (title, bars), ax in zip(panels, axes[:, 0], strict=True):
        drawn = ax.barh(list(bars), list(bars.values()), color="#3b6fb6", height=0.7)
        ax.bar_label(drawn, fmt=_cell, padding=3, fontsize=8)
        ax.invert_yaxis()
        ax.set_title(title, loc="left", fontsize=9)
        ax.set_xlim(0, 1.12 * max(bars.values()))
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{result['machine']}; {result['versions']}", fontsize=7)
    try:
        figure.savefig(target, dpi=150, format="png")
    except OSError as error:
        raise UserError("the picture cannot be written", error, "choose another path") from None
    finally:
        pyplot.close(figure)
