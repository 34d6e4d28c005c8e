"""``mlx_hmem.convert adapters A/ B/ … --anchor MODEL OUT``: LoRA adapters as a memory bank."""

from collections.abc import Sequence
from pathlib import Path

from mlx_hmem.bank.views import check_name
from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.evaluate.texts import read_texts
from mlx_hmem.folders import identity_of
from mlx_hmem.model.find import MODEL_FILES, find_model

from ..anchors.weights import carry_out
from .bank import check_texts, from_adapters

VERSION = 1  # of what is written: another one does not go on with a stopped one
TEXTS = (".txt", ".md", ".jsonl", ".gz")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="mlx_hmem.convert adapters",
        usage="mlx_hmem.convert adapters ADAPTER… --anchor MODEL OUT [options]",
        description="Makes a model of LoRA adapters that were trained with PEFT or mlx-lm on one "
        "anchor: each request fetches one of them, chosen by name (--memory-name) or, with "
        "--texts, by what is asked."
        "\n\nMakes the model directory OUT. Stopped, it goes on with the same command.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="ADAPTER",
        help="the folder of an adapter, whose name it gets, or NAME=FOLDER; the last is OUT",
    )
    parser.add_argument("--anchor", required=True, metavar="MODEL", help="folder or Hub id")
    parser.add_argument(
        "--texts",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="texts that belong to an adapter: a .txt or .jsonl file, or a folder of such",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return parser


def main(words: Sequence[str]) -> None:
    args = _parser().parse_intermixed_args(words)  # OUT may stand behind --anchor
    *given, last = args.places
    folders, out = dict[str, Path](), Path(last)
    if not given:
        raise UserError("nothing to convert", last, "give ADAPTER… OUT")
    for text in given:
        name, equals, place = text.partition("=")
        folder = Path(place) if equals else Path(text)
        name = check_name(name if equals else folder.resolve().name, "memory; write NAME=FOLDER")
        if name in folders:
            raise UserError("two adapters of one name", name, "write one as OTHER=FOLDER")
        folders[name] = folder
    files = _text_files(args.texts, folders)
    texts = {n: check_texts(n, [t for f in own for t in read_texts(f)]) for n, own in files.items()}
    conversion = from_adapters(folders, find_model(args.anchor, MODEL_FILES), texts)
    sources = [*conversion.sources, *(file for own in files.values() for file in own)]
    identity = identity_of(
        sources,
        version=VERSION,
        adapters={name: str(folder.resolve()) for name, folder in folders.items()},
        texts={name: [str(file.resolve()) for file in own] for name, own in files.items()},
    )
    carry_out(conversion, out, identity, args.overwrite)


def _text_files(given: Sequence[str], folders: dict[str, Path]) -> dict[str, list[Path]]:
    """The files of texts of each adapter, in the order of the adapters; none for none at all."""
    found: dict[str, list[Path]] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or name not in folders:
            known = ", ".join(folders)
            raise UserError("--texts names no adapter", text, f"write NAME=PATH; names: {known}")
        path = Path(place)
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix in TEXTS) if path.is_dir() else [path]
        )
        found.setdefault(name, []).extend(inside)
    if found and (missing := [name for name in folders if name not in found]):
        what = "an adapter without texts cannot be routed to"
        raise UserError(what, ", ".join(missing), "give texts for each, or for none")
    return {name: found[name] for name in folders if found}
