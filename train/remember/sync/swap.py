"""A model and its run take the place of those that were there: the model at once, so that whoever
reads finds one of them whole; then the run, file by file out of the next one's folder in it, as
often as it takes.

Made is ``.NAME.next`` beside the model. ``made.json`` in the next run says what that is, so that a
kill at any moment leaves no doubt which of the two lies at the model's place.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.errors import UserError
from mlx_hmem.files import exchange, link_or_copy, sync_folder, write_atomic
from mlx_hmem.folders import folder_locked
from mlx_hmem.model.find import BANK_FOLDER
from mlx_hmem.reading import open_regular, read_sealed, sealed

from ...stages import alone
from ..restate import JOURNAL
from ..run import KNOWN, RESTORE, SETTINGS

NEXT, ANEW = "next", "anew"  # folders in a run: the next one, in the same tree or in another
MADE = "made.json"
DONE = "done"  # what that is called when all of it has been taken over
TIES = ("hmem.json", f"{BANK_FOLDER}/{MANIFEST}", f"{BANK_FOLDER}/{DOCUMENTS}")
OF_RUN = (SETTINGS, "documents.jsonl", KNOWN, "tree.safetensors", "paths.npy", JOURNAL)


def model_digest(folder: Path) -> str:
    """What tells a model from every other that a run has made; "" where none lies."""
    digest = hashlib.sha256()
    for name in TIES:
        if not (folder / name).is_file():
            return ""
        with open_regular(folder / name) as file:
            digest.update(hashlib.sha256(file.read()).digest())
    return digest.hexdigest()


def beside(out: Path) -> Path:
    """Where the next model is made: on the same disk as ``out``."""
    real = Path(os.path.realpath(out))
    return real.with_name(f".{real.name}.next")


def put_in_place(out: Path, run: Path, next_run: Path, make: Callable[[Path], None]) -> None:
    """Makes the model of the next run, which then lies at ``out``, and takes over its run."""
    made, held = beside(out), contextlib.ExitStack()
    shutil.rmtree(made, ignore_errors=True)
    with held:
        if out.exists():  # who sets views meanwhile waits for the new model
            held.enter_context(folder_locked(out / BANK_FOLDER))
        make(made)
        digest = {"model": model_digest(made)}
        write_atomic(next_run / MADE, json.dumps(sealed(digest)) + "\n")
        real = Path(os.path.realpath(out))
        if not real.exists():
            os.rename(made, real)
        elif not exchange(made, real):
            old = made.with_suffix(".old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(real, old)
            os.rename(made, real)
        sync_folder(real.parent)
    settle(out, run)


def make_up(out: Path, run: Path) -> None:
    """As :func:`settle`, for who comes to read both."""
    if any((run / name / MADE).exists() for name in (NEXT, ANEW)):
        with alone("train remember", run):
            settle(out, run)


def settle(out: Path, run: Path) -> None:
    """Makes up for what a kill has cut off once the next model was whole: where it lies at its
    place, or is only missing there, its run is taken over."""
    made, settled = beside(out), False
    shutil.rmtree(run / DONE, ignore_errors=True)
    for next_run in (run / NEXT, run / ANEW):
        if not (next_run / MADE).exists():
            continue
        wanted = read_sealed(next_run / MADE, RESTORE).get("model")
        if not out.exists() and model_digest(made) == wanted:
            os.rename(made, os.path.realpath(out))
        if model_digest(out) == wanted:
            _take_over(next_run, run)
            settled = True
    if settled:
        for old in (made, made.with_suffix(".old"), run / DONE, run / NEXT, run / ANEW):
            shutil.rmtree(old, ignore_errors=True)


def check_free(run: Path) -> None:
    """Raises UserError where a folder in which no run has begun holds what is of none."""
    own = {*OF_RUN, "lock", "subtrees", NEXT, ANEW}
    for file in sorted(run.iterdir()) if run.is_dir() else ():
        if file.name not in own and not file.name.startswith("."):
            raise UserError(
                "the run's folder holds something else", file, "name another with --run"
            )


def clear(run: Path) -> None:
    """Empties a run that was begun, of which nothing serves any more."""
    for name in OF_RUN:  # the settings come first: without them it has not begun
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "subtrees", ignore_errors=True)


def _take_over(next_run: Path, run: Path) -> None:
    """The run becomes the next one; done again it comes to the same."""
    here, there = _files(run), _files(next_run)
    for name in here - there:
        (run / name).unlink()
    for name in sorted(there):
        part = run / f".{Path(name).name}.taken"
        part.unlink(missing_ok=True)
        link_or_copy(next_run / name, part)
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(part, run / name)
        part.unlink(missing_ok=True)  # it stays where both are the same file
    for folder in (run / "subtrees").glob("*"):
        with contextlib.suppress(OSError):  # one that is not empty stays
            folder.rmdir()
    sync_folder(run)
    os.rename(next_run, run / DONE)


def _files(run: Path) -> set[str]:
    """Those that a run is made of, by their names in it."""
    trained = (file for file in (run / "subtrees").glob("*/*") if file.is_file())
    own = (run / name for name in OF_RUN)
    return {str(f.relative_to(run)) for f in [*trained, *own] if f.is_file()}
