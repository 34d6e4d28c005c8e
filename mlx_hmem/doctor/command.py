"""What this machine is, whether all is well on it, and how fast it is.

A minute or two of checks; nothing is downloaded, and what is written names neither you nor the
machine nor a folder. doctor.html is the page to look at, doctor.json what to send along with a
report.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from mlx_hmem.errors import ArgumentParser
from mlx_hmem.files import write_atomic

from .checks import CHECKS, Outcome, outcome_of
from .machine import describe
from .page import number, page_of


def main(words: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="mlx_hmem.doctor", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for both files")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK",
                        help=f"of {', '.join(CHECKS)}")  # fmt: skip
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    began, machine = time.time(), describe()
    print("\n".join(f"{name:<18}{value}" for name, value in machine.items()), end="\n\n")
    outcomes = list[Outcome]()
    for name in tqdm(args.only, unit=" checks", leave=False):
        outcomes.append(outcome_of(name))
        tqdm.write(line_of(outcomes[-1]))
    result = {
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "machine": machine,
        "checks": [asdict(outcome) for outcome in outcomes],
    }
    write_atomic(args.out / "doctor.json", json.dumps(result, indent=1))
    write_atomic(args.out / "doctor.html", page_of(result))
    print(f"\n{args.out / 'doctor.html'}: open it in a browser; doctor.json goes with a report")
    if any(outcome.status in ("wrong", "failed") for outcome in outcomes):
        raise SystemExit(1)


def line_of(outcome: Outcome) -> str:
    figures = ", ".join(f"{name} {number(value)}" for name, value in outcome.figures.items())
    said = "; ".join(part for part in (outcome.said.replace("\n", " "), figures) if part)
    return f"{outcome.status:<8}{outcome.name:<19}{outcome.seconds:4.0f} s  {said}"
