"""Whole models with memories between PyTorch's layout (docs/pytorch_layout.md) and ours.

Everything is streamed: the anchor tensor by tensor, the bank shard by shard. ``hmem.json``, or on
the way back the marker, comes last, and the folder appears when all of it is there.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_hmem.anchors.attach import check_sizes
from mlx_hmem.anchors.load import anchor_hash, anchor_of_config, text_hashes
from mlx_hmem.anchors.openlm import PREFIXES
from mlx_hmem.bank.format import MANIFEST, Manifest, stored_r
from mlx_hmem.bank.writer import planned_bytes
from mlx_hmem.config import FORMAT_VERSION, HmemConfig, JsonConfig, MemoryConfig, RetrieverConfig
from mlx_hmem.errors import UserError
from mlx_hmem.files import fingerprint, write_atomic
from mlx_hmem.folders import copy_missing
from mlx_hmem.model.load import open_bank, read_hmem
from mlx_hmem.reading import check_version, read_json, strict_json
from mlx_hmem.retriever import ClusterTree, Retriever, load_encoder

from ..anchors import hugging_face, openlm
from ..anchors.keys import short_name
from ..anchors.weights import Conversion
from ..torch_files.pickles import open_files
from .bank import tables_file, write_bank_as_tables, write_tensors_as_bank
from .tensors import LevelTensors, common_dtype, find_levels, is_memory, short_names
from .trees import read_tree

MARKER = "hmem_pytorch.json"
LAYOUT_VERSION = 1
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
        texts = [self.anchor, self.tree, self.encoder]
        texts += [] if self.tokenizer is None else [self.tokenizer]
        if not isinstance(self.tensors, tuple) or not self.tensors:
            raise UserError(f"{MARKER} names no tensors", repr(self.tensors)[:80], "list the files")
        for text in (*texts, *self.tensors):
            if not isinstance(text, str) or not text:
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


def from_pytorch(
    source: Path,
    dtype: str | None = None,
    config: Path | None = None,
    options: dict[str, Any] | None = None,
    tokenizer: Path | None = None,
) -> Conversion:
    """A folder with ``hmem_pytorch.json`` as a model directory; nothing but headers is read.

    Args:
        dtype: rounds anchor and bank to float32, float16 or bfloat16; None keeps the bits.
        config, options, tokenizer: of an OpenLM anchor, as
            :func:`convert.anchors.openlm.from_torch` takes them.

    Raises:
        UserError: parts that are missing, wrong or do not fit; one line says all that is.
    """
    marker = Marker.from_file(source / MARKER)
    memory, files = marker.memory, [_inside(source, name) for name in marker.tensors]
    if marker.tokenizer is not None and tokenizer is None:
        tokenizer = _inside(source, marker.tokenizer)
    path = _inside(source, marker.anchor)
    anchor = _anchor(path, files, config, options or {}, tokenizer, dtype)
    check_sizes(anchor_of_config(anchor.config), memory)
    levels = _levels(files, anchor, memory)
    stored, notes = common_dtype(levels, dtype), [*anchor.notes]
    if levels[0] is None:
        notes.append("no generic memory in the source: zeros, which have no effect")
    tree_file = _inside(source, marker.tree)
    tree = read_tree(tree_file, memory.branching)
    named = marker.encoder in NAMED_ENCODERS
    encoder: str | Path = marker.encoder if named else _inside(source, marker.encoder)
    Retriever(load_encoder(encoder), tree)  # that they belong together
    small = [*_files_of(tree_file), *(_files_of(encoder) if isinstance(encoder, Path) else [])]
    small_bytes = sum(file.stat().st_size for file in small)
    planned = Manifest.planned(memory, stored, None, "", "")

    def write(part: Path) -> None:
        (part / "bank").mkdir(parents=True, exist_ok=True)  # else the anchor would load alone
        anchor.write(part)
        retriever = write_retriever(tree_file, tree, encoder, part)
        hmem = HmemConfig(FORMAT_VERSION, memory, retriever, anchor_hash(part), **text_hashes(part))
        write_tensors_as_bank(
            part / "bank",
            memory,
            levels,
            dtype=stored,
            anchor_hash=hmem.anchor_hash,
            tree_hash=retriever.tree_hash,
        )
        write_atomic(part / "hmem.json", hmem.to_json())

    return Conversion(
        [source / MARKER, *files, *anchor.sources, *small],
        anchor.need_bytes + planned_bytes(planned) + 2 * small_bytes + (1 << 20),
        notes,
        write,
        f"a model with {memory.bank_parameters:,} parameters of memory in {stored}",
        anchor.config,
    )


def _levels(
    files: list[Path], anchor: Conversion, memory: MemoryConfig
) -> dict[int, LevelTensors | None]:
    """The memory's tensors in files, of which some may be the anchor's as well."""
    anchor_files = {file.resolve() for file in anchor.sources}
    tensors = {
        name: tensor
        for name, tensor in short_names(open_files(files).tensors).items()
        if is_memory(name) or tensor.path.resolve() not in anchor_files
    }
    return find_levels(tensors, memory)


def _anchor(
    path: Path,
    memory_files: list[Path],
    config: Path | None,
    options: dict[str, Any],
    tokenizer: Path | None,
    dtype: str | None,
) -> Conversion:
    if path.is_dir() and hugging_face.is_hugging_face(path):
        return hugging_face.from_torch(path, dtype, tokenizer)
    files = {f.resolve() for f in openlm.checkpoint_files(path)}
    shared = not files.isdisjoint(f.resolve() for f in memory_files)

    def is_foreign(name: str) -> bool:
        """Where one checkpoint holds anchor and memory."""
        return shared and is_memory(short_name(name, PREFIXES))

    return openlm.from_torch(path, dtype, config, options, tokenizer, is_foreign)


def _files_of(path: Path) -> list[Path]:
    return [f for f in sorted(path.rglob("*")) if f.is_file()] if path.is_dir() else [path]


def _by_name(folder: Path) -> dict[Path, Path]:
    return {file.relative_to(folder): file for file in _files_of(folder)}


def write_retriever(
    tree_file: Path | None, tree: ClusterTree, encoder: str | Path, part: Path
) -> RetrieverConfig:
    """Writes the tree, and the encoder where it is a folder; says by what they are known."""
    name = encoder if isinstance(encoder, str) else ENCODER
    if isinstance(encoder, Path):
        copy_missing(_by_name(encoder), part / ENCODER)
        encoder = part / ENCODER
    found = load_encoder(encoder).fingerprint
    if tree_file is not None and tree.encoder_hash is not None:  # a tree of ours, as it is
        write_atomic(part / TREE, tree_file.read_bytes())
    else:
        tree.save(part / TREE, found)
    return RetrieverConfig(name, found, fingerprint(part / TREE))


def to_pytorch(source: Path, dtype: str | None = None) -> Conversion:
    """A model directory as a folder in PyTorch's layout; the inverse of :func:`from_pytorch`.

    Args:
        dtype: rounds anchor and bank, and dequantises a quantised bank; None keeps the bits.

    Raises:
        UserError: the model is not whole, or quantised and no dtype is given.
    """
    hmem = read_hmem(source)
    assert hmem is not None, "kind_of says so"
    with open_bank(source, hmem, cache_bytes=0) as bank:
        manifest = bank.manifest
    if manifest.quantization is not None and dtype is None:
        raise UserError(
            "the memory bank is quantised",
            source / "bank",
            f"dequantise it with --dtype {manifest.dtype}, or convert the unquantised one",
        )
    anchor = openlm.into_torch(source, dtype)
    named = hmem.routed.encoder in NAMED_ENCODERS
    encoder = None if named else source / hmem.routed.encoder
    stored, tree = dtype or manifest.dtype, source / TREE
    shards = [source / "bank" / shard.file for shard in manifest.shards]
    sources = [source / "hmem.json", source / "bank" / MANIFEST, *shards, tree]
    sources += [*anchor.sources, *(_files_of(encoder) if encoder else [])]
    names = [tables_file(number) for number in stored_r(hmem.memory)]

    def write(part: Path) -> None:
        anchor.write(part / "anchor")
        with open_bank(source, hmem, cache_bytes=0) as bank:
            write_bank_as_tables(part, bank, stored)
        write_atomic(part / "tree.safetensors", tree.read_bytes())
        if encoder is not None:
            copy_missing(_by_name(encoder), part / "encoder")
        marker = Marker(
            LAYOUT_VERSION,
            hmem.memory,
            "anchor",
            tuple(names),
            "tree.safetensors",
            "encoder" if encoder is not None else hmem.routed.encoder,
        )
        write_atomic(part / MARKER, json.dumps(marker.to_dict(), indent=2) + "\n")

    planned = Manifest.planned(hmem.memory, stored, None, "", "")
    need = anchor.need_bytes + planned_bytes(planned) + tree.stat().st_size
    made = f"{MARKER}, anchor and {len(names)} files of memory in {stored}"
    left = ["left out: the names of memories"] if hmem.names else []
    return Conversion(sources, need, [*anchor.notes, *left], write, made, anchor.config)
