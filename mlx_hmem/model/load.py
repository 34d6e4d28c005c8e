"""``load(path)`` → :class:`MemoryModel`, from a model directory whose parts belong together."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.load import anchor_hash, check_hashes, load_anchor, read_config, text_hashes
from mlx_hmem.bank import Bank
from mlx_hmem.bank.documents import read_documents, taught
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.bank.views import check_name, read_views
from mlx_hmem.budget.needs import read_needs
from mlx_hmem.budget.plan import Serving, check_context, make_plan, plan_scoring, plan_serving
from mlx_hmem.budget.resident import base_bytes, trim
from mlx_hmem.config import HmemConfig, MemoryConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint
from mlx_hmem.model.banks import RoutedBank
from mlx_hmem.model.find import (
    BANK_FILES,
    BANK_FOLDER,
    BESIDE,
    DEMO,
    MODEL_FILES,
    find_model,
    shards_from_hub,
)
from mlx_hmem.model.model import MemoryModel
from mlx_hmem.model.tokenizer import read_tokenizer
from mlx_hmem.retriever import ClusterTree, Encoder, Retriever, load_encoder
from mlx_hmem.retriever.encoder import STATIC_FOLDER, find_minilm


def load(
    path_or_repo: str | Path = DEMO,
    *,
    cache_bytes: int = 256 << 20,
    memory_budget: int | None = None,
    context: int | None = None,
    scoring: bool = False,
    serving: Serving | None = None,
    lazy: bool = False,
    resident_levels: tuple[int, ...] = (),
    level_folders: dict[int, Path] | None = None,
    view: str | None = None,
) -> MemoryModel:
    """Loads a model directory or a Hub repository, and checks that its parts belong together.

    Args:
        path_or_repo: a folder, or ``user/name`` on the Hugging Face Hub. Default: the demo model.
        cache_bytes: how many bytes of blocks may stay in memory.
        memory_budget: bytes of resident memory for all of it (docs/budget.md); what is chosen to
            keep to it is the model's ``plan``.
        context: tokens of prompt and answer, at most; default: the anchor's.
        scoring: plans for scoring texts rather than for generation.
        serving: plans for a server that does so much at once.
        lazy: of a model on the Hub, fetch a shard of the bank only when a block of it is first
            needed, always of the revision found now.
        resident_levels, level_folders: levels of the bank that stay in memory once read, beside
            what the budget or ``cache_bytes`` allow, or lie in other folders
            (:meth:`mlx_hmem.bank.Bank.open`). They are those of the first bank.
        view: what may be fetched (docs/bank_tools.md). Default: all, or what the view "default"
            allows where the model has one. ``MemoryModel.under`` gives others of the same model.

    A folder with an anchor but no ``hmem.json`` gives a model without memory.
    """
    base = base_bytes()
    folder = find_model(path_or_repo, MODEL_FILES if lazy else (*MODEL_FILES, *BANK_FILES))
    obtain = shards_from_hub(path_or_repo, folder) if lazy else None
    if not (folder / "config.json").exists():
        raise UserError("not a model directory: no config.json", folder, "name one, or restore it")
    hmem = read_hmem(folder, (BANK_FOLDER, "retriever"))
    if hmem is None and view is not None:
        raise UserError("a model without memory has no views", view, "leave it out")
    configs = {} if hmem is None else {"": hmem, **added_banks(folder, hmem)}
    places = {name: folder / BESIDE / name if name else folder for name in configs}
    plan = None
    if memory_budget is not None:
        files = encoder_folder(folder, hmem) if hmem is not None and hmem.retriever else None
        needs = read_needs(folder, [*places.values()], files)
        if scoring:
            plan = plan_scoring(needs, memory_budget, context)
        elif serving is not None:
            plan = plan_serving(needs, memory_budget, serving, context, cache_bytes)
        else:
            plan = make_plan(needs, memory_budget, context, resident_levels, cache_bytes)
        plan.apply()
        cache_bytes, resident_levels = plan.cache_bytes, plan.resident_levels
    options: dict[str, Any] = {"resident_levels": resident_levels, "level_folders": level_folders}
    encoder, banks, share = None, dict[str, RoutedBank](), cache_bytes // max(1, len(configs))
    for name, own in configs.items():
        place = places[name]
        if obtain is not None:
            inside = (place / BANK_FOLDER).relative_to(folder).as_posix()
            options["obtain"] = partial(obtain, inside)
        bank, retriever = open_bank(place, own, cache_bytes=share, **options), None
        trained = read_documents(place / BANK_FOLDER, own.memory)
        if own.retriever is not None:
            encoder = encoder or open_encoder(folder, configs[""])
            retriever = Retriever(encoder, open_tree(place, own), taught(trained))
        banks[name] = RoutedBank(retriever, bank, own.names or {}, trained)
        options = {}
    views = read_views(folder / BANK_FOLDER, {name: own.memory for name, own in configs.items()})
    known = read_config(folder)
    anchor, config = load_anchor(folder, config=known)
    tokenizer = read_tokenizer(folder, known)  # mlx-lm writes other ends of a text over its own
    retriever, first, names, documents = banks.pop("") if banks else (None, None, None, ())
    parts = (retriever, first, banks, views, names, documents)
    model = MemoryModel(anchor, config, tokenizer, *parts)
    if plan is not None:
        trim()
        model.keep_to(plan, base)
    elif context is not None:
        model.context = check_context(model.context, context)
    if hmem is None:
        model.hashes = {"anchor_hash": anchor_hash(folder)} | text_hashes(folder, known)
        return model
    # Last: what is wrong with a part is said more closely.
    model.hashes = {"anchor_hash": hmem.anchor_hash} | check_hashes(folder, hmem, known)
    manifests = [place / BANK_FOLDER / MANIFEST for place in places.values()]
    model.hashes["bank_hash"] = fingerprint(*manifests)
    model.bound = None not in (hmem.config_hash, hmem.tokenizer_hash)
    return model.under(view)


def read_hmem(folder: Path, parts: Sequence[str] = (BANK_FOLDER,)) -> HmemConfig | None:
    """``hmem.json``, once the anchor beside it is found to be its own; None without memory, of
    which then none of the ``parts`` may lie there."""
    if not (folder / "hmem.json").exists():
        if any((folder / part).exists() for part in parts):
            raise UserError("hmem.json is missing", folder, "restore it or make the model again")
        return None
    hmem = HmemConfig.from_file(folder / "hmem.json")
    if anchor_hash(folder) != hmem.anchor_hash:
        raise UserError(
            "the anchor is not the one this memory was made for",
            folder / "model.safetensors",
            "restore the anchor, or use the memory of this one",
        )
    return hmem


def added_banks(folder: Path, hmem: HmemConfig) -> dict[str, HmemConfig]:
    """The banks beside the first by name, each found to be of this anchor and this encoder."""
    files = sorted((folder / BESIDE).glob("*/hmem.json"))
    found = {check_name(f.parent.name, "bank"): HmemConfig.from_file(f) for f in files}
    for name, other in found.items():
        check_beside(hmem, other, f"bank {name}")
    return found


def check_beside(hmem: HmemConfig, other: HmemConfig, what: str) -> None:
    """Raises UserError unless the memory of ``other`` can lie beside that of ``hmem``."""
    if other.anchor_hash != hmem.anchor_hash:
        raise UserError(
            f"{what} was made for another anchor",
            f"{other.anchor_hash}, not {hmem.anchor_hash}",
            "use one that was trained on this anchor",
        )
    own, its = (each.retriever and each.retriever.encoder_hash for each in (hmem, other))
    if own != its:
        encoders = (
            r and f"{r.encoder} ({r.encoder_hash})" for r in (other.retriever, hmem.retriever)
        )
        raise UserError(
            f"{what} is routed by another encoder",
            ", not ".join(encoder or "by name alone" for encoder in encoders),
            "train one with this model's encoder",
        )
    ours, theirs = hmem.memory, other.memory
    if (_joined(ours), ours.memory_layers) != (_joined(theirs), theirs.memory_layers):
        raise UserError(
            f"{what} holds another kind of memory, or on other layers",
            f"{_joined(theirs)} on layers {list(theirs.memory_layers)}, not {_joined(ours)} on "
            f"{list(ours.memory_layers)}",
            "train one of the same kind and layers",
        )


def _joined(memory: MemoryConfig) -> str:
    """The kind, with the projections that one of kind lora patches."""
    return " ".join([memory.kind, *(memory.targets or ())])


def open_bank(folder: Path, hmem: HmemConfig, **options: Any) -> Bank:
    """The bank in a folder with an ``hmem.json``, with options of :meth:`Bank.open`."""
    bank = Bank.open(folder / BANK_FOLDER, **options)
    bank.check(anchor_hash=hmem.anchor_hash, tree_hash=hmem.tree_hash)
    if bank.config != hmem.memory:
        raise UserError(
            "hmem.json and bank/bank.json describe different memories",
            f"{hmem.memory} and {bank.config}",
            "restore the bank that belongs to this model",
        )
    return bank


def encoder_folder(folder: Path, hmem: HmemConfig) -> Path:
    """Where the files of the encoder lie."""
    name = hmem.routed.encoder
    if name == "minilm":
        return find_minilm()
    if name == "static":
        return STATIC_FOLDER
    if not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise UserError("the encoder lies outside the model", name, "restore hmem.json")
    return folder / name


def open_encoder(folder: Path, hmem: HmemConfig) -> Encoder:
    name = hmem.routed.encoder
    encoder = load_encoder(name if name == "minilm" else encoder_folder(folder, hmem))
    if encoder.fingerprint != hmem.routed.encoder_hash:
        raise UserError(
            "the encoder is not the one this memory was routed with",
            name,
            "restore the encoder, or train tree and memories with this one",
        )
    return encoder


def open_tree(folder: Path, hmem: HmemConfig) -> ClusterTree:
    wanted, file = hmem.routed.tree_hash, folder / "retriever" / "tree.safetensors"
    tree = ClusterTree.load(file)
    if fingerprint(file) != wanted:
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
    return tree
