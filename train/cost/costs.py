"""What a recipe costs, reckoned from its numbers alone: parameters, bytes, memory, operations.

Sizes are exact. Bytes of the bank are those the export writes. Training state is float32 weights
and two moments of every block, as if each were touched.

Peak memory is that of MLX's arrays; the program itself takes 0.1 GB more. It is reckoned as

* anchor, dense: 8 × parameters (weights, gradients, two moments, and their successors),
* memories, generic: 1 × the anchor's parameters (8 × if it is trained along), 6 × the most blocks
  that a batch can touch (weights, moments, gradient, their successors), 5 × the fetched memory of
  each sequence that is worked on at a time (the joined copies and their gradients),
* activations that wait for the gradient: of each token and layer 5 × (hidden + query size), 4.5 ×
  inner FFN width and 2 × sum(r), and an attention map (batch, heads, context, context),
  (with gradient checkpointing of one layer; of each only the hidden states that it begins with),
* what only one layer at a time has: 5 attention maps; and 3 × the logits,

four bytes each. In the twelve cases of tests/train/test_plan.py that was 0.83 to 1.38 times MLX's
measured peak (CPU); the test allows a factor of 1.5. To the memory stages comes what the training
store keeps in memory (:func:`store_memory`).
"""

import math
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.anchors.load import named_parameters
from mlx_hmem.bank.format import PAGE, Level, num_blocks, stored_levels
from mlx_hmem.errors import UserError
from mlx_hmem.memory.layer import AttentionLayer, FFNLayer

from ..data.taken_tokenizer import embedded
from ..recipe.recipe import Recipe, TrainerConfig
from ..step.start import anchor_shape, num_parameters


def count_text(number: float) -> str:
    """``1.27 M``, as parameters are counted."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


def bytes_text(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e6:,.1f} MB"


@dataclass(frozen=True)
class AnchorSizes:
    """What a step's memory and operations follow from. ``inner_size`` 0: no FFN we know of."""

    num_layers: int
    hidden_size: int
    inner_size: int
    num_heads: int
    query_size: int
    vocab_size: int
    parameters: int
    looked_up: int  # parameters of embeddings that are not the output matrix too


def anchor_sizes_of(recipe: Recipe) -> AnchorSizes:
    anchor = anchor_shape(recipe)
    layer, arrays = anchor_layers(anchor)[0], named_parameters(anchor)
    assert isinstance(layer.attention, AttentionLayer)
    inner = layer.ffn.up.size if isinstance(layer.ffn, FFNLayer) else 0
    vocabulary = recipe.tokenizer.vocab_size
    if recipe.anchor.config is not None:
        vocabulary = embedded(recipe.anchor.config)
    untied = any(name.startswith("lm_head") for name in arrays)
    hidden = layer.attention.output.size
    return AnchorSizes(
        num_layers=len(anchor.layers),
        hidden_size=hidden,
        inner_size=inner,
        num_heads=layer.attention.num_heads,
        query_size=layer.attention.query.size,
        vocab_size=vocabulary,
        parameters=num_parameters(anchor),
        looked_up=vocabulary * hidden if untied else 0,
    )


def anchor_parameters(recipe: Recipe) -> int:
    return num_parameters(anchor_shape(recipe))


def bank_bytes(recipe: Recipe) -> int:
    """Bytes of the exported bank's blocks, the generic memory with them, as they lie on disk."""
    config, export = recipe.memory_config, recipe.export
    total = 0
    for level in stored_levels(config):
        quantization = None if export.quantization is None else export.quantization_of(level)
        layout = Level.layout(config, level, export.dtype, quantization)
        total += PAGE + num_blocks(config, level) * layout.block_stride
    return total


def peak_memory(recipe: Recipe, memory: bool, training: TrainerConfig) -> int:
    """Estimated peak bytes of a training step; see the top of this file."""
    anchor, config = anchor_sizes_of(recipe), recipe.memory_config
    context = recipe.windows.context if memory else recipe.windows.of_anchor
    batch_size = training.micro_batch_size or training.batch_size
    tokens = batch_size * context
    per_token = 5 * (anchor.hidden_size + anchor.query_size) + 4.5 * anchor.inner_size
    attention = batch_size * anchor.num_heads * context**2
    parameters = anchor.parameters
    anchor_trains = not memory or recipe.memories.cotrain is not None
    numbers = (8 if anchor_trains else 1) * parameters
    if memory:
        # What joins the blocks is there for one part of the batch, their state for all of it.
        levels = enumerate(config.num_clusters, 1)
        gathered = sum(
            min(training.batch_size, n + 1) * math.prod(config.block_shape(level))
            for level, n in levels
        )
        numbers += 6 * gathered + 5 * batch_size * config.fetched_parameters
        per_token += 2 * sum(config.r) * config.num_memory_layers / anchor.num_layers
    activations = tokens * per_token + attention
    if training.gradient_checkpointing:
        activations += anchor.num_layers * tokens * anchor.hidden_size
    else:
        activations *= anchor.num_layers
    logits = 3 * tokens * anchor.vocab_size
    return int(4 * (numbers + activations + 5 * attention + logits))


def step_operations(recipe: Recipe, memory: bool, batch_size: int) -> float:
    """Floating-point operations of a training step: 6 a parameter and token, 4 where frozen."""
    anchor = anchor_sizes_of(recipe)
    context = recipe.windows.context if memory else recipe.windows.of_anchor
    matrices = anchor.parameters - anchor.looked_up
    attention = 12 * anchor.num_layers * context * anchor.query_size
    fetched = recipe.memory_config.fetched_parameters
    frozen = memory and recipe.memories.cotrain is None
    per_token = (4 if frozen else 6) * matrices + (6 * fetched if memory else 0)
    return float(batch_size * context * (per_token + attention))


def disk_bytes(recipe: Recipe) -> int:
    """What a finished run leaves, and the copy beside an anchor's checkpoint while it is written.
    The corpus and its tokens are not counted."""
    parameters = 4 * anchor_parameters(recipe)
    if recipe.anchor_only:
        return 8 * parameters
    arms = 1 if recipe.dense is None else 2
    generic = 3 * 4 * recipe.memory_config.fetched_parameters
    # Weights, checkpoint of three times as much, and its copy; the exported anchors.
    anchors = arms * (1 + 3 + 3 + 1) * parameters
    return anchors + training_state_bytes(recipe) + 2 * generic + bank_bytes(recipe)


def training_state_bytes(recipe: Recipe) -> int:
    return 3 * 4 * recipe.memory_config.bank_parameters


def machine_memory() -> int:
    """Bytes of memory, or of what the GPU may use of it."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    gpu = mx.device_info().get("max_recommended_working_set_size") or total
    return min(total, int(gpu))


def store_memory(recipe: Recipe, stage: str) -> int:
    """Bytes of blocks that the training store keeps in memory: all of level 1, and of the others as
    many as ``memories.cache_bytes`` allow."""
    config = recipe.memory_config
    if stage == "generic":
        return 3 * 4 * config.fetched_parameters
    first = 3 * 4 * config.num_clusters[0] * math.prod(config.block_shape(1))
    return first + min(recipe.memories.cache_bytes, training_state_bytes(recipe) - first)


def check_memory(recipe: Recipe, stage: str, memory: bool, training: TrainerConfig) -> int:
    """The stage's peak with what its store keeps; one that the machine cannot hold is refused with
    what it could hold."""
    store = store_memory(recipe, stage) if memory else 0
    peak, most = peak_memory(recipe, memory, training) + store, machine_memory()
    if peak <= most:
        return peak
    most -= store
    section = {"anchor": "anchor", "dense": "dense"}.get(stage, "memories")
    smallest = replace(training, batch_size=1, micro_batch_size=1, gradient_checkpointing=True)
    if key := _fitting(recipe, memory, training, most):
        remedy = f"set {section}.training.{key}, or shorten windows.context"
    elif memory and peak_memory(recipe, False, smallest) <= machine_memory():
        remedy = "make memories.r smaller, or the anchor"
    else:
        scale = most / peak_memory(recipe, memory, smallest)
        most_parameters = int(scale * anchor_parameters(recipe))
        remedy = f"make the anchor smaller: about {count_text(most_parameters)} parameters fit"
    raise UserError(
        f"stage {stage} does not fit in memory",
        f"it needs about {bytes_text(peak)}, this machine has {bytes_text(machine_memory())}",
        remedy,
    )


def _fitting(recipe: Recipe, memory: bool, training: TrainerConfig, most: int) -> str | None:
    """The setting that makes the step fit, if one does: parts of the batch before smaller ones."""
    size = training.batch_size
    for part in range(size, 0, -1):
        parts = replace(training, micro_batch_size=part) if size % part == 0 else None
        if parts and peak_memory(recipe, memory, parts) <= most:
            return f"micro_batch_size to {part}"
    again = replace(training, micro_batch_size=1, gradient_checkpointing=True)
    if peak_memory(recipe, memory, again) <= most:
        return "micro_batch_size to 1 and gradient_checkpointing to true"
    while size := size // 2:
        one = replace(training, batch_size=size, micro_batch_size=1)
        if peak_memory(recipe, memory, one) <= most:
            return f"batch_size to {size} and micro_batch_size to 1"
    return None


def check_disk(recipe: Recipe, out: Path) -> tuple[int, int]:
    """(bytes the run takes, bytes that are free for it); too little is refused."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    there = 0
    for name in ("anchor", "memories", "generic", "dense", "model"):
        there += sum(f.stat().st_size for f in (out / name).rglob("*") if f.is_file())
    needed, free = disk_bytes(recipe), shutil.disk_usage(place).free + there
    if needed <= free:
        return needed, free
    r = recipe.memories.r
    while all(r) and disk_bytes(replace(recipe, memories=replace(recipe.memories, r=r))) > free:
        r = tuple(int(0.9 * value) for value in r)
    smaller = f", or set memories.r to {list(r)}" if all(r) else ", or make the bank smaller"
    raise UserError(
        "the run does not fit on the disk",
        f"it needs {bytes_text(needed)}, {bytes_text(free)} are free in {place}",
        f"give an --out with as much{smaller}",
    )
