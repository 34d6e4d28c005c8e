"""Do the programs do here what they do elsewhere? Each is run as a person runs it."""

import importlib.util
import subprocess
import sys
import time
from pathlib import Path

from mlx_hmem.model.load import load

from .found import Found, SkippedError

NOTES = {
    "harbour": "The password of the old harbour is seagull. It was changed when the ferry came.",
    "mill": "The mill at Orbeck has nine wheels. Three of them are of oak, the others of iron.",
    "club": "The chess club of Tarnow meets on Thursdays. Its president is a retired pilot.",
}
ELEMENTS = {"tin": "50", "iron": "26"}
SOON = 0.6  # of the time of a whole run, after which one is killed


def program(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "mlx_hmem", *map(str, words)]


def run(words: list[str]) -> str:
    """What it prints. Where it fails, this process ends with its last words."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words[1:4])} … ended with {done.returncode}: {done.stderr}")
    return done.stdout


def files_of(folder: Path) -> dict[str, bytes]:
    own = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def training(work: Path) -> Found:
    """Three notes are remembered, twice: once undisturbed, once killed on the way and gone on."""
    if not all(importlib.util.find_spec(name) for name in ("lmdb", "yaml", "pathspec")):
        raise SkippedError("pip install 'mlx-hmem[remember]'")
    (work / "notes").mkdir()
    for name, text in NOTES.items():
        (work / "notes" / f"{name}.txt").write_text(text)

    def remember(out: str) -> list[str]:
        words = ("remember", work / "notes", "--model", "demo", "--out", work / out)
        return program(*words, "--passes", "6")

    began = time.perf_counter()
    run(remember("whole"))
    seconds = time.perf_counter() - began
    killed = _kill(remember("killed"), seconds * SOON, work / "killed")
    run(remember("killed"))
    wanted, found = files_of(work / "whole"), files_of(work / "killed")
    figures = {"seconds": seconds, "killed after": killed}
    if wanted == found:
        return Found(figures, said="killed and gone on, the same bits as undisturbed")
    run(remember("again"))
    twice = files_of(work / "again") == wanted
    which = "killed and gone on, other bits" if twice else "two undisturbed runs, other bits"
    names = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    return Found(figures, f"{which}: {', '.join(names)[:200]}")


def _kill(words: list[str], seconds: float, out: Path) -> float:
    """Kills a program after so many seconds, sooner where it has ended by then."""
    while True:
        started = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            started.wait(seconds)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
            return seconds
        out.rename(out.with_name(f"ended in {seconds:.2f}"))
        Path(f"{out}.run").rename(out.with_name(f"ended in {seconds:.2f}.run"))
        seconds /= 2


def bundle(work: Path) -> Found:
    """The demo says what it says elsewhere, and as a bundle for a phone the same."""
    model, wrong = load(), list[str]()
    sizes = ("--context", "128", "--prefill", "32")
    run(program("convert", "bundle", "demo", work / "bundle", *sizes))
    for element, number in ELEMENTS.items():
        prompt = f"The atomic number of {element} is"
        said = "".join(piece.text for piece in model.stream(prompt, max_tokens=4))
        recorded = [sys.executable, str(work / "bundle" / "run.py"), prompt, "--max-tokens", "4"]
        if not said.strip().startswith(number):
            wrong.append(f"{prompt}: {said!r} in place of {number}")
        if (other := run(recorded).strip()) != said.strip():
            wrong.append(f"{prompt}: {said!r}, as a bundle {other!r}")
    return Found({"answers": len(ELEMENTS)}, "; ".join(wrong))
