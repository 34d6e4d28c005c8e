"""Makes a quantised model directory of another: what is to become of it is checked, then done.

Everything that belongs to a model is copied, what is quantised is written anew, and the memory is
tied to the quantised anchor by its fingerprint: a memory goes on working with an anchor that has
merely been rounded.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from mlx_hmem.anchors.load import anchor_hash, check_hashes, load_anchor, text_hashes, weight_files
from mlx_hmem.bank import Quantization
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.bank_tools.folders import model_files
from mlx_hmem.config import HmemConfig
from mlx_hmem.errors import UserError
from mlx_hmem.evaluate import Perplexity, perplexity
from mlx_hmem.files import write_atomic
from mlx_hmem.folders import copy_missing, identity_of, whole_folder
from mlx_hmem.model.find import BANK_FOLDER, BESIDE
from mlx_hmem.model.load import load, open_bank, open_tree, read_hmem
from mlx_hmem.model.tokenizer import check_files

from .anchor import INDEX, AnchorChange, quantized_anchor, save_quantized_anchor, weight_bytes
from .bank import NOTES, BankChange, change_bank, forget_notes
from .report import Report
from .search import Bound, search

ANCHOR_FILES = ("config.json", "model*.safetensors", INDEX)
REWRITTEN = ("hmem.json", f"{BANK_FOLDER}/{MANIFEST}", f"{BANK_FOLDER}/*.safetensors")


@dataclass(frozen=True)
class ModelChange:
    """What is to become of a model directory; ``bank`` and ``hmem`` are None without memory."""

    folder: Path
    files: tuple[Path, ...]  # to copy, relative to the folder
    anchor: Quantization | None
    bank: BankChange | None
    hmem: HmemConfig | None

    @property
    def identity(self) -> dict[str, Any]:
        files = [self.folder / file for file in self.files] + weight_files(self.folder)
        files.append(self.folder / "config.json")
        if self.bank is not None:
            shards = [shard.file for shard in self.bank.before.shards]
            files += [self.folder / BANK_FOLDER / name for name in (MANIFEST, *shards)]
            files.append(self.folder / "hmem.json")
        return identity_of(
            files,
            program="quantize",
            mlx=version("mlx"),  # another one may round in another way
            anchor=None if self.anchor is None else self.anchor.options,
            dtype=None if self.bank is None else self.bank.after.dtype,
            bank=[asdict(q) for q in (self.bank and self.bank.after.quantization) or ()],
        )

    @property
    def bytes_needed(self) -> int:
        files = sum((self.folder / file).stat().st_size for file in self.files)
        bank = 0 if self.bank is None else self.bank.bytes_needed
        return files + bank + (weight_bytes(self.folder) if self.anchor else 0)


def plan(
    folder: Path,
    anchor: Quantization | None,
    levels: dict[int, Quantization],
    dtype: str | None = None,
) -> ModelChange:
    """Checks a model directory and what is to become of it; nothing is written.

    ``levels`` are those of the bank to quantise, 0 being the generic memory; ``dtype`` is the
    bank's new one.

    Raises:
        UserError: its parts do not belong together, what is to be quantised is so already, or
            does not exist.
    """
    if not (folder / "config.json").exists():
        raise UserError("not a model directory: no config.json", folder, "name one, or restore it")
    if (folder / BESIDE).exists():
        raise UserError(
            "a model with added banks cannot be quantised",
            folder / BESIDE,
            "quantise each model, then add one's bank to the other",
        )
    if anchor is not None:
        quantized_anchor(folder, anchor)
    hmem, bank = read_hmem(folder), None
    check_files(folder)
    if hmem is not None:
        check_hashes(folder, hmem)
        if hmem.retriever is not None:
            open_tree(folder, hmem)
        with open_bank(folder, hmem, cache_bytes=0) as opened:
            bank = BankChange.planned(opened.manifest, levels, dtype)
    elif levels or dtype:
        raise UserError("this model has no memory bank", folder, "leave out --bank-…")
    files = model_files(folder, but=[*REWRITTEN, *(ANCHOR_FILES if anchor else ())])
    return ModelChange(folder, tuple(files), anchor, bank, hmem)


def quantize(
    chosen: ModelChange,
    out: Path,
    texts: Sequence[str] = (),
    overwrite: bool = False,
    bound: Bound | None = None,
) -> Report:
    """Makes ``out`` as was planned; it appears when it is whole, and a stopped run goes on.

    With ``texts``, their perplexity is measured before and after. With a ``bound`` on what they
    lose, the forms of its levels are searched first (:mod:`.search`); then nothing else is planned.
    """
    need, identity, found = chosen.bytes_needed, chosen.identity, None
    if bound is not None:
        identity |= {"bound": bound, "text": xxh3_128_hexdigest("\0".join(texts).encode())}
    with whole_folder(out, identity, replace=overwrite, need_bytes=need) as part:
        if bound is not None and chosen.bank is not None:
            before = chosen.bank.before
            found = search(chosen.folder, before, bound, texts, part / BANK_FOLDER / NOTES)
            chosen = replace(chosen, bank=BankChange.planned(before, found.forms))
        return replace(write(chosen, part, texts), model=out, search=found)


def write(chosen: ModelChange, part: Path, texts: Sequence[str] = ()) -> Report:
    """Writes what was planned into the folder ``part``."""
    before = _scores(chosen.folder, texts)
    if chosen.bank is not None:  # first: else the anchor would load alone
        (part / BANK_FOLDER).mkdir(exist_ok=True)
    copy_missing({file: chosen.folder / file for file in chosen.files}, part)
    if chosen.anchor is not None:
        anchor = save_quantized_anchor(chosen.folder, part, chosen.anchor)
    else:
        size = weight_bytes(chosen.folder)
        anchor = AnchorChange(None, size, size, None, ())
    dtype, levels = None, []
    bank_folder = part / BANK_FOLDER
    if chosen.bank is not None and chosen.hmem is not None:
        hash_ = anchor_hash(part)
        dtype = chosen.bank.after.dtype
        levels = change_bank(chosen.folder / BANK_FOLDER, bank_folder, chosen.bank, hash_)
        hashes: dict[str, Any] = {"anchor_hash": hash_} | text_hashes(part)
        write_atomic(part / "hmem.json", replace(chosen.hmem, **hashes).to_json())
    load_anchor(part, lazy=True)  # config and weights go together
    scores = zip(before, _scores(part, texts), strict=True)
    forget_notes(bank_folder)
    return Report(part, anchor, dtype, tuple(levels), tuple(scores))


def _scores(folder: Path, texts: Sequence[str]) -> list[Perplexity]:
    if not texts:
        return []
    model = load(folder)
    modes = ("none",) if model.bank is None else ("fetched", "none")
    scores = [perplexity(model, texts, mode) for mode in modes]
    if model.bank is not None:
        model.bank.close()
    return scores
