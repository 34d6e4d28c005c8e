"""What this machine is, whether all is well on it, and how fast it is.

A minute or two of checks; nothing is downloaded, and what is written names neither you nor the
machine nor a folder. doctor.html is the page to look at, doctor.json what to send along with a
report.
"""

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from mlx_hmem.errors import ArgumentParser, UserError
from mlx_hmem.files import write_atomic

from .checks import CHECKS, Outcome, outcome_of
from .machine import describe
from .page import number, page_of

SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def main(words: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="mlx_hmem.doctor", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="the folder for both files")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), metavar="CHECK",
                        help=f"of {', '.join(CHECKS)}")  # fmt: skip
    args = parser.parse_args(words)
    args.out.mkdir(parents=True, exist_ok=True)
    if not os.access(args.out, os.W_OK | os.X_OK):
        raise UserError("the folder cannot be written into", args.out, "choose another by --out")
    began, machine = time.time(), describe()
    print("\n".join(f"{name:<18}{value}" for name, value in machine.items()), end="\n\n")
    outcomes, names = list[Outcome](), dict.fromkeys(args.only)
    with _ended_by_signals(), tqdm(names, unit=" checks", leave=False, disable=None) as bar:
        for name in bar:
            outcomes.append(outcome_of(name))
            bar.write(line_of(outcomes[-1]))
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


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What ends this program does so as Ctrl-C does: a check is a process that would go on."""
    ours = [each for each in SIGNALS if signal.getsignal(each) == signal.SIG_DFL]
    for each in ours:
        signal.signal(each, signal.default_int_handler)
    try:
        yield
    finally:
        for each in ours:
            signal.signal(each, signal.SIG_DFL)


def line_of(outcome: Outcome) -> str:
    figures = ", ".join(f"{name} {number(value)}" for name, value in outcome.figures.items())
    said = "; ".join(part for part in (outcome.said.replace("\n", " "), figures) if part)
    return f"{outcome.status:<8}{outcome.name:<19}{outcome.seconds:4.0f} s  {said}"
