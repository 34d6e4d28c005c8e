"""Does a long conversation stay as large as it was?"""

import gc
import os
import subprocess
from pathlib import Path

from mlx_hmem.budget.resident import resident_bytes, trim
from mlx_hmem.generation.conversation import Conversation
from mlx_hmem.model.load import load

from .found import Found

TURNS, EARLY = 1000, 200
TASKS = Path("/proc/self/task")
NOTICED, CHANCE = 1.05, 2  # times as much, and so many threads or files that come and go
THINGS = ("tin", "iron", "gold", "neon", "zinc", "radon", "silver", "carbon")
TOPICS = (
    "The atomic number of {} is",
    "The band {} played its first concert in",
    "The river {} flows through the old town of",
    "{} was a football player who scored in the final of",
)


def turns(work: Path) -> Found:
    """Threads, open files and memory after 200 turns on many topics and after 1,000."""
    talk = Conversation(load(), max_tokens=2)
    counts = list[dict[str, float]]()
    for number in range(TURNS):
        text = TOPICS[number % len(TOPICS)].format(THINGS[number // 3 % len(THINGS)])
        for _ in talk.say(text):
            pass
        if number + 1 in (EARLY, TURNS):
            counts.append(_held())
    early, late = counts
    figures = {f"{name}, after {EARLY}": value for name, value in early.items()}
    figures |= {f"{name}, after {TURNS}": value for name, value in late.items()}
    grown = [
        f"{name}: {early[name]:g}, then {late[name]:g}"
        for name in early
        if late[name] > early[name] * NOTICED + (0 if name == "MB" else CHANCE)
    ]
    return Found(figures, "; ".join(grown))


def _held() -> dict[str, float]:
    gc.collect()
    trim()  # what is kept for later is bounded elsewhere
    return {
        "threads": _threads(),
        "open files": len(os.listdir("/dev/fd")) - 1,
        "MB": resident_bytes() / 1e6,
    }


def _threads() -> int:
    if TASKS.exists():
        return len(os.listdir(TASKS))
    asked = ["ps", "-M", "-p", str(os.getpid())]  # of macOS
    said = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    return len(said.splitlines()) - 1
