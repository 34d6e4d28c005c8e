"""Conversions that are killed, and started again."""

import random
import shutil
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from benchmarks.common.counting import run
from benchmarks.common.show import Result
from mlx_hmem.errors import UserError
from mlx_hmem.folders import RECORD, REPLACED
from tests.helpers.places import bytes_of

from .cases import Case, cases, whole_cases
from .training import killed, started

SHARD_BYTES = 512 << 10
NOTES = "bank/notes/"  # of a quantisation that is not at its end
Files = dict[str, bytes]


def files_of(place: Path) -> Files:
    return {"": place.read_bytes()} if place.is_file() else bytes_of(place)


def remove(place: Path) -> None:
    place.unlink() if place.is_file() else shutil.rmtree(place)


def written(part: Path) -> int:
    """When the file, or a folder's record, was written, as each run does anew; 0: there is none."""
    with suppress(OSError):
        return (part / RECORD if part.is_dir() else part).stat().st_mtime_ns
    return 0


def wait_for_writing(process: subprocess.Popen[bytes], part: Path, before: int) -> None:
    while process.poll() is None and written(part) in (0, before):
        time.sleep(0.001)


def is_whole(found: Files, wanted: Files, *beside: str) -> bool:
    more = [name for name in found if name not in wanted and not name.startswith(beside)]
    return not more and {name: found.get(name) for name in wanted} == wanted


def loads(case: Case, part: Path) -> bool:
    with suppress(UserError):
        case.load(part)
        return True
    return False


def check(case: Case, out: Path, part: Path, before: Files | None, wanted: Files) -> str:
    """What lies at the destination after a kill: "nothing", "before" or "whole"."""
    if part.exists() and loads(case, part):
        found = {name: data for name, data in files_of(part).items() if ".part" not in name}
        if not is_whole(found, wanted, RECORD, f"{REPLACED}/", NOTES):
            raise UserError("a half-made directory loads", part, "find out why")
    if not out.exists():
        return "nothing"
    found = files_of(out)
    if before is not None and found == before:
        case.load(out)
        return "before"
    # The record, and the folder of before, may still lie in it.
    if not is_whole(found, wanted, RECORD, f"{REPLACED}/"):
        raise UserError("a directory is neither old nor new", out, "find out why")
    case.load_result(out)
    return "whole"


def run_case(
    folder: Path, case: Case, rng: random.Random, kills: int, shard_bytes: int = SHARD_BYTES
) -> dict[str, int]:
    """Kills conversions of one case ``kills`` times in all; counts of what was found."""
    model = folder / f"{case.name}-undisturbed"
    start = time.perf_counter()
    process = started(case.command(model, shard_bytes))
    wait_for_writing(process, case.part(model), 0)
    began = time.perf_counter()
    if process.wait():
        raise UserError("a conversion fails undisturbed", case.name, "run it by hand")
    duration, write_time = (time.perf_counter() - at for at in (start, began))
    wanted, before = files_of(model), bytes_of(case.older) if case.older else None
    found = {"kills": 0, "while writing": 0, "runs": 0, "nothing": 0, "before": 0, "whole": 0}
    while found["kills"] < kills:
        out = folder / f"{case.name}-{found['runs']}"
        part = case.part(out)
        if case.older:
            shutil.copytree(case.older, out)
        arguments = case.command(out, shard_bytes)
        while found["kills"] < kills:
            writing = rng.random() < 0.5
            last, process = written(part), started(arguments)
            if writing:
                wait_for_writing(process, part, last)
            if not killed(process, rng.uniform(0, write_time if writing else duration)):
                break
            found["kills"] += 1
            found["while writing"] += writing
            found[check(case, out, part, before, wanted)] += 1
        if part.exists() or files_of(out) != wanted:
            run(arguments)
        if part.exists() or files_of(out) != wanted:
            raise UserError("a killed conversion came out otherwise", out, "find out why")
        case.load_result(out)
        found["runs"] += 1
        remove(out)
    return found


def conversions(kills: int = 20) -> Result:
    rng, found = random.Random(0), dict[str, dict[str, int]]()
    with tempfile.TemporaryDirectory() as name, tqdm(total=12, unit="case") as bar:
        for case in [*cases(Path(name)), *whole_cases(Path(name))]:
            found[case.name] = run_case(Path(name), case, rng, kills)
            bar.update()
    return {"conversions": found}
