"""The stages of a run: their order, what each depends on, and the marker that one is done.

A run's folder holds one folder per stage. ``done.json`` in it is written last and records the parts
of the recipe that the stage and all before it used, and fingerprints of what it read from outside
and of what it leaves: a finished stage is skipped, and a recipe, a corpus or a file that changed
under it is refused rather than mixed with it. One of before these were recorded goes unchecked.
"""

import contextlib
import hashlib
import io
import json
import os
import pkgutil
import shutil
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, link_or_copy, sync, write_atomic
from mlx_hmem.folders import locked, whole_folder
from mlx_hmem.reading import open_regular, read_sealed, sealed

from .corpus.readers import corpus_files
from .loop.log import UNWATCHED, Watching
from .ranks import Ranks
from .recipe.recipe import Recipe


@dataclass(frozen=True)
class Stage:
    """``function`` is `module:name`; the module is imported when the stage runs. It is called with
    the recipe and the folder of the run. ``needs`` are the stages whose files it reads. One that
    ``trains``, or is ``shared`` out in shards, is run by all ranks together and is handed them; one
    that trains also what looks on."""

    name: str
    function: str
    sections: tuple[str, ...]
    needs: tuple[str, ...] = ()
    trains: bool = False
    shared: bool = False

    @property
    def together(self) -> bool:
        return self.trains or self.shared

    def load(self) -> Callable[..., None]:
        function: Callable[..., None] = pkgutil.resolve_name(f"{__package__}{self.function}")
        return function


STAGES = {
    stage.name: stage
    for stage in (
        Stage("corpus", ".corpus.stage:run_corpus", ("seed", "corpus"), shared=True),
        Stage("tokenizer", ".data.tokenizer:run_tokenizer", ("tokenizer",), ("corpus",)),
        Stage("windows", ".data.windows:run_windows", ("windows",), ("tokenizer",), shared=True),
        Stage(
            "anchor-sequences",
            ".data.sequences:run_anchor_sequences",
            (),
            ("windows",),
            shared=True,
        ),
        Stage("anchor", ".loop.arms:run_anchor", ("anchor",), ("anchor-sequences",), True),
        Stage("tree", ".tree.stage:run_tree", ("tree",), ("windows",), shared=True),
        Stage("sequences", ".data.sequences:run_sequences", (), ("tree",)),
        Stage("memories", ".loop.arms:run_memories", ("memories",), ("anchor", "sequences"), True),
        Stage("generic", ".loop.arms:run_generic", ("memories",), ("anchor", "sequences"), True),
        Stage("dense", ".loop.arms:run_dense", ("dense",), ("anchor", "sequences"), True),
        Stage("export", ".export:run_export", ("name", "export"), ("memories", "generic")),
        Stage("report", ".report:run_report", (), ("export", "dense")),
    )
}


RESTORE = "restore it from a copy, or give another --out"
VERSION = 2  # of done.json: raised when keys of the recipe come, which then have a default here
NEW_IN_2 = (
    ("tree", "prompts", 0),
    ("memories", "group_by_subtree", False),
    ("dense", "group_by_subtree", False),
)
OPTIONS = {"corpus": "--corpus", "table": "--facts"}  # by what functions are bound to
# Files of a stage that no other stage reads.
CHECKED = ".checked.json"  # how the files of a finished stage were when they were last read
OWN = ("done.json", "lock", "log.jsonl", "loss.jsonl", "checkpoint.safetensors", "vectors.npy")
ANCHOR_STAGES = ("corpus", "tokenizer", "windows", "anchor-sequences", "anchor")


def stages_of(recipe: Recipe) -> dict[str, Stage]:
    """The stages that the recipe has: all, or those that make an anchor alone."""
    if not recipe.anchor_only:
        return STAGES
    stages = {name: STAGES[name] for name in ANCHOR_STAGES}
    stages["export"] = replace(STAGES["export"], needs=("anchor",))
    stages["report"] = replace(STAGES["report"], needs=("export",))
    return stages


def _sections(stage: Stage, stages: dict[str, Stage]) -> set[str]:
    """The parts of the recipe that the stage depends on, by itself or by what it reads."""
    needs = (_sections(stages[name], stages) for name in stage.needs)
    return set(stage.sections).union(*needs)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _made_with(stage: Stage, recipe: Recipe) -> dict[str, Any]:
    return recipe.sections(sorted(_sections(stage, stages_of(recipe))))


def identity(stage: Stage, recipe: Recipe) -> str:
    """What the stage's files follow from: two stages of one identity are the same."""
    return _digest(_made_with(stage, recipe))


def _read_done(path: Path) -> dict[str, Any]:
    """A ``done.json``, the parts of the recipe in one of version 1 with the keys that it left out
    where they had no effect."""
    done = read_sealed(path, RESTORE)
    if not all(isinstance(done.get(name, {}), dict) for name in ("recipe", "files", "of")):
        raise UserError(f"{path} is damaged", repr(done)[:80], RESTORE)
    recipe = done.setdefault("recipe", {})
    version = done.get("version", 1)
    if version not in (1, VERSION):
        remedy = "update mlx_hmem, or give another --out"
        raise UserError(f"{path} has a version this program does not read", version, remedy)
    if version == 1:
        for part, name, value in NEW_IN_2:
            if isinstance(recipe.get(part), dict):
                recipe[part].setdefault(name, value)
    return {"files": {}, "of": {}, **done}


def identity_made(folder: Path) -> str | None:
    """The :func:`identity` of the finished stage in ``folder``; None if it is not finished."""
    done = folder / "done.json"
    return _digest(_read_done(done)["recipe"]) if done.exists() else None


def take_stage(stage: Stage, recipe: Recipe, folder: Path, others: Iterable[Path]) -> bool:
    """Takes the stage from a run among ``others`` that finished it with the same recipe; False if
    there is none. Its files become hard links, for a finished stage is only read; copies where the
    file system has no links. The corpus folder is not in the recipe: it must be the same too."""
    for other in others:
        if identity_made(other / stage.name) != identity(stage, recipe):
            continue
        shutil.rmtree(folder / stage.name, ignore_errors=True)
        options: Any = {"copy_function": link_or_copy, "dirs_exist_ok": True}
        locks = shutil.ignore_patterns("lock", "lock.mdb", "writer.lock", CHECKED)
        with whole_folder(folder / stage.name) as part:
            shutil.copytree(other / stage.name, part, ignore=locks, **options)
        return True
    return False


def is_done(stage: Stage, recipe: Recipe, folder: Path) -> bool:
    """Whether the stage is finished; one that was made with another recipe is refused."""
    path = folder / stage.name / "done.json"
    if not path.exists():
        return False
    wanted = _made_with(stage, recipe)
    made_with = _read_done(path)["recipe"]
    if _digest(wanted) == _digest(made_with):
        return True
    changed = [name for name in wanted if _digest(wanted[name]) != _digest(made_with.get(name))]
    raise UserError(
        f"stage {stage.name} in {folder} was made with another recipe",
        f"changed: {', '.join(changed) or 'the stages'}",
        "go on with the recipe that it was made with, or give another --out",
    )


def mark_done(stage: Stage, recipe: Recipe, folder: Path, of: dict[str, str] | None = None) -> None:
    """``of``: what it read from outside, see :func:`_given`."""
    files = (path for path in sorted((folder / stage.name).iterdir()) if path.is_file())
    kept = (file for file in files if file.name not in OWN and file.name[0] != ".")
    values = {
        "stage": stage.name,
        "version": VERSION,
        "recipe": _made_with(stage, recipe),
        "of": of or {},
        "files": {file.name: fingerprint(file, whole=True) for file in kept},
    }
    text = json.dumps(sealed(values), indent=2)
    write_atomic(folder / stage.name / "done.json", text + "\n")


def _state(path: Path) -> list[int]:
    """What changes whenever somebody writes into a file. A program can put back the time of the
    change of its bytes, and so hide an edit that leaves the size, but not that of its inode."""
    try:
        info = path.stat()
    except OSError as error:
        raise UserError("a file of a finished stage is missing", error, RESTORE) from None
    return [info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns]


def check_files(stage: Stage, folder: Path) -> None:
    """Raises UserError unless a finished stage's files are what it has left. Each is read whole
    once, and again when its state is another than it was then: of gigabytes that takes minutes."""
    place, seen, found = folder / stage.name, dict[str, Any](), dict[str, Any]()
    with contextlib.suppress(UserError):
        seen = read_sealed(place / CHECKED, RESTORE)
    for name, wanted in _read_done(place / "done.json")["files"].items():
        found[name] = [wanted, *_state(place / name)]
        if seen.get(name) == found[name]:
            continue
        if fingerprint(place / name, whole=True) != wanted:
            wrong = f"a file of the finished stage {stage.name} was changed or is damaged"
            raise UserError(wrong, place / name, RESTORE)
        with open_regular(place / name) as file:
            sync(file)  # what was read may be in memory alone
    if found != seen:
        with contextlib.suppress(UserError, OSError):  # another rank, or a disk to read only
            write_atomic(place / CHECKED, json.dumps(sealed(found)) + "\n")


def _given(function: Callable[..., None]) -> dict[str, str]:
    """Fingerprints of the files and folders that a stage's function is bound to, by name."""
    given = dict[str, str]()
    for name, path in getattr(function, "keywords", {}).items():
        if isinstance(path, Path):
            given[name] = "unreadable"
            # What is passed over or missing is said when it is read.
            with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(UserError):
                files = [f.path for f in corpus_files(path)] if path.is_dir() else [path]
                given[name] = fingerprint(*files)
    return given


def _check_given(stage: Stage, folder: Path, function: Callable[..., None]) -> None:
    """Raises UserError if a finished stage was made of other files than it is given now."""
    made_of = _read_done(folder / stage.name / "done.json")["of"]
    for name, found in _given(function).items() if made_of else ():
        if made_of.get(name) != found:
            wrong = f"stage {stage.name} in {folder} was made of other files"
            option = OPTIONS[name]
            remedy = f"leave {option} out to go on with those, or give another --out"
            raise UserError(wrong, f"{option} names others", remedy)


def alone(what: str, folder: Path) -> AbstractContextManager[Any]:
    """One process that does ``what`` in ``folder``."""
    running = f"{what} is running in another process"
    return locked(folder / "lock", UserError(running, folder, "wait for it, or stop it first"))


def check_needs(stage: Stage, recipe: Recipe, folder: Path) -> None:
    """Raises UserError unless the stages whose files it reads are done, and these as they were."""
    stages = stages_of(recipe)
    for need in stage.needs:
        if not is_done(stages[need], recipe, folder):
            remedy = "run without --only first"
            raise UserError(f"stage {stage.name} needs a stage that is not done", need, remedy)
        check_needs(stages[need], recipe, folder)
        check_files(stages[need], folder)


def run_stages(
    recipe: Recipe,
    folder: Path,
    names: list[str],
    functions: dict[str, Callable[..., None]] | None = None,
    watching: Watching = UNWATCHED,
) -> None:
    """Runs the named stages in order, skipping those that are done.

    Of several ranks the first one of each machine runs a stage, all of them one that trains or that
    is shared out.
    ``functions`` stand in for the stages' own; the corpus folder is bound that way.
    """
    ranks = Ranks.meet(folder)
    stages = stages_of(recipe)
    for name in names:
        if name not in stages:
            if ranks.first:
                print(f"{name}: the recipe trains an anchor alone")
            continue
        stage = stages[name]
        function = (functions or {}).get(name)
        done = ranks.gather(is_done(stage, recipe, folder))
        if function is not None and done[ranks.rank]:
            _check_given(stage, folder, function)
        if all(done):
            if ranks.first:
                print(f"{name}: done before, in {folder / name}")
            continue
        if stage.together and any(done):
            raise UserError(
                f"stage {name} is done on some machines only",
                f"ranks {[rank for rank, is_there in enumerate(done) if is_there]}",
                "copy the folder of the run to all of them",
            )
        check_needs(stage, recipe, folder)
        function = function or stage.load()
        company = ((ranks,) if stage.together else ()) + ((watching,) if stage.trains else ())
        os.makedirs(folder / name, exist_ok=True)
        if ranks.first and not done[ranks.rank]:
            with alone(f"stage {name}", folder / name):
                of = _given(function)
                function(recipe, folder, *company)
                mark_done(stage, recipe, folder, of)
        elif stage.together:
            with contextlib.redirect_stdout(None):
                function(recipe, folder, *company)
        ranks.wait()
