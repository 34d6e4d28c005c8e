"""What remembering some text will make and cost, before anything is written.

The tree has a leaf for every ``WINDOWS_IN_LEAF`` windows, more where they are short, in levels of a
few dozen clusters. Those of level 1 have ``CLUSTER_TOKENS`` at least: what a cluster knows follows
from its steps, and a text has but so many of them. A new bank's fetched memory is a tenth of the
anchor, at most ``MOST_FETCHED`` parameters. The learning rate falls with the anchor's width. Under
an existing bank kind, r and the lower levels are that bank's.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.anchors.attach import memory_config
from mlx_hmem.anchors.load import anchor_of_config, named_parameters, read_config
from mlx_hmem.bank.format import PAGE, Manifest
from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.config import MemoryConfig
from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.errors import UserError

from ..cost.costs import count_text, free_bytes, peak_memory
from ..cost.plan import time_text
from ..data.taken_tokenizer import TakenTokenizer, embedded
from ..recipe.recipe import AnchorSection, MemoriesSection, Recipe, TreeSection, WindowsSection
from ..recipe.sections import TrainerConfig
from .export import Base
from .restate import Reckoned
from .rows import num_passes
from .run import FORMAT_VERSION, OwnText, Settings, context_of

WINDOWS_IN_LEAF, LEAF_TOKENS = 12, 1500  # at least
CLUSTER_TOKENS = 5000  # of level 1, at least, unless there is less text
MOST_FETCHED = 8e6
LEARNING_RATE, WIDTH = 3e-3, 640  # what an anchor of this width wants
READING_RATE, LARGE = 0.1, 512  # of that for what reads in a memory of so wide an anchor
STEP_TOKENS = 320  # about as many in a step
ENGLISH = 1.6  # English text has 1.2 to 1.4, French 1.7, German 2.3, Russian 5, program text 2.6
FEW = 0.01  # of the pieces, that need not be said
NOT_ENGLISH = "which reads English: clusters may mix subjects, questions go by words all the same"
PART_TOKENS = 384  # at a time, or one row that is longer
BYTES_PER_TOKEN = 3.0  # of text, where it has not been read yet
MEMORY_PER_BYTE = 8  # of text, with its tokens, vectors and decoded windows
# Bytes of text in a byte of a file.
TEXT_IN_FILE = {".gz": 3.0, ".zst": 3.0, ".pdf": 0.1, ".docx": 0.5, ".odt": 0.5, ".epub": 0.5,
                ".mbox": 0.3, ".eml": 0.3}  # fmt: skip


def branching_for(windows: int, tokens: int, deeper: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of the tree of so many windows and tokens; ``deeper`` are the levels below the first where a
    bank has settled them."""
    leaves = max(1, math.ceil(min(windows / WINDOWS_IN_LEAF, tokens / LEAF_TOKENS)))
    most = max(1, tokens // CLUSTER_TOKENS)
    if deeper is not None:
        # Two at least: the blocks may be small for so much text, as the demo's are.
        return (max(2, math.ceil(leaves / math.prod(deeper))), *deeper)
    if leaves <= 8:
        return (min(leaves, most),)
    if leaves <= 1024:
        first = min(round(math.sqrt(2 * leaves)), most)
        return (first, math.ceil(leaves / first))
    first = min(round(leaves ** (1 / 3)), most)
    second = math.ceil(math.sqrt(leaves / first))
    return (first, second, math.ceil(leaves / (first * second)))


def new_memory(config: dict[str, Any], branching: tuple[int, ...]) -> MemoryConfig:
    """A memory for an anchor that has none."""
    anchor = anchor_of_config(config)
    unit = memory_config(anchor, (1,), (2,)).fetched_parameters
    parameters = sum(array.size for array in named_parameters(anchor).values())
    total = min(parameters / 10, MOST_FETCHED) / unit
    shares = {1: (1.0,), 2: (2 / 3, 1 / 3), 3: (1 / 2, 1 / 4, 1 / 4)}[len(branching)]
    r = tuple(max(8, 8 * round(share * total / 8)) for share in shares)
    return memory_config(anchor, r, branching)


def training_for(
    folder: Path, config: dict[str, Any], memory: MemoryConfig, context: int
) -> TrainerConfig:
    """How the blocks are trained; UserError where a step does not fit into memory."""
    rate = LEARNING_RATE * WIDTH / memory.hidden_size
    training = TrainerConfig(
        batch_size=1,
        learning_rate=rate,
        final_learning_rate=rate / 10,
        reading_rate=READING_RATE if memory.hidden_size >= LARGE else None,
        warmup_steps=5,
        weight_decay=1e-3,
        document_mask=False,
    )
    for less in (False, True):
        training = replace(training, gradient_checkpointing=less)
        recipe = as_recipe(config, memory, training, max(PART_TOKENS, context), str(folder))
        needs = peak_memory(recipe, "memories", training)
        if needs < machine_bytes() / 2:
            return training
    raise UserError(
        "a training step does not fit in memory",
        f"{bytes_text(needs)}, this machine has {bytes_text(machine_bytes())}",
        "use a smaller or a quantised anchor",
    )


def as_recipe(
    config: dict[str, Any], memory: MemoryConfig, training: TrainerConfig, context: int, path: str
) -> Recipe:
    """The run as a recipe, for what :mod:`train.cost.costs` reckons."""
    return Recipe(
        name="remember",
        windows=WindowsSection(context=context),
        tree=TreeSection(branching=memory.branching),
        anchor=AnchorSection(path=path, config=config, training=None),
        memories=MemoriesSection(
            r=memory.r,
            kind=memory.kind,
            targets=memory.targets,
            layers=memory.layers or "all",
            training=training,
            group_by_subtree=True,
        ),
        dense=None,
    )


def make_settings(base: Base, text: OwnText, tokenizer: TakenTokenizer, **given: Any) -> Settings:
    """Tree, memory and training that fit the text; ``given`` are the other settings."""
    config = read_config(base.folder)
    context = context_of(config)
    if base.hmem is None:
        memory = new_memory(config, branching_for(*text.size, None))
    else:
        old = base.hmem.memory
        added = branching_for(*text.size, old.branching[1:])[0]
        memory = replace(old, branching=(old.branching[0] + added, *old.branching[1:]))
    training = training_for(base.folder, config, memory, context)
    return Settings(
        format_version=FORMAT_VERSION,
        anchor_hash=base.anchor_hash,
        encoder_hash=base.encoder.fingerprint,
        context=context,
        begin=tokenizer.begin(),
        memory=memory,
        first=base.first,
        training=training.to_dict(),
        step_tokens=STEP_TOKENS,
        part_tokens=PART_TOKENS,
        **given,
    )


def new_bytes(base: Base, memory: MemoryConfig, first: int) -> tuple[int, int]:
    """(bytes of the new blocks in the bank, bytes of a run's folder without its text)."""
    own = memory.branching[0] - first
    old = base.manifest
    form = ("float16", None) if old is None else (old.dtype, old.quantization)
    bank = parameters = 0
    for level in Manifest.planned(memory, *form, "", "").levels:
        count = own * math.prod(memory.branching[1 : level.level])
        bank += PAGE + count * level.block_stride
        parameters += count * math.prod(memory.block_shape(level.level))
    return bank, 4 * parameters + 24 * parameters // max(1, own)  # a store has weights and moments


def text_bytes(files: list[CorpusFile]) -> int:
    """About how many bytes of text the files hold, from their sizes."""
    return int(sum(f.state[0] * TEXT_IN_FILE.get(f.path.suffix.lower(), 1) for f in files))


def needed(base: Base, config: dict[str, Any], size: int) -> tuple[int, int]:
    """About how many bytes of disk and of memory so many bytes of text need."""
    tokens = int(size / BYTES_PER_TOKEN)
    text = max(1, tokens // context_of(config)), tokens
    if base.hmem is None:
        memory = new_memory(config, branching_for(*text, None))
    else:
        old = base.hmem.memory
        memory = replace(old, branching=branching_for(*text, old.branching[1:]))
    bank, run = new_bytes(base, memory, 0)
    return bank + run + 2 * size, MEMORY_PER_BYTE * size


def check_size(base: Base, size: int, places: list[Path]) -> None:
    """Raises UserError unless disk and memory hold what so many bytes of text need."""
    config = read_config(base.folder)
    free = min(map(free_bytes, places))

    def fits(some: int) -> bool:
        try:
            disk, memory = needed(base, config, some)
        except UserError:  # more clusters than a bank may have
            return False
        return disk <= free and memory <= machine_bytes()

    if fits(size):
        return
    most = size
    while most > 1 and not fits(most):
        most = int(most * 0.9)
    raise UserError(
        f"{bytes_text(size)} of text are too much for this machine",
        f"{bytes_text(free)} of disk are free, memory {bytes_text(machine_bytes())}",
        f"give --max-bytes {most} or less, or a folder with less text",
    )


def plan_lines(
    base: Base,
    text: OwnText,
    settings: Settings,
    said: str,
    seconds: float,
    restating: Reckoned | None = None,
) -> list[str]:
    """The plan for people; ``seconds``: of all passes over the text."""
    config, memory = read_config(base.folder), settings.memory
    training = TrainerConfig.from_dict(settings.training)
    longest = max(settings.part_tokens, int(np.diff(text.windows.offsets).max()))
    recipe = as_recipe(config, memory, training, longest, str(base.folder))
    peak = peak_memory(recipe, "memories", training)
    tokens, bank = len(text.windows.tokens), new_bytes(base, memory, settings.first)
    own = " × ".join(map(str, settings.branching))
    under = f" behind the {settings.first} of level 1 that it has" if settings.first else ""
    more = (tokens + restating.written) / tokens if restating else 1
    in_cluster = tokens // settings.branching[0]
    passes = num_passes(in_cluster, settings)
    quick = num_passes(in_cluster, replace(settings, quick=True))
    a_pass = more * seconds / passes
    lines = [
        ("documents", said),
        ("tokens", f"{tokens:,}"),
        ("anchor", f"{config['model_type']}, vocabulary {embedded(config):,}, it stays as it is"),
        ("new clusters", f"{own}{under}, r {list(memory.r)}"),
        ("fetched memory", f"{count_text(memory.fetched_parameters)} parameters"),
        ("disk", f"{bytes_text(bank[0])} in the bank, {bytes_text(bank[1])} in the run's folder"),
        ("memory", f"about {bytes_text(peak)} of {bytes_text(machine_bytes())}"),
        (
            "time",
            f"about {time_text(passes * a_pass / 3600)} for {passes} pass"
            + ("es" if passes > 1 else "")
            + quicker(passes, quick, a_pass),
        ),
    ]
    pieces, unknown = pieces_a_word(base, text)
    if pieces > ENGLISH or unknown >= FEW:
        share = f", {unknown:.0%} of them unknown" if unknown >= FEW else ""
        said = f"{pieces:.1f} pieces a word{share} to the encoder, {NOT_ENGLISH}"
        lines.insert(1, ("language", said))
    if restating is not None:
        lines.insert(2, ("restatements", restating.said(settings.restate)))
    return [f"{name:<16}{value}" for name, value in lines]


def found_lines(faults: Faults) -> list[str]:
    """What the plan says of the files: encodings that are not UTF-8, and what was left out."""
    often = faults.encodings.most_common()
    encodings = ", ".join(f"{count} {name}" for name, count in often)
    lines = (("encodings", encodings and f"{encodings}, else UTF-8"), ("left out", faults.said()))
    return [f"{name:<16}{said}" for name, said in lines if said]


def pieces_a_word(base: Base, text: OwnText) -> tuple[float, float]:
    """Into how many pieces the encoder's tokenizer cuts a word, by the documents' beginnings, and
    the share of the pieces that it does not know."""
    words = [w for document in text.documents[:200] for w in document.text[:1000].split()]
    found = base.encoder.tokenizer.encode_batch_fast(words, add_special_tokens=False)
    pieces = [piece for word in found for piece in word.ids]
    unknown = sum(piece == base.encoder.tokenizer.token_to_id("[UNK]") for piece in pieces)
    return len(pieces) / max(1, len(words)), unknown / max(1, len(pieces))


def quicker(passes: int, quick: int, a_pass: float) -> str:
    """What less would take, where that is worth saying."""
    if passes <= quick or passes * a_pass < 60:
        return ""
    return f" (--quick: {quick} passes, {time_text(quick * a_pass / 3600)})"
