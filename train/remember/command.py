"""``mlx_hmem.remember DOCUMENTS --model MODEL --out DIR``: a model learns your documents, and is
brought up to date with them when they have changed.

The anchor stays as it is; the text goes into blocks of memory: into a bank of its own, or, where
the model has one, into new clusters behind those that are there. See docs/own_documents.md.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.documents.files import Faults
from mlx_hmem.documents.tables import Records
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.reading import read_json

from .sync.listed import CHECKED, files_of, source_of, stamp
from .sync.watch import watch


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.remember",
        description="Teaches a model your documents: text of any kind, web pages, PDF, Word, "
        "books, tables, mail, JSON. The model that you give stays as it is."
        "\n\nPrints a plan, then makes DIR, a model directory that knows them. Where DIR exists "
        "it is brought up to date: what is new or has changed is learned, what is gone is "
        "forgotten. Stopped, it goes on with the same command.",
    )
    parser.add_argument(
        "documents", type=Path, nargs="+", metavar="DOCUMENTS",
        help="a file, or a folder of them, whose hidden files are passed over; or several",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="a model directory, a Hub id, or demo")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR",
        help="the model directory to make, or to bring up to date",
    )  # fmt: skip
    parser.add_argument(
        "--run", type=Path, help="what is needed to forget again, your text among it, which does "
        "not belong into a model that you pass on (default: DIR.run)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and change nothing")
    parser.add_argument(
        "--watch", type=float, nargs="?", const=10.0, metavar="SECONDS", help="do it again "
        "whenever the documents have changed and rested for so long (default: %(const)g)",
    )  # fmt: skip
    parser.add_argument(
        "--new-tree", action="store_true", help="remember all anew in clusters that fit the text "
        "as it is now, where DIR exists",
    )  # fmt: skip
    parser.add_argument(
        "--text-key", default="text", metavar="KEY", help="where a JSON object has its text "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--passed-over", action="store_true", help="name every file that is not read, also those "
        "of kinds that hold no text",
    )  # fmt: skip
    parser.add_argument("--max-bytes", type=int, metavar="N", help="read no more text than that")
    passes = parser.add_mutually_exclusive_group()
    passes.add_argument(
        "--passes", type=int, metavar="N", help="over the text, more of them for more of it by "
        "heart (default: those of DIR where it exists, else what the plan says)",
    )  # fmt: skip
    passes.add_argument(
        "--quick", action="store_true", help="fewer passes: the gist of it, in a fraction of the "
        "time",
    )  # fmt: skip
    parser.add_argument(
        "--look", action="store_true", help="print the first halves of three sentences, and what "
        "the model says then",
    )  # fmt: skip
    parser.add_argument(
        "--restate", type=int, metavar="N", help="let the anchor write N questions with answers on "
        "each passage, and learn them too",
    )  # fmt: skip
    args = parser.parse_args(words)
    for name in ("max_bytes", "passes", "restate"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is not 1 or more", value, "give a number")
    if args.watch is None:
        go(args)
        return
    if not 0 <= args.watch < math.inf:
        raise UserError("--watch is no time", args.watch, "give seconds")
    if args.dry_run or args.new_tree:
        parser.error("--watch goes with neither --dry-run nor --new-tree")
    watch(args.documents, args.watch, lambda: go(args))


def go(args: Any) -> None:
    """Does once what is asked for."""
    if is_up_to_date(args):
        print(f"up to date: {args.out}; your text is in {args.run or f'{args.out}.run'}")
        return
    from .sync.remembering import Remembering  # takes seconds to import

    Remembering(args).go()


def is_up_to_date(args: Any) -> bool:
    """Whether the same was asked for before, and nothing has changed since it was done."""
    run = args.run or Path(f"{args.out}.run")
    if (
        args.look
        or args.passed_over
        or args.new_tree
        or args.dry_run
        or not (run / CHECKED).is_file()
    ):
        return False
    # What is wrong or passed over is said by what comes then.
    with contextlib.suppress(UserError), contextlib.redirect_stderr(io.StringIO()):
        source = source_of(
            files_of(args.documents, Faults()), args.max_bytes, Records(args.text_key)
        )
        return bool(read_json(run / CHECKED) == {"stamp": stamp(args, run, source)})
    return False
