"""Whole models with memories between PyTorch's layout (docs/pytorch_layout.md) and ours.

Everything is streamed: the anchor tensor by tensor, the bank shard by shard. ``hmem.json``, or on
the way back the marker, comes last, and the folder appears when all of it is there.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.attach import check_sizes
from mlx_hmem.anchors.load import anchor_hash, anchor_of_config, read_config
from mlx_hmem.bank import Bank
from mlx_hmem.bank.format import MANIFEST, STORED_TYPES, Manifest
from mlx_hmem.config import (
    FORMAT_VERSION,
    HmemConfig,
    JsonConfig,
    MemoryConfig,
    RetrieverConfig,
    check_version,
    read_json,
)
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, strict_json, write_atomic
from mlx_hmem.folders import identity_of, whole_folder
from mlx_hmem.retriever import ClusterTree, Retriever, load_encoder

from ..anchors import hugging_face, openlm
from ..anchors.openlm_config import read_openlm_config
from ..anchors.weights import DTYPES, Plan, companions
from ..torch_files.pickles import open_torch
from ..torch_files.tensors import join, open_safetensors
from .bank import bank_bytes, write_bank_as_tables, write_tensors_as_bank
from .tensors import (
    LevelTensors,
    common_dtype,
    find_levels,
    is_memory,
    short_names,
)
from .trees import read_tree

MARKER = "hmem_pytorch.json"
LAYOUT_VERSION = 1
VERSION = 1  # of what a conversion writes: another one does not go on with a stopped one
NAMED_ENCODERS = ("minilm", "static")
ENCODER = "retriever/encoder"
TREE = "retriever/tree.safetensors"


@dataclass(frozen=True)
class Marker(JsonConfig):
    """``hmem_pytorch.json``: where the parts of a model lie, relative to it."""

    format_version: int
    memory: MemoryConfig
    anchor: str  # an OpenLM checkpoint, its folder, or a Hugging Face folder
    tensors: tuple[str, ...]  # the files that hold the memory's tensors
    tree: str
    encoder: str  # minilm, static, or a folder
    tokenizer: str | None = None  # a folder; null: beside the anchor

    def __post_init__(self) -> None:
        texts = [self.anchor, self.tree, self.encoder, self.tokenizer or ""]
        if not isinstance(self.tensors, tuple) or not self.tensors:
            raise UserError(f"{MARKER} names no tensors", repr(self.tensors)[:80], "list the files")
        for text in (*texts, *self.tensors):
            if not isinstance(text, str):
                raise UserError(f"{MARKER} has a name that is no text", repr(text)[:80], "mend it")

    @classmethod
    def from_file(cls, path: Path) -> "Marker":
        values = read_json(path, parse=strict_json)
        check_version(values, LAYOUT_VERSION, path, "store the model again")
        if "memory" in values:
            values["memory"] = MemoryConfig.from_dict(values["memory"], f"{path} (memory)")
        return cls.from_dict(values, str(path))


def _inside(source: Path, name: str) -> Path:
    """The path of a part, which must lie in the folder."""
    path = source / name
    if not path.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{MARKER} names something outside its folder", name, "move it inside")
    if not path.exists():
        raise UserError(f"{MARKER} names something that is not there", path, "restore it")
    return path


@dataclass(frozen=True)
class _Source:
    """A model in PyTorch's layout, opened and checked; nothing but headers has been read."""

    marker: Marker
    anchor: Plan
    levels: Mapping[int, LevelTensors | None]
    files: list[Path]
    tree_file: Path
    tree: ClusterTree
    encoder: str | Path


def _open(
    source: Path,
    config: Path | None,
    options: dict[str, Any],
    tokenizer: Path | None,
    dtype: str | None,
) -> _Source:
    marker = Marker.from_file(source / MARKER)
    files = [_inside(source, name) for name in marker.tensors]
    if marker.tokenizer is not None and tokenizer is None:
        tokenizer = _inside(source, marker.tokenizer)
    anchor = _anchor(_inside(source, marker.anchor), files, config, options, tokenizer, dtype)
    check_sizes(anchor_of_config(anchor.config), marker.memory)
    checkpoint = join(
        [(open_safetensors if f.suffix == ".safetensors" else open_torch)([f]) for f in files]
    )
    anchor_files = {file.resolve() for file in anchor.sources}
    tensors = {
        name: tensor
        for name, tensor in short_names(checkpoint.tensors).items()
        if is_memory(name) or tensor.path.resolve() not in anchor_files
    }
    levels = find_levels(tensors, marker.memory)
    tree_file = _inside(source, marker.tree)
    tree = read_tree(tree_file, marker.memory.branching)
    encoder: str | Path = marker.encoder
    if encoder not in NAMED_ENCODERS:
        encoder = _inside(source, marker.encoder)
    Retriever(load_encoder(encoder), tree)  # that they belong together
    return _Source(marker, anchor, levels, files, tree_file, tree, encoder)


def _anchor(
    path: Path,
    memory_files: list[Path],
    config_file: Path | None,
    options: dict[str, Any],
    tokenizer: Path | None,
    dtype: str | None,
) -> Plan:
    tag = DTYPES[dtype] if dtype else None
    if path.is_dir() and _is_hugging_face(path):
        plan = hugging_face.plan_from_torch(path, tag)
        own = companions(tokenizer) if tokenizer is not None else []
        named = {file.name for file in own}
        plan.copied[:] = own + [file for file in plan.copied if file.name not in named]
        return plan
    files = openlm.checkpoint_files(path)
    config, file = read_openlm_config(path, config_file, options)
    checkpoint = openlm.open_checkpoint(files)
    both = {f.resolve() for f in files} & {f.resolve() for f in memory_files}
    tensors = checkpoint.tensors
    if both:  # one checkpoint holds anchor and memory
        memory = {
            name for name in tensors if is_memory(next(iter(short_names({name: tensors[name]}))))
        }
        tensors = {name: tensor for name, tensor in tensors.items() if name not in memory}
    plan = openlm.plan_of_tensors(tensors, config, tag)
    plan.notes.extend(f"left out {name}: no part of the model" for name in checkpoint.left_out)
    plan.sources.extend([*files, *([file] if file else [])])
    plan.copied.extend(companions(tokenizer or (path if path.is_dir() else path.parent)))
    if not any(file.name.startswith("tokenizer") for file in plan.copied):
        plan.notes.append("no tokenizer beside the anchor: put tokenizer.json into the result")
    return plan


def _is_hugging_face(folder: Path) -> bool:
    values = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    return isinstance(values, dict) and "model_type" in values


def from_pytorch(
    source: Path,
    target: Path,
    *,
    overwrite: bool = False,
    dtype: str | None = None,
    config: Path | None = None,
    options: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Makes a model directory of a folder with ``hmem_pytorch.json``.

    Args:
        overwrite: replace a model at ``target``.
        dtype: rounds anchor and bank to float32, float16 or bfloat16; None keeps the bits.
        config, options, tokenizer: of an OpenLM anchor, as
            :func:`convert.anchors.openlm.plan_from_torch` takes them.

    Raises:
        UserError: parts that are missing, wrong or do not fit; one line says all that is.
    """
    opened = _open(source, config, options or {}, tokenizer, dtype)
    memory, anchor = opened.marker.memory, opened.anchor
    stored = common_dtype(opened.levels, dtype)
    for note in anchor.notes:
        print(note, file=sys.stderr)
    if opened.levels[0] is None:
        print("no generic memory in the source: zeros, which have no effect", file=sys.stderr)
    sources = [source / MARKER, *opened.files, *anchor.sources, *anchor.copied]
    sources += _files_of(opened.tree_file)
    sources += _files_of(opened.encoder) if isinstance(opened.encoder, Path) else []
    identity = identity_of(sources, to="mlx", version=VERSION, dtype=dtype, set=options)
    small = sum(f.stat().st_size for f in sources[1 + len(opened.files) + len(anchor.sources) :])
    need = anchor.need_bytes + bank_bytes(memory, stored) + 2 * small + (1 << 20)
    with whole_folder(target, identity, replace=overwrite, need_bytes=need) as part:
        (part / "bank").mkdir(exist_ok=True)  # first: else the anchor would load alone
        anchor.write(part)
        retriever = _write_retriever(opened, part)
        hmem = HmemConfig(FORMAT_VERSION, memory, retriever, anchor_hash(part))
        write_tensors_as_bank(
            part / "bank",
            memory,
            opened.levels,
            dtype=dtype,
            anchor_hash=hmem.anchor_hash,
            tree_hash=retriever.tree_hash,
        )
        write_atomic(part / "hmem.json", hmem.to_json())
    print(f"{target}: a model with {memory.bank_parameters:,} parameters of memory in {stored}")


def _files_of(path: Path) -> list[Path]:
    return [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]


def _write_retriever(opened: _Source, part: Path) -> RetrieverConfig:
    """Writes the tree, and the encoder where it is a folder; says by what they are known."""
    name = str(opened.encoder)
    if isinstance(opened.encoder, Path):
        name = ENCODER
        _copy_folder(opened.encoder, part / ENCODER)
    encoder = load_encoder(part / ENCODER if isinstance(opened.encoder, Path) else name)
    if opened.tree.encoder_hash is not None:  # a tree of ours, as it is
        write_atomic(part / TREE, opened.tree_file.read_bytes())
    else:
        opened.tree.save(part / TREE, encoder.fingerprint)
    return RetrieverConfig(name, encoder.fingerprint, fingerprint(part / TREE))


def _copy_folder(source: Path, target: Path) -> None:
    """Copies a folder of small files; one that exists is whole."""
    for file in _files_of(source):
        place = target / file.relative_to(source)
        if not place.exists():
            write_atomic(place, file.read_bytes())


def to_pytorch(
    source: Path, target: Path, *, overwrite: bool = False, dtype: str | None = None
) -> None:
    """Makes a folder in PyTorch's layout of a model directory; the inverse of :func:`from_pytorch`.

    Args:
        dtype: rounds anchor and bank, and dequantises a quantised bank; None keeps the bits.

    Raises:
        UserError: the model is not whole, or quantised and no dtype is given.
    """
    hmem = HmemConfig.from_file(source / "hmem.json")
    manifest = Manifest.from_file(source / "bank" / MANIFEST)
    if manifest.quantization is not None and dtype is None:
        raise UserError(
            "the memory bank is quantised",
            source / "bank",
            f"dequantise it with --dtype {manifest.dtype}, or convert the unquantised one",
        )
    if dtype is not None and dtype not in STORED_TYPES:
        raise UserError("unknown dtype", dtype, f"use one of {', '.join(STORED_TYPES)}")
    if anchor_hash(source) != hmem.anchor_hash:
        raise UserError("the anchor is not the one of this memory", source, "restore the anchor")
    own = read_config(source)["model_type"] == "openlm"
    anchor = (openlm if own else hugging_face).plan_to_torch(
        source, DTYPES[dtype] if dtype else None
    )
    named = hmem.retriever.encoder in NAMED_ENCODERS
    encoder = None if named else source / hmem.retriever.encoder
    stored = dtype or manifest.dtype
    tree = source / TREE
    shards = [source / "bank" / s.file for level in manifest.all_levels for s in level.shards]
    sources = [source / "hmem.json", source / "bank" / MANIFEST, *shards, tree]
    sources += [*anchor.sources, *anchor.copied, *(_files_of(encoder) if encoder else [])]
    identity = identity_of(sources, to="pytorch", version=VERSION, dtype=dtype)
    need = anchor.need_bytes + bank_bytes(hmem.memory, stored) + tree.stat().st_size
    with (
        Bank.open(source / "bank", cache_bytes=0) as bank,
        whole_folder(target, identity, replace=overwrite, need_bytes=need) as part,
    ):
        bank.check(hmem.anchor_hash, hmem.retriever.tree_hash)
        (part / "anchor").mkdir(exist_ok=True)
        anchor.write(part / "anchor")
        names = write_bank_as_tables(part, bank, stored)
        write_atomic(part / "tree.safetensors", tree.read_bytes())
        if encoder is not None:
            _copy_folder(encoder, part / "encoder")
        marker = Marker(
            LAYOUT_VERSION,
            hmem.memory,
            "anchor",
            tuple(names),
            "tree.safetensors",
            "encoder" if encoder is not None else hmem.retriever.encoder,
        )
        write_atomic(part / MARKER, json.dumps(marker.to_dict(), indent=2) + "\n")
    print(f"{target}: {MARKER}, anchor and {len(names)} files of memory in {stored}")
