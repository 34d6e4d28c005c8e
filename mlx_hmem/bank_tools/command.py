"""The commands of ``mlx_hmem.bank``: their arguments, and what they print."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_hmem.bank.views import Barred, barred_path, check_barred, in_bank
from mlx_hmem.bank_tools import access, compare, rewrite
from mlx_hmem.bank_tools.checks import verify
from mlx_hmem.bank_tools.contents import (
    Contents,
    OpenBank,
    configs_of,
    model_folder,
    open_banks,
    views_of,
)
from mlx_hmem.bank_tools.effects import measure, read_named_texts
from mlx_hmem.bank_tools.page import write_page
from mlx_hmem.bank_tools.table import cluster_lines, table_lines
from mlx_hmem.bank_tools.which import which_lines
from mlx_hmem.errors import ArgumentParser, UserError, printable
from mlx_hmem.folders import folder_locked
from mlx_hmem.generation.passages import Passages
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.model.load import load

MOST_LINES = 40  # of differences


@contextmanager
def opened(folder: Path) -> Iterator[list[OpenBank]]:
    """The banks of a model directory, closed at the end."""
    with ExitStack() as stack:
        banks = open_banks(folder)
        for each in banks:
            stack.enter_context(each.bank)
        yield banks


def bank_called(banks: Sequence[OpenBank], path: Barred) -> tuple[OpenBank, tuple[int, ...]]:
    """The bank that a path names, and the path in it, checked; () for all of it."""
    name, rest = in_bank(check_barred(path, configs_of(banks))) if path else ("", ())
    return next(each for each in banks if each.name == name), rest


def inspect_command(args: argparse.Namespace) -> None:
    folder = model_folder(args.model)
    path = barred_path(args.cluster) if args.cluster else None
    with opened(folder) as banks:
        contents = [Contents(each) for each in banks]
        views = views_of(folder, banks)
        effects = None
        if args.view is not None and args.text is None:
            raise UserError("--view says how to measure a text", args.view, "give --text too")
        if args.text is not None:
            texts = read_named_texts(args.text)
            effects = measure(load(folder, view=args.view), texts)
        if path is not None:
            bank, rest = bank_called(banks, path)
            lines = cluster_lines(contents[banks.index(bank)], rest, effects)
        else:
            lines = table_lines(contents, views, effects)
        print("\n".join(map(printable, lines)))
        if args.html is not None:
            print(write_page(args.html, contents, views, effects))


def which_command(args: argparse.Namespace) -> None:
    run = Path(f"{Path(args.model)}.run") if args.run_folder is None else args.run_folder
    model = load(args.model, view=args.view)
    passages = Passages(run, model) if args.run_folder or run.is_dir() else None
    print("\n".join(map(printable, which_lines(model, args.text, passages))))


def verify_command(args: argparse.Namespace) -> None:
    folder = model_folder(args.model)
    sound, damage = verify(folder)
    for line in damage:
        print(f"damaged: {printable(line)}", file=sys.stderr)
    print(f"{sound} blocks are sound, {len(damage) or 'nothing'} found damaged")
    if damage:
        raise SystemExit(1)


def _change_view(change: Callable[..., str]) -> Callable[[argparse.Namespace], None]:
    def command(args: argparse.Namespace) -> None:
        folder = Path(args.model)
        if not folder.is_dir():
            raise UserError("views are set in a folder", args.model, "fetch the model first")
        paths = [barred_path(text) for text in args.clusters]
        folder = model_folder(folder)
        # Who changes the views meanwhile would lose this change, or this one theirs.
        with folder_locked(folder / BANK_FOLDER), opened(folder) as banks:
            print(change(folder, banks, args.view, paths))

    return command


def add_command(args: argparse.Namespace) -> None:
    folder, other = model_folder(args.model), model_folder(args.other)
    with opened(folder) as banks, opened(other) as others:
        print(rewrite.add(folder, banks, others[0], args.name, args.out))


def split_command(args: argparse.Namespace) -> None:
    folder = model_folder(args.model)
    with opened(folder) as banks:
        bank, path = bank_called(banks, barred_path(args.cluster))
        if not path:
            raise UserError("no cluster to split off", args.cluster, "write it as 3 or 3,51")
        print(rewrite.split(folder, bank, views_of(folder, banks), path, args.out))


def merge_command(args: argparse.Namespace) -> None:
    with opened(model_folder(args.model)) as first, opened(model_folder(args.other)) as second:
        print(rewrite.merge(first[0], second[0], args.out))


def diff_command(args: argparse.Namespace) -> None:
    with opened(model_folder(args.model)) as first, opened(model_folder(args.other)) as second:
        unlike = compare.unlike(first[0], second[0])
        found = list(compare.differences(first[0].bank, second[0].bank))
    lines = [f"{what}: {mine} and {theirs}" for what, mine, theirs in unlike]
    print("\n".join(lines or ["anchor, tree, encoder and format are the same"]))
    if found:
        print(f"{'level':>5} {'cluster':>8} {'bytes':>12} {'|A|':>10} {'|B|':>10} {'|A - B|':>10}")
    for each in found[:MOST_LINES]:
        norms = f"{each.first:10.4g} {each.second:10.4g} {each.difference:10.4g}"
        print(f"{each.level or 'all':>5} {each.cluster:8} {each.bytes:12,} {norms}")
    if len(found) > MOST_LINES:
        print(f"… and {len(found) - MOST_LINES} more")
    print(f"{len(found)} blocks differ, {sum(each.bytes for each in found):,} bytes")


def export_command(args: argparse.Namespace) -> None:
    with opened(model_folder(args.model)) as banks:
        bank, path = bank_called(banks, barred_path(args.cluster) if args.cluster else ())
        levels = [level.level for level in bank.bank.manifest.levels]
        if args.level is not None and args.level not in (0, *levels):
            raise UserError("the bank has no such level", args.level, f"use 0 or one of {levels}")
        wanted = levels if args.level is None else [args.level]
        keys = []
        for level in wanted:
            clusters = bank.bank.config.clusters_on(path, level) if level else range(1)
            keys += [(level, cluster) for cluster in clusters]
        print(compare.export(bank, keys, args.out))


def parser() -> ArgumentParser:
    top = ArgumentParser(
        prog="mlx_hmem.bank",
        description="Looks into the memory bank of a model, says who may fetch what, and makes "
        "models of parts of others."
        "\n\nA CLUSTER is the path to it, as 3 or 3,51; in a bank that was added, NAME:3,51, and "
        "NAME is all of it. What is found is printed; NEW_DIR is a model directory that is made.",
    )
    commands = top.add_subparsers(
        dest="command", required=True, parser_class=ArgumentParser, metavar="COMMAND",
        title="commands, each with --help",
    )  # fmt: skip

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> ArgumentParser:
        about = f"{text[0].upper()}{text[1:]}."
        made: ArgumentParser = commands.add_parser(name, help=text, description=about)
        made.set_defaults(run=run)
        made.add_argument("model", metavar="DIR", help="a model directory, a Hub id, or demo")
        return made

    inspect = command("inspect", inspect_command, "which documents and words lie in which cluster")
    inspect.add_argument("cluster", nargs="?", metavar="CLUSTER", help="one cluster, in detail")
    inspect.add_argument(
        "--text", type=Path, metavar="FILE", help="a text, or a folder of texts: how much each "
        "block changes the loss on them, and where they are routed",
    )  # fmt: skip
    inspect.add_argument("--view", metavar="NAME", help="measure as this view allows")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="a page to look around in")
    which = command("which", which_command, "which documents taught the blocks that a text fetches")
    which.add_argument("text", metavar="TEXT", help="a question, or any other text")
    which.add_argument("--view", metavar="NAME", help="fetch as this view allows")
    which.add_argument(
        "--run", type=Path, dest="run_folder", metavar="FOLDER", help="the text of the documents, "
        "of which the nearest passage is printed (default: DIR.run, where there is one)",
    )  # fmt: skip
    command("verify", verify_command, "read every block and compare its checksum")
    for name, change, text in (
        ("block", access.block, "bar clusters in a view; makes the view if it is new"),
        ("unblock", access.unblock, "allow clusters again; without any, remove the view"),
    ):
        made = command(name, _change_view(change), text)
        made.add_argument("clusters", nargs="*", metavar="CLUSTER")
        made.add_argument("--view", required=True, metavar="NAME")
    add = command("add", add_command, "put a bank of the same anchor beside a model's own")
    add.add_argument("other", metavar="OTHER", help="the model directory that has the bank")
    add.add_argument("--name", required=True, help="what the bank is to be called")
    split = command("split", split_command, "make a model of one subtree")
    split.add_argument("cluster", metavar="CLUSTER")
    merge = command("merge", merge_command, "join two banks that trained other subtrees")
    merge.add_argument("other", metavar="OTHER")
    for made in (add, split, merge):
        made.add_argument("--out", required=True, type=Path, metavar="NEW_DIR")
    diff = command("diff", diff_command, "which blocks differ, and by how much")
    diff.add_argument("other", metavar="OTHER")
    export = command("export", export_command, "write blocks as plain arrays")
    export.add_argument("cluster", nargs="?", metavar="CLUSTER", help="a subtree (default: all)")
    export.add_argument("--level", type=int, help="one level only; 0 is the generic memory")
    export.add_argument("--out", required=True, type=Path, metavar="FILE.safetensors|FILE.npz")
    return top


def main(words: Sequence[str]) -> None:
    if words[:1] == ["forget"]:
        raise UserError(
            "forgetting is a program of its own", "forget", "mlx_hmem.forget DIR DOCUMENT --out NEW"
        )
    args = parser().parse_args(words)
    args.run(args)
