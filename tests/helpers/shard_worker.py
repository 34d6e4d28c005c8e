"""One rank of tests/train/test_shards.py: makes shards, and says which process made each."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from train.corpus.shards import Advance, Shard, make_shards
from train.ranks import Ranks


def square(path: Path, task: tuple[int, float], advance: Advance) -> None:
    """Writes the square of a number after some seconds; refuses 13."""
    number, seconds = task
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
        advance(0)
    if number == 13:
        raise UserError("an unlucky number", number, "take another")
    write_atomic(path, str(number**2))
    log = path.parent.parent / "log"
    with log.open("a") as file:
        file.write(f"{number} {os.getpid()}\n")
    advance(1)


def squares(folder: Path, numbers: list[int], seconds: float, **options: Any) -> list[int]:
    shards = [Shard((number, seconds), 1) for number in numbers]
    files = make_shards(
        folder / "shards", Ranks.meet(folder), square, shards, numbers, desc="squares", unit="",
        **options,
    )  # fmt: skip
    return [int(file.read_text()) for file in files]


if __name__ == "__main__":
    kind, out, *rest = sys.argv[1:]
    rank = int(os.environ.get("MLX_RANK", 0))
    # Machines have folders of their own, ranks on one machine the same.
    place = Path(out) / (f"machine-{rank}" if kind == "apart" else "machine")
    place.mkdir(parents=True, exist_ok=True)
    print(squares(place, [int(n) for n in rest[1:]], float(rest[0])), flush=True)
