"""``bank/views.json``: named views of a model's memory, each with clusters that it may not fetch.

::

    {"views": {"guest": {"blocked": [[3], [4, 70], ["handbook"], ["handbook", 2]]}}}

A cluster is named by the path that leads to it, as in ``MemoryModel.fetch``. A path may begin with
the name of a bank that was added: alone it bars that whole bank. The reader keeps to a view
(:meth:`Bank.view`), so whatever a prompt says, the bytes of what is barred are not read. Where a
view is called "default" it holds for whoever asks for none.
"""

import json
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.config import ClusterPath, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from mlx_hmem.reading import lies_there, read_json, strict_json

VIEWS = "views.json"
DEFAULT = "default"
NAME = re.compile(r"[A-Za-z][\w.@-]{0,63}")  # of a view or an added bank; never a number
REMEDY = "restore the file, or make the view again with mlx_hmem.bank block"
Barred = tuple[str | int, ...]  # the path to a cluster, after the name of its bank if it was added
Views = Mapping[str, Sequence[Barred]]


def check_name(name: Any, what: str) -> str:
    """``name`` if it can be the name of a view or a bank, its accents as one with their letters."""
    name = unicodedata.normalize("NFC", name) if isinstance(name, str) else name
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"wrong name of a {what}",
            repr(name)[:80],
            "begin with a letter; letters, digits and . _ - @ follow, 64 at most",
        )
    return name


def read_views(folder: str | Path, configs: Mapping[str, MemoryConfig]) -> Views:
    """The views of the bank in ``folder``, none without a file; whatever else lies in its place, a
    link that leads nowhere too, is a UserError.

    ``configs``: of the banks by name, "" being the first; every barred cluster must be in one.
    """
    file = Path(folder) / VIEWS
    if not lies_there(file):
        return {}
    values = read_json(file, parse=strict_json)
    try:
        if not isinstance(values, dict) or list(values) != ["views"]:
            raise ValueError("it needs one key, views")
        views = values["views"]
        if not isinstance(views, dict):
            raise ValueError("views is not an object")
        found = {check_name(name, "view"): _view(view, configs) for name, view in views.items()}
        if len(found) < len(views):
            raise ValueError("a name occurs twice")
        return found
    except ValueError as error:  # UserError is one
        raise UserError(f"{file} is damaged", error, REMEDY) from None


def _view(view: Any, configs: Mapping[str, MemoryConfig]) -> Sequence[Barred]:
    if not isinstance(view, dict) or list(view) != ["blocked"]:
        raise ValueError("a view needs one key, blocked")
    if not isinstance(view["blocked"], list):
        raise ValueError("blocked is not a list of paths")
    return tuple(check_barred(path, configs) for path in view["blocked"])


def in_bank(path: Barred) -> tuple[str, ClusterPath]:
    """The bank that a barred path names, "" being the first, and the path in it; () for all."""
    return (path[0], path[1:]) if isinstance(path[0], str) else ("", path)  # type: ignore[return-value]


def check_barred(
    path: Any, configs: Mapping[str, MemoryConfig], known: Iterable[str] | None = None
) -> Barred:
    """``path`` as a tuple, or a UserError if it leads to no cluster of these banks, of which it
    names the ``known``; None: all."""
    if not isinstance(path, list | tuple) or not path:
        raise UserError("not the path of a cluster", repr(path)[:80], "write it as 3 or 3,51")
    bank, rest = in_bank(tuple(path))
    if bank not in configs:
        said = ", ".join(filter(None, configs if known is None else known)) or "none was added"
        raise UserError("no such bank", bank, f"known: {said}; write a cluster as 3 or 3,51")
    if not all(type(index) is int for index in rest):
        raise UserError("not the path of a cluster", repr(path)[:80], "write it as 3 or 3,51")
    clusters = configs[bank].check_path(rest, whole=False) if rest else ()
    return (bank, *clusters) if bank else clusters


def write_views(folder: str | Path, views: Mapping[str, Iterable[Barred]]) -> None:
    """Writes the views, whole or not at all."""
    values = {"views": {name: {"blocked": list(barred)} for name, barred in views.items()}}
    write_atomic(Path(folder) / VIEWS, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def view_called(views: Views, name: str | None) -> Sequence[Barred]:
    """What the view bars; for None that of "default", or nothing where there is none."""
    if name is None:
        return views.get(DEFAULT, ())
    name = unicodedata.normalize("NFC", name)
    if name not in views:
        known = ", ".join(views) or "the model has none; mlx_hmem.bank block makes one"
        raise UserError("no such view", name, f"known: {known}" if views else known)
    return views[name]


def of_bank(barred: Collection[Barred], bank: str) -> list[ClusterPath] | None:
    """The barred clusters of one bank, as paths in it; None if all of that bank is barred."""
    paths = [path for name, path in map(in_bank, barred) if name == bank]
    return None if () in paths else paths


def barred_path(text: str) -> Barred:
    """A barred path as a command line has it: ``3``, ``3,51``, ``BANK`` or ``BANK:3,51``."""
    bank, colon, rest = unicodedata.normalize("NFC", text).partition(":")
    if not colon:
        bank, rest = ("", text) if not NAME.fullmatch(text) else (text, "")
    try:
        clusters = tuple(int(part) for part in rest.split(",")) if rest else ()
    except ValueError:
        clusters = ()
    if (colon and not (NAME.fullmatch(bank) and clusters)) or not (bank or clusters):
        raise UserError("not a cluster path", repr(text), "write it as 3, 3,51 or BANK:3,51")
    return (bank, *clusters) if bank else clusters


def shown(path: Barred) -> str:
    """A barred path as the command line takes it."""
    bank, clusters = in_bank(path)
    numbers = ",".join(map(str, clusters))
    return f"{bank}:{numbers}" if bank and numbers else bank or numbers
