"""What a training shows while it runs: a bar, the file ``log.jsonl``, and reports elsewhere.

A line of ``log.jsonl`` is one of

    {"step", "loss", "learning_rate", "tokens_per_s", "seconds", "peak_memory_bytes",
     "peak_resident_bytes"}
    {"step", "validation": {"none", "generic", "fetched"}}

``step`` counts the steps done. ``loss`` and ``tokens_per_s`` are means over the steps since the
line before, ``seconds`` the time of all steps so far, also of earlier starts, validation left out.
``peak_memory_bytes`` is what MLX had allocated at most in this stage, ``peak_resident_bytes`` what
the process had in memory at most (on a Mac they overlap in part: memory is unified).

Lines are appended as the run goes. One that goes on from a checkpoint cuts off what was logged
after it, so no step is there twice.
"""

import importlib
import importlib.util
import json
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
from tqdm import tqdm

from mlx_hmem.budget.resident import peak_resident_bytes
from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic

from ..store.checkpoint import Progress

LOG_EVERY = 20  # steps
# Short enough for 80 columns.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
RECENT = 100  # steps that the bar's figures are means over
SERVICES = ("wandb", "swanlab")  # those of mlx-lm's --report-to


@dataclass(frozen=True)
class Reporting:
    """Where else the log goes: services of mlx-lm's ``--report-to``, separated by commas. Raises
    UserError unless they are installed. Each stage is a run there, under its name."""

    report_to: str
    project_name: str

    def __post_init__(self) -> None:
        for name in self.services:
            if name not in SERVICES:
                raise UserError(
                    "no such service to report to", name, f"use {' or '.join(SERVICES)}"
                )
            if importlib.util.find_spec(name) is None:
                raise UserError(
                    f"reporting to {name} needs its package",
                    "it is not installed",
                    f"pip install {name}",
                )

    @property
    def services(self) -> list[str]:
        return [name.strip().lower() for name in self.report_to.split(",")]

    def begin(self, folder: Path, config: dict[str, Any]) -> Any:
        """A callback of mlx-lm that takes records."""
        from mlx_lm.tuner.callbacks import get_reporting_callbacks

        values: Any = config  # mlx-lm's own hint says str
        try:
            return get_reporting_callbacks(self.report_to, self.project_name, str(folder), values)
        except Exception as error:  # whatever the service has: no network, no account
            remedy = "log in there, or leave --report-to out: log.jsonl holds the same"
            raise UserError(f"{self.report_to} does not begin", error, remedy) from None

    def end(self) -> None:
        for name in self.services:
            importlib.import_module(name).finish()


@dataclass(frozen=True)
class Watching:
    """What looks on while a stage trains: where else its log goes, and what is called after each
    step, which may end the run."""

    reporting: Reporting | None = None
    check: Callable[[], object] = bool


UNWATCHED = Watching()


class Log:
    """The log of one training in ``folder``, from ``progress`` on.

    Args:
        shown: whether this process is the one that shows anything.
    """

    def __init__(
        self,
        folder: Path,
        progress: Progress,
        num_steps: int,
        tokens_per_step: int,
        shown: bool = True,
        reporting: Reporting | None = None,
    ):
        self.progress, self.num_steps, self.tokens_per_step = progress, num_steps, tokens_per_step
        self.folder, self.shown, self.reporting = folder, shown, reporting
        self.name: str = progress.identity["stage"]
        self.callback, self.seconds = None, 0.0

    def __enter__(self) -> Self:
        mx.reset_peak_memory()
        done = self.progress.step
        if self.shown:
            self._cut()
            if self.reporting is not None:
                self.callback = self.reporting.begin(self.folder, self.progress.identity)
        self.bar = tqdm(
            total=self.num_steps,
            initial=done,
            desc=self.name,
            disable=not self.shown,
            dynamic_ncols=True,
            bar_format=BAR,
        )
        self.recent: deque[float] = deque(maxlen=RECENT)  # seconds of steps
        self.logged, self.logged_seconds = done, self.seconds
        self.mark = time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.callback is not None and self.reporting is not None:
            self.reporting.end()

    def step(self, complete: bool) -> None:
        """After each step; ``complete`` if everything up to it is to be in the file now."""
        now = time.perf_counter()
        self.recent.append(now - self.mark)
        self.seconds, self.mark = self.seconds + now - self.mark, now
        if not self.shown:
            return
        self.bar.set_postfix_str(self._figures(), refresh=False)
        self.bar.update()
        done = self.progress.step
        if complete or done % LOG_EVERY == 0:
            passed = self.seconds - self.logged_seconds
            record = {
                "step": done,
                "loss": _mean_loss(self.progress, done - self.logged),
                "learning_rate": self.progress.curve[-1][2] if self.progress.curve else None,
                "tokens_per_s": round((done - self.logged) * self.tokens_per_step / passed, 1),
                "seconds": round(self.seconds, 3),
                "peak_memory_bytes": mx.get_peak_memory(),
                "peak_resident_bytes": peak_resident_bytes(),
            }
            self._append(record)
            self.logged, self.logged_seconds = done, self.seconds
            if self.callback is not None:
                self.callback.on_train_loss_report({"iteration": done, **record})

    def validated(self, perplexities: dict[str, float]) -> None:
        """After a validation, of which nothing is counted as time of a step."""
        done = self.progress.step
        values = {name: round(value, 4) for name, value in perplexities.items()}
        self._append({"step": done, "validation": values})
        each = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        self.bar.write(f"{self.name}: validation perplexity at step {done}: {each}")
        if self.callback is not None:
            report = {f"validation/{name}": value for name, value in values.items()}
            self.callback.on_val_loss_report({"iteration": done, **report})
        self.mark = time.perf_counter()

    def _figures(self) -> str:
        loss = _mean_loss(self.progress, RECENT)
        speed = len(self.recent) * self.tokens_per_step / sum(self.recent)
        memory = max(mx.get_peak_memory(), peak_resident_bytes())
        shown = "-" if loss is None else f"{loss:.3f}"
        return f"loss {shown}, {speed:,.0f} tok/s, {memory / 1e9:.3g} GB"

    def _cut(self) -> None:
        """Leaves what was logged up to the checkpoint, and how long that took."""
        path, kept = self.folder / "log.jsonl", []
        if path.exists() and self.progress.step:
            records = read_log(path)
            kept = [record for record in records if record["step"] <= self.progress.step]
        seconds = [record.get("seconds") for record in kept]
        self.seconds = max((s for s in seconds if isinstance(s, float)), default=0.0)
        write_atomic(path, "".join(_line(record) for record in kept))

    def _append(self, record: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(_line(record))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log, up to a line that a kill cut off."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records


def _mean_loss(progress: Progress, steps: int) -> float | None:
    """Over those of the last ``steps`` steps that were not skipped."""
    first = progress.step - steps
    losses = [loss for step, loss, _ in progress.curve[-steps:] if step >= first] if steps else []
    return round(sum(losses) / len(losses), 5) if losses else None


def _line(record: dict[str, Any]) -> str:
    """Strict JSON: what is not finite is null."""
    values = {
        name: {k: v if math.isfinite(v) else None for k, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in record.items()
    }
    return json.dumps(values) + "\n"
