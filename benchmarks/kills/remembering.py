"""Remembering a folder, and following it, that is killed, and started again."""

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.counting import run
from benchmarks.common.show import Result
from benchmarks.own.documents import make_documents
from mlx_hmem.errors import UserError
from mlx_hmem.folders import RECORD, REPLACED
from mlx_hmem.model.load import DEMO, load
from tests.helpers.places import bytes_of
from train.remember.sync.listed import CHECKED

from .training import killed, started

MEMORY = shutil.ignore_patterns("hmem.json", "bank", "retriever")
Files = dict[str, bytes]


def write_folder(folder: Path, texts: Sequence[str]) -> None:
    """Twelve notes, and a year later: two edited, one gone, one renamed, two new."""
    notes, later = folder / "first" / "notes", folder / "later" / "notes"
    notes.mkdir(parents=True)
    for number, text in enumerate(texts[:12]):
        (notes / f"{number:02}.txt").write_text(text)
    shutil.copytree(notes, later)
    (later / "03.txt").write_text(texts[12])
    (later / "04.txt").write_text(texts[4] + " It is closed on Mondays.")
    (later / "05.txt").unlink()
    (later / "06.txt").rename(later / "six.txt")
    for number in (13, 14):
        (later / f"{number}.txt").write_text(texts[number])


def command(folder: Path, anchor: Path) -> list[str]:
    words = [str(folder / "notes"), "--model", str(anchor), "--out", str(folder / "model")]
    return [sys.executable, "-m", "train", "remember", *words, "--passes", "2"]


def files_of(folder: Path) -> Files:
    """Of the model and its run, but what tells that a step is left."""
    found = bytes_of(folder)
    beside = ("notes/", f"model.run/{CHECKED}")
    return {name: data for name, data in found.items() if not name.startswith(beside)}


def model_of(files: Files) -> Files:
    beside = (RECORD, f"{REPLACED}/")
    pairs = ((name.removeprefix("model/"), name) for name in files if name.startswith("model/"))
    return {own: files[name] for own, name in pairs if not own.startswith(beside)}


def undisturbed(folder: Path, anchor: Path) -> tuple[float, Files]:
    """Seconds, and what comes out."""
    began = time.perf_counter()
    run(command(folder, anchor))
    return time.perf_counter() - began, files_of(folder)


def killing(
    start: Path, anchor: Path, seconds: float, wanted: Files, kills: int, rng: random.Random
) -> dict[str, int]:
    """Kills remembering ``start``, which lies there as it is, ``kills`` times in all."""
    before = model_of(files_of(start))
    found = dict.fromkeys(("kills", "runs", "nothing", "before", "whole"), 0)
    while found["kills"] < kills:
        folder = Path(shutil.copytree(start, start.with_name("killed")))
        while found["kills"] < kills and killed(
            started(command(folder, anchor)), rng.uniform(0, seconds)
        ):
            found["kills"] += 1
            model = model_of(files_of(folder))
            kinds = {"nothing": {}, "before": before, "whole": model_of(wanted)}
            state = next((name for name, own in kinds.items() if own == model), None)
            if state is None or (before and state == "nothing"):
                raise UserError("a model is neither old nor new", folder, "find out why")
            if model:
                load(folder / "model")
            found[state] += 1
        run(command(folder, anchor))
        if files_of(folder) != wanted or len([*folder.iterdir()]) != 3:
            raise UserError("a killed remembering came out otherwise", folder, "find out why")
        found["runs"] += 1
        shutil.rmtree(folder)
    return found


def remembering(kills: int = 20) -> Result:
    rng = random.Random(0)
    texts = [document.text for document in make_documents(15, seed=1)[0]]
    with tempfile.TemporaryDirectory() as name, tqdm(total=2, unit="case") as bar:
        folder, anchor = Path(name), Path(name) / "anchor"
        shutil.copytree(DEMO, anchor, ignore=MEMORY)
        write_folder(folder, texts)
        empty = Path(shutil.copytree(folder / "first", folder / "empty"))
        first = killing(empty, anchor, *undisturbed(folder / "first", anchor), kills, rng)
        bar.update()
        for part in ("model", "model.run"):
            shutil.copytree(folder / "first" / part, folder / "later" / part)
        later = Path(shutil.copytree(folder / "later", folder / "start"))
        update = killing(later, anchor, *undisturbed(folder / "later", anchor), kills, rng)
        bar.update()
    return {"remembering": {"a folder": first, "what has changed in it": update}}
