"""``load(path)`` → :class:`MemoryModel`, from a model directory whose parts belong together."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.tokenizer_utils import load as load_tokenizer
from transformers.utils import logging as transformers_logging

from mlx_hmem.anchors.load import anchor_hash, load_anchor, weight_files
from mlx_hmem.bank import Bank
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint
from mlx_hmem.find import BANK_FILES, BANK_FOLDER, MODEL_FILES, find_for_bank, find_model
from mlx_hmem.model import MemoryModel
from mlx_hmem.retriever import ClusterTree, Retriever, load_encoder

DEMO = Path(__file__).parent / "demo"


def load(
    path_or_repo: str | Path = DEMO,
    *,
    cache_bytes: int = 256 << 20,
    memory_budget: int | None = None,
    lazy: bool = False,
    resident_levels: tuple[int, ...] = (),
    level_folders: dict[int, Path] | None = None,
) -> MemoryModel:
    """Loads a model directory or a Hub repository, and checks that its parts belong together.

    Args:
        path_or_repo: a folder, or ``user/name`` on the Hugging Face Hub. Default: the demo model.
        cache_bytes: how many bytes of blocks may stay in memory.
        memory_budget: bytes for anchor, fetched memory and kept blocks together; what anchor and
            fetched memory leave of it bounds the kept blocks and MLX's own buffer cache.
        lazy: of a model on the Hub, fetch a shard of the bank only when a block of it is first
            needed, always of the revision found now.
        resident_levels, level_folders: levels of the bank that stay in memory once read, beside
            what the budget or ``cache_bytes`` allow, or lie in other folders
            (:meth:`mlx_hmem.bank.Bank.open`).

    A folder with an anchor but no ``hmem.json`` gives a model without memory.
    """
    if lazy:
        folder, obtain = find_for_bank(path_or_repo)
    else:
        folder, obtain = find_model(path_or_repo, (*MODEL_FILES, *BANK_FILES)), None
    if not (folder / "config.json").exists():
        raise UserError("not a model directory: no config.json", folder, "name one, or restore it")
    if not (folder / "hmem.json").exists():
        if (folder / "bank").exists() or (folder / "retriever").exists():
            raise UserError("hmem.json is missing", folder, "restore it or make the model again")
        if memory_budget is not None:
            mx.set_cache_limit(_spare_bytes(memory_budget, folder, 0))
        anchor, config = load_anchor(folder)
        return MemoryModel(anchor, config, read_tokenizer(folder, config))
    hmem = HmemConfig.from_file(folder / "hmem.json")
    if anchor_hash(folder) != hmem.anchor_hash:
        raise UserError(
            "the anchor is not the one this memory was made for",
            folder / "model.safetensors",
            "restore the anchor, or use the memory of this one",
        )
    if memory_budget is not None:
        spare = _spare_bytes(memory_budget, folder, hmem.memory.fetched_parameters)
        cache_bytes = min(cache_bytes, spare // 2)
        mx.set_cache_limit(spare // 2)
    bank = Bank.open(
        folder / BANK_FOLDER,
        cache_bytes=cache_bytes,
        resident_levels=resident_levels,
        level_folders=level_folders,
        obtain=obtain,
    )
    bank.check(anchor_hash=hmem.anchor_hash, tree_hash=hmem.retriever.tree_hash)
    if bank.config != hmem.memory:
        raise UserError(
            "hmem.json and bank/bank.json describe different memories",
            f"{hmem.memory} and {bank.config}",
            "restore the bank that belongs to this model",
        )
    retriever = _retriever(folder, hmem)
    anchor, config = load_anchor(folder)
    return MemoryModel(anchor, config, read_tokenizer(folder, config), retriever, bank)


def _spare_bytes(memory_budget: int, folder: Path, fetched_parameters: int) -> int:
    """What a budget leaves beside the anchor and one fetched memory (stored, joined, as f32)."""
    anchor = sum(file.stat().st_size for file in weight_files(folder))
    least = anchor + 3 * 4 * fetched_parameters
    if memory_budget < least:
        raise UserError(
            "the memory budget is too small", f"{memory_budget} bytes", f"give at least {least}"
        )
    return memory_budget - least


def read_tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model directory; ``config`` names the ids that end a text."""
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError("no tokenizer", folder, "add tokenizer.json or tokenizer.model")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it warns that it does not know model_type openlm
    try:
        return load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # transformers raises whatever its parsers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the tokenizer in {folder} cannot be read", reason, "restore it") from None
    finally:
        transformers_logging.set_verbosity(verbosity)


def _retriever(folder: Path, hmem: HmemConfig) -> Retriever:
    name = hmem.retriever.encoder
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise UserError("the encoder lies outside the model", name, "restore hmem.json")
    encoder = load_encoder(name if name in ("minilm", "static") else folder / name)
    if encoder.fingerprint != hmem.retriever.encoder_hash:
        raise UserError(
            "the encoder is not the one this memory was routed with",
            name,
            "restore the encoder, or train tree and memories with this one",
        )
    file = folder / "retriever" / "tree.safetensors"
    tree = ClusterTree.load(file)
    if fingerprint(file) != hmem.retriever.tree_hash:
        raise UserError(
            "the cluster tree is not the one this memory was made for",
            file,
            "restore the tree, or use the memory of this one",
        )
    if tree.branching != hmem.memory.branching:
        raise UserError(
            "tree and memory bank have different clusters",
            f"tree {tree.branching}, bank {hmem.memory.branching}",
            "restore the tree that belongs to this bank",
        )
    return Retriever(encoder, tree)
