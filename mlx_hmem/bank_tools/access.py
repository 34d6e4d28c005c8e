"""``block`` and ``unblock``: which clusters a view of a model's memory may not fetch."""

from collections.abc import Sequence
from pathlib import Path

from mlx_hmem.bank.views import Barred, check_barred, check_name, shown, write_views
from mlx_hmem.bank_tools.contents import OpenBank, configs_of, views_of
from mlx_hmem.errors import UserError
from mlx_hmem.model.find import BANK_FOLDER


def block(folder: Path, banks: Sequence[OpenBank], name: str, paths: Sequence[Barred]) -> str:
    """Bars clusters in a view, which is made if it is new; a line that says what it bars now."""
    name = check_name(name, "view")
    views = views_of(folder, banks)
    configs = configs_of(banks)
    barred = list(views.get(name, ()))
    barred += [path for each in paths if (path := check_barred(each, configs)) not in barred]
    write_views(folder / BANK_FOLDER, {**views, name: _least(barred)})
    return _said(name, _least(barred))


def unblock(folder: Path, banks: Sequence[OpenBank], name: str, paths: Sequence[Barred]) -> str:
    """Lets a view fetch clusters again; without ``paths`` the view is removed."""
    views, name = views_of(folder, banks), check_name(name, "view")
    if name not in views:
        raise UserError("no such view", name, f"known: {', '.join(views) or 'none'}")
    wanted = [check_barred(path, configs_of(banks)) for path in paths]
    for path in wanted:
        if path not in views[name]:
            above = next((b for b in views[name] if _leads_to(b, path)), None)
            remedy = "nothing is to be done" if above is None else f"unblock {shown(above)}"
            what = f"view {name} does not bar this cluster" + (" by itself" if above else "")
            raise UserError(what, shown(path), remedy)
    if not paths:
        write_views(folder / BANK_FOLDER, {n: b for n, b in views.items() if n != name})
        return f"view {name} is removed"
    rest = [path for path in views[name] if path not in wanted]
    write_views(folder / BANK_FOLDER, {**views, name: rest})
    return _said(name, rest)


def _leads_to(above: Barred, path: Barred) -> bool:
    return path[: len(above)] == above


def _least(barred: Sequence[Barred]) -> list[Barred]:
    """Without what lies below another."""
    return [p for p in barred if not any(b != p and _leads_to(b, p) for b in barred)]


def _said(name: str, barred: Sequence[Barred]) -> str:
    what = ", ".join(map(shown, barred)) or "nothing"
    return f"view {name} bars {what}; use it with mlx_hmem.generate --view {name}"
