"""What of a folder is not to be read: what ``.hmemignore`` files in it name, in Git's syntax.

One in a folder further down counts for what lies below it, before those above, and ``!`` takes back
what another, or a rule of ours, has ruled out.
"""

import os
from pathlib import Path

from mlx_hmem.errors import UserError, needed
from mlx_hmem.reading import open_regular

IGNORE = ".hmemignore"


class Ignored:
    """The rules of the ``folder``, which grow as it is walked from the top."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._specs = dict[Path, object]()

    def enter(self, root: Path) -> None:
        """Reads the rules of a folder."""
        if os.path.lexists(root / IGNORE):
            self._specs[root] = _read(root / IGNORE)

    def out(self, path: Path, is_folder: bool) -> bool | None:
        """Whether a file or folder is ruled out; None where no rule is about it."""
        for above in path.parents:  # the nearest first
            if spec := self._specs.get(above):
                own = path.relative_to(above).as_posix() + "/" * is_folder
                if (found := spec.check_file(own).include) is not None:  # type: ignore[attr-defined]
                    return bool(found)
            if above == self._folder:
                break
        return None


def _read(path: Path) -> object:
    pathspec = needed("pathspec", f"an ignore file ({path})")
    with open_regular(path) as file:
        data = file.read()
    try:
        return pathspec.GitIgnoreSpec.from_lines(data.decode("utf-8-sig").splitlines())
    except ValueError as error:  # a wrong pattern, or no UTF-8
        raise UserError(f"{path} cannot be read", error, "write it as a .gitignore") from None
