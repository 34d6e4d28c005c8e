"""A step of remembering on an open anchor, against the same step in plain PyTorch, one core each.

``python -m benchmarks.own.step MODEL [--json]``

Memory in every layer's FFN on the frozen anchor, four documents of about 150 tokens at a time, the
loss of the next token, AdamW; once more with some of the vocabulary, as remembering does. Each
program runs in a process of its own. Time is by the real token, padding not counted; memory is the
resident peak. PyTorch, through transformers, is the reference.
"""

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.common.counting import in_own_process
from benchmarks.common.show import Result, benchmark
from mlx_hmem.anchors.load import load_anchor, read_config
from mlx_hmem.budget.resident import peak_resident_bytes
from train.recipe.recipe import TrainerConfig
from train.remember.plan import PART_TOKENS, new_memory
from train.step.candidates import candidates_for
from train.step.gradient import Ragged
from train.step.memories import MemoryTrainee
from train.store.blocks import BlockStore

LENGTHS = np.array([160, 154, 149, 145])


def in_mlx(model: Path, steps: int, some: bool) -> dict[str, Any]:
    """Seconds of each step but the first, which compiles; with the whole vocabulary or ``some`` of
    it."""
    memory = new_memory(read_config(model), (2,))
    anchor, _ = load_anchor(model)
    tokens = np.random.default_rng(0).integers(10, memory.hidden_size, (4, 161)).astype(np.uint32)
    ragged, paths = Ragged(np.ones(4), LENGTHS, PART_TOKENS), np.zeros((4, 1), np.int32)
    training, times = TrainerConfig(batch_size=1, document_mask=False), list[float]()
    candidates = candidates_for(anchor, [*tokens], tokens) if some else None
    with tempfile.TemporaryDirectory() as folder, BlockStore(Path(folder), memory, 0) as store:
        trainee = MemoryTrainee(anchor, store, tokens, paths, 1, training, ragged=ragged)
        for _ in range(steps + 1):
            start = time.process_time()
            drawn = None if candidates is None else candidates.draw(np.random.default_rng(0))
            trainee.step(np.arange(4), 1e-3, drawn=drawn)
            times.append(time.process_time() - start)
    return {"seconds": times[1:], "peak": peak_resident_bytes()}


def in_torch(model: Path, steps: int) -> dict[str, Any]:
    """As :func:`in_mlx`; the documents as one padded batch."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    memory = new_memory(read_config(model), (2,))
    anchor: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    anchor.requires_grad_(False)
    parameters = list[nn.Parameter]()
    for layer in anchor.model.layers:
        own = [nn.Parameter(torch.randn(memory.r[0], memory.hidden_size) / 25) for _ in range(3)]
        layer.mlp.forward = _extended(layer.mlp, *own)
        parameters += own
    optimiser, times = torch.optim.AdamW(parameters, 1e-3), list[float]()
    tokens = torch.randint(10, memory.hidden_size, (4, 161))
    counts = torch.arange(1, 161) < torch.tensor(LENGTHS)[:, None]
    for _ in range(steps + 1):
        start = time.process_time()
        hidden = anchor.model(tokens[:, :-1], use_cache=False).last_hidden_state
        logits = anchor.lm_head(hidden[counts])
        nn.functional.cross_entropy(logits, tokens[:, 1:][counts]).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        times.append(time.process_time() - start)
    return {"seconds": times[1:], "peak": peak_resident_bytes()}


def _extended(mlp: Any, gate: Any, up: Any, down: Any) -> Any:
    before = mlp.forward
    return lambda x: before(x) + (mlp.act_fn(x @ gate.T) * (x @ up.T)) @ down


def measure(model: Path, steps: int = 3) -> Result:
    """``model``: a folder that transformers reads too. Time is that of the CPU, which hardly sees
    other work on the machine."""
    real, rows = int((LENGTHS - 1).sum()), {}
    programs: dict[str, tuple[Any, ...]] = {
        "MLX": (in_mlx, model, steps, False),
        "MLX, some of the vocabulary": (in_mlx, model, steps, True),
        "PyTorch": (in_torch, model, steps),
    }
    for name, program in programs.items():
        found = in_own_process(*program)
        rows[name] = {
            "ms_a_token": 1e3 * median(found["seconds"]) / real,
            "peak_gb": found["peak"] / 1e9,
        }
    for row in rows.values():
        row["of_PyTorch"] = row["ms_a_token"] / rows["PyTorch"]["ms_a_token"]
    return {"tokens": real, "a step": rows}


if __name__ == "__main__":
    benchmark(__doc__, measure)
