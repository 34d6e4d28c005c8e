"""How far a run has come, and the checkpoint file of trainees whose whole state fits in memory.

``checkpoint.safetensors`` holds weights, moments, step and loss curve together and is replaced in
one rename. Trade-off: the whole state is written each time; blocks live in :mod:`.blocks` instead.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import xxhash

from mlx_hmem.bank.quantization import all_finite
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, read_safetensors_header, save_safetensors

from ..ranks import Ranks
from .sound import damaged

CHECKPOINT = "checkpoint.safetensors"
VERSION = 2  # of an identity
LOWER = "lower the learning rate and begin again in another folder"
NEW_IN_2 = ("version", "cotrain", "files.sequences")


@dataclass
class Progress:
    """The place of a run: what it is made from, steps done, and (step, loss, learning rate) of each
    step that was not skipped."""

    identity: dict[str, Any]
    step: int = 0
    curve: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def skipped(self) -> int:
        return self.step - len(self.curve)

    def curve_array(self) -> np.ndarray:
        """The curve as bytes: MLX has no float64 on every device."""
        return np.array(self.curve, np.float64).reshape(-1, 3).view(np.uint8)

    @classmethod
    def load(cls, identity: str, step: int, curve: bytes) -> "Progress":
        rows = np.frombuffer(curve, np.float64).reshape(-1, 3)
        points = [(int(s), float(loss), float(rate)) for s, loss, rate in rows]
        return cls(json.loads(identity), step, points)


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raises UserError that names what differs unless both are the same run. What the identity of
    an older program did not say is not compared."""
    old, new = _flat(found), _flat(json.loads(json.dumps(wanted)))
    if "version" not in old:
        new = {key: value for key, value in new.items() if not key.startswith(NEW_IN_2)}
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key)]
    if changed:
        named = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed[:4]]
        more = [f"and {len(changed) - 4} more"] if len(changed) > 4 else []
        remedy = "go on with what it was begun with, or use another --out"
        raise UserError(f"{where} belongs to another run", ", ".join(named + more), remedy)


def check_finite(arrays: dict[str, mx.array], where: object, remedy: str) -> None:
    """Raises UserError for an array that is not finite: what is trained from it is lost."""
    for name, array in arrays.items():
        if not all_finite(array):
            raise UserError(f"{where} has numbers that are not finite", name, remedy)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        result |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return result


class CheckpointFile:
    """A trainee that keeps its state, ``arrays`` of its weights, in one file; all ``ranks`` that
    train it have the same."""

    ranks: Ranks
    weights: Any

    def resume(self, folder: Path, identity: dict[str, Any]) -> Progress:
        """Loads the state that ``folder`` holds; without one the run is at its beginning. Ranks
        that lag behind, as a kill can leave them, take over the state of the furthest."""
        progress = self._load(folder / CHECKPOINT, identity)
        steps = self.ranks.gather(progress.step)
        if len(set(steps)) == 1:
            return progress
        source = int(np.argmax(steps))
        self.weights.load(self.ranks.share(self.weights.arrays(), source))
        points = self.ranks.gather(len(progress.curve))[source]
        own = progress.curve if self.ranks.rank == source else [(0, 0.0, 0.0)] * points
        curve = mx.array(replace(progress, curve=own).curve_array())
        shared = np.array(self.ranks.share({"curve": curve}, source)["curve"])
        return Progress.load(json.dumps(identity), max(steps), shared.tobytes())

    def _load(self, path: Path, identity: dict[str, Any]) -> Progress:
        if not path.exists():
            return Progress(identity)
        _, metadata = read_safetensors_header(path)
        state = load_safetensors(path)
        # One of before there were checksums has none.
        if metadata.get("sum", "") not in ("", _sum_of(metadata, state)):
            raise damaged(path, "its checksum")
        check_identity(json.loads(metadata["identity"]), identity, path)
        curve = np.array(state.pop("curve")).tobytes()
        self.weights.load(state)
        return Progress.load(metadata["identity"], int(metadata["step"]), curve)

    def save(self, folder: Path, progress: Progress) -> None:
        metadata = {"step": str(progress.step), "identity": json.dumps(progress.identity)}
        check_finite(self.weights.arrays(), f"the anchor at step {progress.step}", LOWER)
        state = self.weights.arrays() | {"curve": mx.array(progress.curve_array())}
        if self.ranks.first:
            metadata["sum"] = _sum_of(metadata, state)
            save_safetensors(folder / CHECKPOINT, state, metadata)
        self.ranks.wait()


def _sum_of(metadata: dict[str, str], state: dict[str, mx.array]) -> str:
    """A checksum of all that a checkpoint says."""
    said = [metadata.get("step"), metadata.get("identity"), *sorted(state)]
    digest = xxhash.xxh3_128(json.dumps(said).encode())
    for _, array in sorted(state.items()):
        digest.update(np.array(array, copy=False).data)
    return digest.hexdigest()
