"""What of a folder is not to be read: what ``.hmemignore`` files in it name, in Git's syntax.

One in a folder further down counts for what lies below it, before those above, and ``!`` takes back
what another has ruled out. What programs keep for themselves is left out as a rule.
"""

import os
from pathlib import Path

from mlx_hmem.errors import UserError, needed
from mlx_hmem.reading import open_regular

IGNORE = ".hmemignore"
AS_A_RULE = ("node_modules", "__pycache__", "site-packages")  # folders


class Ignored:
    """The rules of the ``folder``, which grow as it is walked from the top; ``count``: of files and
    folders that they have ruled out."""

    def __init__(self, folder: Path):
        self._folder, self.count = folder, 0
        self._specs = dict[Path, object]()

    def left(self, root: Path, names: list[str], folders: bool) -> list[str]:
        """Those of the names in ``root`` that may be read; ``folders``: whether they are such."""
        if root not in self._specs and os.path.lexists(root / IGNORE):
            self._specs[root] = _read(root / IGNORE)
        left = [name for name in names if not self._has(root / name, folders)]
        self.count += len(names) - len(left)
        return left

    def _has(self, path: Path, is_folder: bool) -> bool:
        for above in path.parents:  # the nearest first
            if spec := self._specs.get(above):
                own = path.relative_to(above).as_posix() + "/" * is_folder
                if (found := spec.check_file(own).include) is not None:  # type: ignore[attr-defined]
                    return bool(found)
            if above == self._folder:
                break
        return is_folder and path.name in AS_A_RULE


def _read(path: Path) -> object:
    pathspec = needed("pathspec", f"an ignore file ({path})")
    with open_regular(path) as file:
        data = file.read()
    try:
        return pathspec.GitIgnoreSpec.from_lines(data.decode("utf-8-sig").splitlines())
    except ValueError as error:  # a wrong pattern, or no UTF-8
        raise UserError(f"{path} cannot be read", error, "write it as a .gitignore") from None
