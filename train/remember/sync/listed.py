"""The files to remember, and what names all that they make as it is now.

Whether anything has changed is asked often: here is nothing that takes a second to import.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.documents.readers import DEFAULT, own_files
from mlx_hmem.documents.tables import Records
from mlx_hmem.errors import UserError
from mlx_hmem.model.find import BANK_FILES, MODEL_FILES, find_model

CHECKED = ".checked.json"  # in a run: what :func:`stamp` said when all was up to date


def files_of(sources: Sequence[Path], faults: Faults) -> list[CorpusFile]:
    """The files of a file or folder, or of several; then their names begin with that of theirs.
    What is left out goes to ``faults``."""
    if len(sources) == 1:
        return own_files(sources[0], faults)
    found, names = list[CorpusFile](), Counter(source.resolve().name for source in sources)
    for source in sources:
        name = source.resolve().name
        if names[name] > 1:
            raise UserError("two folders have the same name", name, "rename one of them")
        own = own_files(source, faults)
        if source.is_dir():
            own = [file._replace(name=f"{name}/{file.name}") for file in own]
        found += own
    return found


def source_of(files: list[CorpusFile], most_bytes: int | None, records: Records) -> str:
    """What names the folder as it is now: names, sizes and times of its files, and how they are
    read."""
    seen = [(file.name, *file.state) for file in files]
    own = () if records == DEFAULT else (records,)
    return hashlib.sha256(repr((seen, most_bytes, *own)).encode()).hexdigest()


def stamp(args: Any, run: Path, source: str) -> str:
    """What a command line, its folder, of which ``source`` is the name, and all that there is of
    the two models and the run are told by: names, sizes and times."""
    models = (find_model(args.model, (*MODEL_FILES, *BANK_FILES)), args.out)
    states = [sorted(_states(folder)) for folder in (*models, run)]
    asked = (args.passes, args.quick, args.restate)
    return hashlib.sha256(repr((source, asked, states)).encode()).hexdigest()


def _states(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    for file in folder.rglob("*"):
        if file.name not in (CHECKED, "lock") and file.is_file():
            found = file.stat()
            name = file.relative_to(folder).as_posix()
            yield name, found.st_size, found.st_mtime_ns, found.st_ino
