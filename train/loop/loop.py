"""The optimiser loop that every training stage shares: schedule, checkpoints, validation, log.

The trainee saves its whole state together with how far the run has come, in one piece, so a killed
run goes on from there bit for bit; one that is stopped saves first. The order of sequences is that
of :mod:`train.data.order`.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_hmem.errors import UserError
from mlx_hmem.files import write_atomic

from ..data.order import Batch, Order
from ..recipe.recipe import TrainerConfig
from ..step.gradient import is_finite
from ..step.trainee import Trainee
from ..store.checkpoint import LOWER, VERSION, Progress
from .log import UNWATCHED, Log, Watching
from .stopping import Stopping

MOST_SKIPPED = 10


def learning_rate_at(step: int, num_steps: int, config: TrainerConfig) -> float:
    """Linear warm-up, then cosine from the peak to ``final_learning_rate`` (paper, section 5)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    low = config.final_learning_rate
    return low + (config.learning_rate - low) * cosine


def identity_of(
    name: str,
    order: Order,
    config: TrainerConfig,
    own: dict[str, Any],
    made_from: dict[str, str] | None = None,
) -> dict[str, Any]:
    """What a run is made from, as JSON values: see :func:`train`. ``own``: the trainee's."""
    values = {
        "version": VERSION,
        "stage": name,
        **order.identity,
        "training": config.numbers(),
        **own,
        "files": made_from or {},
    }
    result: dict[str, Any] = json.loads(json.dumps(values))
    return result


def train(
    trainee: Trainee,
    order: Order,
    config: TrainerConfig,
    folder: Path,
    name: str,
    made_from: dict[str, str] | None = None,
    validate: Callable[[], dict[str, float]] | None = None,
    watching: Watching = UNWATCHED,
) -> Progress:
    """Runs or resumes a training to its end.

    Leaves what the trainee saves, ``loss.jsonl`` ({step, loss, learning_rate}) and ``log.jsonl``
    (:mod:`train.loop.log`) in ``folder``. A step whose loss or gradient is not finite is skipped,
    ``MOST_SKIPPED`` of them end the run.

    Args:
        made_from: fingerprints of the files it depends on; a run goes on only with the same ones.
        validate: gives the perplexity with each memory: before the first step, every
            ``validate_every`` steps and after the last. Rank 0 calls it.
    """
    identity = identity_of(name, order, config, trainee.identity, made_from)
    folder.mkdir(parents=True, exist_ok=True)
    ranks, progress = trainee.ranks, trainee.resume(folder, identity)
    if progress.step and ranks.first:
        _write_curve(folder, progress)
    batch, num_steps = order.batch(progress.step), order.num_steps
    tokens_per_step = config.batch_size * (trainee.tokens.shape[1] - 1)
    shown = ranks.rank == 0
    with (
        Stopping(alone=ranks.size == 1) as stopping,
        Log(folder, progress, num_steps, tokens_per_step, shown, watching.reporting) as log,
    ):
        if shown and validate is not None and progress.step == 0:
            log.validated(validate())
        while progress.step < num_steps:
            following = order.batch(progress.step + 1)
            _one_step(trainee, batch, following, progress, config)
            watching.check()
            batch, ended = following, progress.step == num_steps
            stops = stopping.asked
            saves = ended or stops or progress.step % config.save_every == 0
            # Before the checkpoint: all that was shown up to it is there if the run goes on.
            log.step(saves)
            due = config.validate_every > 0 and progress.step % config.validate_every == 0
            if shown and validate is not None and (due or ended):
                log.validated(validate())
            if saves:
                trainee.save(folder, progress)
                if ranks.first:
                    _write_curve(folder, progress)
            if stops and not ended:
                raise KeyboardInterrupt
    if progress.skipped:
        print(f"{name}: {progress.skipped} steps skipped, their loss or gradient was not finite")
    return progress


def _one_step(
    trainee: Trainee, batch: Batch, following: Batch, progress: Progress, config: TrainerConfig
) -> None:
    rate = learning_rate_at(batch.step, batch.num_steps, config)
    loss, norm = trainee.step(batch.rows, rate, following.rows)
    if is_finite(loss, norm):
        progress.curve.append((progress.step, loss, rate))
    elif progress.skipped + 1 >= MOST_SKIPPED:
        raise UserError(
            f"{progress.identity['stage']}: loss or gradient is not finite",
            f"{loss}, {norm} at step {progress.step}, the {MOST_SKIPPED}th step skipped for that",
            LOWER,
        )
    progress.step += 1


def _write_curve(folder: Path, progress: Progress) -> None:
    lines = (
        json.dumps({"step": step, "loss": round(loss, 5), "learning_rate": rate})
        for step, loss, rate in progress.curve
    )
    write_atomic(folder / "loss.jsonl", "".join(line + "\n" for line in lines))
