"""The optimiser loop that every training stage shares: schedule, checkpoints, progress.

The trainee saves its whole state together with how far the run has come, in one piece, so a killed
run goes on from there bit for bit. The order of sequences is that of :mod:`train.order`.
"""

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic
from train.checkpoint import Progress
from train.order import Batch, Order
from train.recipe import TrainerConfig

MOST_SKIPPED = 10


class Trainee(Protocol):
    """What a training stage brings: a step on some sequences, and where its state is kept."""

    @property
    def sizes(self) -> dict[str, Any]:
        """JSON values that the shapes of the state follow from."""

    def step(
        self, rows: np.ndarray, learning_rate: float, next_rows: np.ndarray | None = None
    ) -> tuple[float, float]:
        """Trains on the sequences numbered ``rows``; returns the mean loss in nats per token and
        the norm of the gradient before clipping. If either is not finite, the state stays as it
        was. ``next_rows``: those of the step after, for what can be fetched meanwhile."""

    def resume(self, folder: Path, identity: dict[str, Any]) -> Progress:
        """Takes up the state saved in ``folder``; it must be of the same ``identity``."""

    def save(self, folder: Path, progress: Progress) -> None:
        """Saves the state and ``progress`` so that ``folder`` holds either both or the last."""


def learning_rate_at(step: int, num_steps: int, config: TrainerConfig) -> float:
    """Linear warm-up, then cosine from the peak to ``final_learning_rate`` (paper, section 5)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    low = config.final_learning_rate
    return low + (config.learning_rate - low) * cosine


def train(
    trainee: Trainee,
    order: Order,
    config: TrainerConfig,
    folder: Path,
    name: str,
    made_from: dict[str, str] | None = None,
) -> Progress:
    """Runs or resumes a training to its end.

    Leaves what the trainee saves and ``loss.jsonl`` ({step, loss, learning_rate}) in ``folder``. A
    step whose loss or gradient is not finite is skipped, ``MOST_SKIPPED`` of them end the run.

    Args:
        made_from: fingerprints of the files it depends on; a run goes on only with the same ones.
    """
    identity = {
        "stage": name,
        **order.identity,
        "training": config.to_dict(),
        "sizes": trainee.sizes,
        "files": made_from or {},
    }
    folder.mkdir(parents=True, exist_ok=True)
    progress = trainee.resume(folder, json.loads(json.dumps(identity)))
    if progress.step:
        _write_curve(folder, progress)
    batch = order.batch(progress.step)
    with tqdm(total=order.num_steps, initial=progress.step, desc=name, unit="step") as bar:
        while progress.step < order.num_steps:
            following = order.batch(progress.step + 1)
            _one_step(trainee, batch, following, progress, config)
            batch = following
            if progress.step % config.save_every == 0 or progress.step == order.num_steps:
                trainee.save(folder, progress)
                _write_curve(folder, progress)
            bar.update()
            if progress.curve and (progress.step % 20 == 0 or progress.step == order.num_steps):
                recent = [row[1] for row in progress.curve[-100:]]
                bar.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
    if progress.skipped:
        print(f"{name}: {progress.skipped} steps skipped, their loss or gradient was not finite")
    return progress


def _one_step(
    trainee: Trainee, batch: Batch, following: Batch, progress: Progress, config: TrainerConfig
) -> None:
    rate = learning_rate_at(batch.step, batch.num_steps, config)
    loss, norm = trainee.step(batch.rows, rate, following.rows)
    if math.isfinite(loss) and math.isfinite(norm):
        progress.curve.append((progress.step, loss, rate))
    elif progress.skipped + 1 >= MOST_SKIPPED:
        raise UserError(
            f"{progress.identity['stage']}: loss or gradient is not finite",
            f"{loss}, {norm} at step {progress.step}, the {MOST_SKIPPED}th step skipped for that",
            "lower the learning rate and begin again in another folder",
        )
    progress.step += 1


def _write_curve(folder: Path, progress: Progress) -> None:
    lines = (
        json.dumps({"step": step, "loss": round(loss, 5), "learning_rate": rate})
        for step, loss, rate in progress.curve
    )
    write_atomic(folder / "loss.jsonl", "".join(line + "\n" for line in lines))
