"""What a recipe costs, reckoned from its numbers alone: parameters, bytes, memory, operations.

Sizes are exact. Bytes of the bank are those the export writes. Training state is float32 weights
and two moments of every block, as if each were touched.

Peak memory is that of MLX's arrays; the program itself takes 0.1 GB more. It is the larger of

* a gradient: a trained anchor eight times (weights, gradients, two moments, and their successors),
  the most blocks that a batch can touch three times; both once more where the batch is worked on in
  parts, for the gradients so far; the fetched memory of the sequences worked on at a time; the
  activations that wait: of each token and layer 5 × (hidden + query size), 4.5 × inner FFN
  width and 2 × sum(r), and an attention map (batch, heads, context, context), with gradient
  checkpointing only the hidden states that each layer begins with; what one layer at a time has:
  as much, and 5 attention maps; and the larger of three times the logits, of a frozen anchor no
  more than a few chunks (:mod:`train.step.loss`), and the gradients of fetched memory, twice, and
  blocks,
* the update: eight times all that is trained,

four bytes each, and a frozen anchor as it is stored. In the eighteen cases of
tests/train/test_plan.py that was 0.74 to 1.31 times MLX's measured peak (CPU); the test allows a
factor of 1.5.
:func:`store_memory` is what the training store keeps beside it in the memory stages.
"""

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_hmem.anchors.architectures import anchor_layers
from mlx_hmem.anchors.load import INDEX, named_parameters, weight_files
from mlx_hmem.bank.writer import planned_bytes
from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import read_safetensors_header
from mlx_hmem.memory.layer import AttentionLayer, FFNLayer
from mlx_hmem.model.find import find_model

from ..data.taken_tokenizer import embedded
from ..recipe.recipe import Recipe, TrainerConfig
from ..step.loss import CHUNK_BYTES, CHUNKS_AT_ONCE
from ..step.start import anchor_shape, num_parameters


def count_text(number: float) -> str:
    """``1.27 M``, as parameters are counted."""
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,.0f}"


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


def free_bytes(place: Path) -> int:
    """Those of the disk that ``place`` lies on, or will."""
    there = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_dir())
    return shutil.disk_usage(there).free


def has_memory(stage: str) -> bool:
    return stage in ("memories", "generic")


def trainings_of(recipe: Recipe) -> dict[str, TrainerConfig]:
    """The stages that train, and how."""
    found = {} if recipe.anchor.training is None else {"anchor": recipe.anchor.training}
    if recipe.anchor_only:
        return found
    found["memories"] = recipe.memories.training
    if recipe.memories.cotrain is None:
        found["generic"] = recipe.memories.training
    if recipe.dense is not None:
        found["dense"] = recipe.dense.training
    return found


def context_of(recipe: Recipe, stage: str) -> int:
    """Tokens of a sequence; that of the anchor's own training may exceed the others'."""
    return recipe.windows.of_anchor if stage == "anchor" else recipe.windows.context


def gathered_parameters(
    config: MemoryConfig, batch_size: int, generic: bool = False, grouped: bool = False
) -> int:
    """Those of the blocks that a batch touches at most, with ``generic`` memory beside them;
    ``grouped`` where all its sequences are of one cluster of level 1."""
    share = config.branching[0] if grouped else 1
    levels = enumerate((n // share + generic for n in config.num_clusters), 1)
    return sum(min(batch_size, n) * math.prod(config.block_shape(i)) for i, n in levels)


def _stored_bytes(recipe: Recipe) -> int:
    """Of the frozen anchor, as it is stored."""
    if recipe.anchor.path is not None and recipe.anchor.training is None:
        files = weight_files(find_model(recipe.anchor.path, ["model*.safetensors", INDEX]))
        headers = (read_safetensors_header(file)[0] for file in files)
        return sum(t.end - t.start for header in headers for t in header.values())
    return 4 * anchor_parameters(recipe)


def peak_memory(recipe: Recipe, stage: str, training: TrainerConfig) -> int:
    """Estimated peak bytes of a training step; see the top of this file."""
    anchor, config = anchor_sizes_of(recipe), recipe.memory_config
    part, context = training.part, context_of(recipe, stage)
    per_token = 5 * (anchor.hidden_size + anchor.query_size) + 4.5 * anchor.inner_size
    frozen = has_memory(stage) and recipe.memories.cotrain is None
    weights, blocks, fetched = (0 if frozen else anchor.parameters), 0, 0
    if has_memory(stage):
        grouped = recipe.memories.group_by_subtree
        blocks = gathered_parameters(config, training.batch_size, not frozen, grouped)
        fetched = part * config.fetched_parameters
        per_token += 2 * sum(config.r) * config.num_memory_layers / anchor.num_layers
    tokens, attention = part * context, part * anchor.num_heads * context**2
    kept = of_layer = tokens * per_token + attention
    if training.gradient_checkpointing:
        kept = tokens * anchor.hidden_size
    sums = weights + blocks if part < training.batch_size else 0
    gradient = 8 * weights + 3 * blocks + sums + fetched + anchor.num_layers * kept
    logits = 3 * tokens * anchor.vocab_size
    if frozen:
        logits = min(logits, CHUNKS_AT_ONCE * CHUNK_BYTES // 4)
    gradient += of_layer + 5 * attention + max(logits, 2 * fetched + blocks)
    numbers = max(gradient, 8 * (weights + blocks))
    return (_stored_bytes(recipe) if frozen else 0) + int(4 * numbers)


def step_operations(recipe: Recipe, stage: str, batch_size: int) -> float:
    """Floating-point operations of a training step: 6 a parameter and token, 4 where frozen."""
    anchor, context = anchor_sizes_of(recipe), context_of(recipe, stage)
    matrices = anchor.parameters - anchor.looked_up
    attention = 12 * anchor.num_layers * context * anchor.query_size
    fetched = recipe.memory_config.fetched_parameters if has_memory(stage) else 0
    frozen = has_memory(stage) and recipe.memories.cotrain is None
    per_token = (4 if frozen else 6) * matrices + 6 * fetched
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
    return (
        anchors + training_state_bytes(recipe) + 2 * generic + planned_bytes(recipe.planned_bank())
    )


def training_state_bytes(recipe: Recipe) -> int:
    return 3 * 4 * recipe.memory_config.bank_parameters


def store_memory(recipe: Recipe, stage: str) -> int:
    """Bytes of blocks that the training store keeps in memory: all of level 1, and of the others as
    many as ``memories.cache_bytes`` allow."""
    config = recipe.memory_config
    if not has_memory(stage):
        return 0
    if stage == "generic":
        return 3 * 4 * config.fetched_parameters
    first = 3 * 4 * config.num_clusters[0] * math.prod(config.block_shape(1))
    return first + min(recipe.memories.cache_bytes, training_state_bytes(recipe) - first)


def check_memory(recipe: Recipe, stage: str, training: TrainerConfig) -> int:
    """The stage's peak with what its store keeps; one that the machine cannot hold is refused with
    what it could hold."""
    store = store_memory(recipe, stage)
    peak, most = peak_memory(recipe, stage, training) + store, machine_bytes()
    if peak <= most:
        return peak
    most -= store
    section = {"anchor": "anchor", "dense": "dense"}.get(stage, "memories")
    smallest = replace(training, batch_size=1, micro_batch_size=1, gradient_checkpointing=True)
    if key := _fitting(recipe, stage, training, most):
        remedy = f"set {section}.training.{key}, or shorten windows.context"
    elif has_memory(stage) and peak_memory(recipe, "dense", smallest) <= machine_bytes():
        remedy = "make memories.r smaller, or the anchor"
    else:
        scale = most / peak_memory(recipe, stage, smallest)
        most_parameters = int(scale * anchor_parameters(recipe))
        remedy = f"make the anchor smaller: about {count_text(most_parameters)} parameters fit"
    raise UserError(
        f"stage {stage} does not fit in memory",
        f"it needs about {bytes_text(peak)}, this machine has {bytes_text(machine_bytes())}",
        remedy,
    )


def _fitting(recipe: Recipe, stage: str, training: TrainerConfig, most: int) -> str | None:
    """The setting that makes the step fit, if one does: parts of the batch before smaller ones."""
    size = training.batch_size
    for part in range(size, 0, -1):
        parts = replace(training, micro_batch_size=part) if size % part == 0 else None
        if parts and peak_memory(recipe, stage, parts) <= most:
            return f"micro_batch_size to {part}"
    again = replace(training, micro_batch_size=1, gradient_checkpointing=True)
    if peak_memory(recipe, stage, again) <= most:
        return "micro_batch_size to 1 and gradient_checkpointing to true"
    while size := size // 2:
        one = replace(training, batch_size=size, micro_batch_size=1)
        if peak_memory(recipe, stage, one) <= most:
            return f"batch_size to {size} and micro_batch_size to 1"
    return None


def check_disk(recipe: Recipe, out: Path) -> tuple[int, int]:
    """(bytes the run takes, bytes that are free for it); too little is refused."""
    there = 0
    for name in ("anchor", "memories", "generic", "dense", "model"):
        there += sum(f.stat().st_size for f in (out / name).rglob("*") if f.is_file())
    needed, free = disk_bytes(recipe), free_bytes(out) + there
    if needed <= free:
        return needed, free
    r = recipe.memories.r
    while all(r) and disk_bytes(replace(recipe, memories=replace(recipe.memories, r=r))) > free:
        r = tuple(int(0.9 * value) for value in r)
    smaller = f", or set memories.r to {list(r)}" if all(r) else ", or make the bank smaller"
    raise UserError(
        "the run does not fit on the disk",
        f"it needs {bytes_text(needed)}, {bytes_text(free)} are free for {out}",
        f"give an --out with as much{smaller}",
    )
