"""The export stage: a finished run becomes a model directory (``FOLDER/model``).

The anchor's parts are copied as they are, the trained blocks become a bank, and ``hmem.json`` ties
them together by their fingerprints.
"""

import json
import shutil
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import anchor_hash, read_config, text_hashes
from mlx_hmem.bank.format import GENERIC
from mlx_hmem.bank.writer import Given, rewrite_bank
from mlx_hmem.config import FORMAT_VERSION, HmemConfig, RetrieverConfig
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.folders import whole_folder
from mlx_hmem.retriever import ClusterTree
from mlx_hmem.retriever.encoder import STATIC_FOLDER

from .data.taken_tokenizer import is_tokenizer_file
from .loop.arms import trained_anchor, trained_blocks, trained_generic
from .recipe.recipe import Recipe
from .step.start import copy_anchor_files


def run_export(
    recipe: Recipe, folder: Path, trained: Collection[str] = ("memories", "generic")
) -> None:
    """Makes the model directory. A memory that is not among ``trained`` becomes zeros, which is for
    a study of the other."""
    target, report = folder / "model", folder / "corpus" / "report.json"
    with whole_folder(target, replace=True) as part:
        copy_anchor(trained_anchor(recipe, folder), folder / "tokenizer", part)
        if not recipe.anchor_only:
            _add_memory(recipe, folder, part, trained)
        write_atomic(part / "README.md", card(recipe, json.loads(report.read_text()), part))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(f"export: a model of {size / 1e6:.1f} MB in {target}")


def _add_memory(recipe: Recipe, folder: Path, part: Path, trained: Collection[str]) -> None:
    """Retriever, bank and what ties them to the anchor that ``part`` has already."""
    tree = part / "retriever" / "tree.safetensors"
    tree.parent.mkdir()
    shutil.copyfile(folder / "tree" / "tree.safetensors", tree)
    hmem = HmemConfig(
        format_version=FORMAT_VERSION,
        memory=recipe.memory_config,
        retriever=RetrieverConfig(
            encoder=place_encoder(recipe.tree.encoder, part, recipe.export.encoder_by_name),
            encoder_hash=str(ClusterTree.load(tree).encoder_hash),
            tree_hash=fingerprint(tree),
        ),
        anchor_hash=anchor_hash(part),
        **text_hashes(part),
    )
    planned = recipe.planned_bank(hmem.anchor_hash, hmem.tree_hash)
    generic = trained_generic(recipe, folder) if "generic" in trained else None
    with trained_blocks(recipe, folder) if "memories" in trained else nullcontext() as blocks:

        def block(level: int, cluster: int) -> Given:
            if level == GENERIC:
                return generic
            return None if blocks is None else blocks.block(level, cluster)

        rewrite_bank(part / "bank", planned, block)
    write_atomic(part / "hmem.json", hmem.to_json())


def place_encoder(name: str, target: Path, by_name: bool = False) -> str:
    """What ``hmem.json`` calls the encoder. The small static one goes along, so that a model
    outlives a new version of it, unless ``by_name``; MiniLM is pointed to by its name."""
    if name == "minilm" or (by_name and name == "static"):
        return name
    inside = Path("retriever") / "encoder"
    shutil.copytree(STATIC_FOLDER if name == "static" else name, target / inside)
    return inside.as_posix()


CARD = """# {name}

{what}, made by mlx_hmem's recipe `{name}`.

| | |
|---|---|
| anchor | {anchor} |
{memory}| trained on | {documents} documents, and {statements} statements of {facts} facts |

It shows a method and is not to be relied on for anything it says.

{attribution}
"""


MEMORY = """| memory bank | {bank:,} parameters, {clusters} clusters, r {r}, stored as {stored} |
| fetched memory | {fetched:,} parameters |
| encoder | {encoder} |
"""


def _anchor_text(recipe: Recipe, folder: Path) -> str:
    config = read_config(folder)
    if recipe.anchor.path is not None:
        trained = recipe.anchor.training or (recipe.memories.cotrain and not recipe.anchor_only)
        return f"{config['model_type']}, {'begun from' if trained else 'as'} {recipe.anchor.path}"
    return (
        f"OpenLM: {recipe.anchor.num_hidden_layers} layers, hidden {recipe.anchor.hidden_size}, "
        f"vocabulary {recipe.tokenizer.vocab_size}, context {recipe.windows.of_anchor}"
    )


def _memory_text(recipe: Recipe) -> str:
    if recipe.anchor_only:
        return ""
    memory, stored = recipe.memory_config, recipe.export.dtype
    if recipe.export.quantization is not None:
        how = recipe.export.quantization_of(0)
        stored = f"{how.mode}, {how.bits} bits, groups of {how.group_size}"
    return MEMORY.format(
        bank=memory.bank_parameters,
        clusters=" × ".join(map(str, memory.branching)),
        r=list(memory.r),
        stored=stored,
        fetched=memory.fetched_parameters,
        encoder=recipe.tree.encoder,
    )


def card(recipe: Recipe, corpus: dict[str, Any], folder: Path) -> str:
    """The card of the model in ``folder``; ``corpus`` is the report of the corpus stage."""
    return CARD.format(
        what=f"A language model{'' if recipe.anchor_only else ' with a hierarchical memory'}",
        name=recipe.name,
        anchor=_anchor_text(recipe, folder),
        memory=_memory_text(recipe),
        documents=corpus["train_documents"],
        statements=corpus["fact_documents"],
        facts=corpus["facts"],
        attribution=recipe.export.attribution.strip(),
    )


def copy_anchor(anchor: Path, tokenizer: Path, target: Path) -> None:
    """An anchor with its tokenizer as a model directory of its own."""
    target.mkdir(parents=True, exist_ok=True)
    copy_anchor_files(anchor, target)
    for file in tokenizer.iterdir():
        if is_tokenizer_file(file.name):
            shutil.copyfile(file, target / file.name)
