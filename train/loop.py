"""The optimiser loop that every training stage shares: order of data, schedule, checkpoints.

One file, ``checkpoint.safetensors``, holds weights, moments, step and loss curve together and is
replaced in one rename, so a killed run goes on from its last checkpoint bit for bit. The order of
sequences follows from (seed, epoch) alone: arms with the same seed see the same rows in the same
order. Trade-off: the whole state is written each time; banks beyond memory need another store.
"""

import json
import math
from pathlib import Path
from typing import Protocol

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_hmem.anchors.openlm import document_mask
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, read_safetensors_header, save_safetensors, write_atomic
from train.recipe import TrainerConfig


class Trainee(Protocol):
    """What a training stage brings: a step on some sequences, and its whole state as arrays."""

    def step(self, rows: np.ndarray, learning_rate: float) -> tuple[float, float]:
        """Trains on the sequences numbered ``rows``; returns the mean loss in nats per token and
        the norm of the gradient before clipping."""

    def state(self) -> dict[str, mx.array]: ...

    def load_state(self, state: dict[str, mx.array]) -> None: ...


def learning_rate_at(step: int, num_steps: int, config: TrainerConfig) -> float:
    """Linear warm-up, then cosine from the peak to ``final_learning_rate`` (paper, section 5)."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    low = config.final_learning_rate
    return low + (config.learning_rate - low) * cosine


def masked_loss(logits: mx.array, tokens: mx.array, eot: int) -> mx.array:
    """Mean next-token cross-entropy in nats of ``tokens`` (batch, time + 1).

    Padding, an EOT that follows an EOT, does not count.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    counted = ((inputs != eot) | (targets != eot)).astype(mx.float32)
    picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    losses = mx.logsumexp(logits, axis=-1) - picked
    return (losses * counted).sum() / mx.maximum(counted.sum(), 1)


def packed_mask(inputs: mx.array, eot: int) -> mx.array:
    """Attention mask (batch, 1, time, time) of packed documents, each of which begins with EOT."""
    return document_mask(mx.cumsum((inputs == eot).astype(mx.int32), axis=1))


class Order:
    """The endless stream of sequence numbers: one seeded permutation an epoch."""

    def __init__(self, num_sequences: int, seed: int):
        self.num_sequences, self.seed = num_sequences, seed
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, rng.permutation(self.num_sequences)
        return int(self._permutation[offset])

    def batch(self, step: int, size: int) -> np.ndarray:
        return np.array([self._at(step * size + i) for i in range(size)])


def num_steps_of(num_sequences: int, config: TrainerConfig) -> int:
    return max(1, int(config.epochs * num_sequences) // config.batch_size)


def train(
    trainee: Trainee, num_sequences: int, config: TrainerConfig, folder: Path, seed: int, name: str
) -> dict[str, mx.array]:
    """Runs or resumes a training to its end; returns the final state.

    Leaves ``checkpoint.safetensors`` and ``loss.jsonl`` ({step, loss, learning_rate}) in
    ``folder``.
    """
    if num_sequences < 1:
        raise UserError("there is nothing to train on", folder, "use a larger corpus")
    num_steps = num_steps_of(num_sequences, config)
    identity = json.dumps([name, num_sequences, seed, config.to_dict()], sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    step, curve = _resume(trainee, folder, identity)
    order = Order(num_sequences, seed)
    with tqdm(total=num_steps, initial=step, desc=name, unit="step") as progress:
        while step < num_steps:
            rate = learning_rate_at(step, num_steps, config)
            loss, norm = trainee.step(order.batch(step, config.batch_size), rate)
            if not (math.isfinite(loss) and math.isfinite(norm)):  # never reaches a checkpoint
                raise UserError(
                    f"{name}: loss or gradient is not finite",
                    f"{loss}, {norm} at step {step}",
                    "lower the learning rate and run again from the last checkpoint",
                )
            curve.append((step, loss, rate))
            step += 1
            if step % config.save_every == 0 or step == num_steps:
                _save(trainee, folder, identity, step, curve)
            progress.update()
            if step % 20 == 0 or step == num_steps:
                recent = [row[1] for row in curve[-100:]]
                progress.set_postfix(loss=f"{sum(recent) / len(recent):.3f}")
    return trainee.state()


def _save(
    trainee: Trainee, folder: Path, identity: str, step: int, curve: list[tuple[int, float, float]]
) -> None:
    rows = np.array(curve, np.float64)
    # MLX has no float64 on every device: the curve travels as bytes.
    state = trainee.state() | {"curve": mx.array(rows.view(np.uint8))}
    metadata = {"step": str(step), "identity": identity}
    save_safetensors(folder / "checkpoint.safetensors", state, metadata)
    lines = (
        json.dumps({"step": int(s), "loss": round(loss, 5), "learning_rate": rate})
        for s, loss, rate in curve
    )
    write_atomic(folder / "loss.jsonl", "".join(line + "\n" for line in lines))


def _resume(
    trainee: Trainee, folder: Path, identity: str
) -> tuple[int, list[tuple[int, float, float]]]:
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0, []
    _, metadata = read_safetensors_header(path)
    if metadata.get("identity") != identity:
        raise UserError(
            f"{path} belongs to another run",
            f"made with {metadata.get('identity')}, now {identity}",
            "use another --out or delete the folder of this stage",
        )
    state = load_safetensors(path)
    rows = np.array(state.pop("curve")).view(np.float64).reshape(-1, 3)
    trainee.load_state(state)
    return int(metadata["step"]), [(int(s), float(loss), float(rate)) for s, loss, rate in rows]
