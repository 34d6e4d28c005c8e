"""New model directories out of old ones.

A file that is the same in both is a hard link where the file system has them, else a copy: files of
a model are never written into, only replaced, so a link is as good. Shards of a bank that have
changed are written anew.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.format import MANIFEST, Level, Manifest, Shard
from mlx_hmem.bank.read.blocks import StoredBlock
from mlx_hmem.bank.writer import Cut, shard_metadata, write_shard
from mlx_hmem.files import link_or_copy
from mlx_hmem.model.find import BANK_FOLDER, BESIDE

Block = Callable[[int], list[memoryview] | None]  # of a cluster: the bytes of its parts


def link_model(source: Path, target: Path, but: Sequence[str] = ()) -> None:
    """Links all files of a model directory, except hidden ones and those whose path, or a folder
    of it, is named in ``but``."""
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        left_out = any(name.is_relative_to(each) for each in but)
        if file.is_file() and not hidden and not left_out:
            link_or_copy(file, target / name)


def link_bank(source: Path, target: Path) -> None:
    """Links what makes a bank that can be added to a model: manifest, shards, tree, documents."""
    link_or_copy(source / "hmem.json", target / "hmem.json")
    link_or_copy(
        source / "retriever" / "tree.safetensors", target / "retriever" / "tree.safetensors"
    )
    for file in sorted((source / BANK_FOLDER).iterdir()):
        if file.name in (MANIFEST, DOCUMENTS) or file.suffix == ".safetensors":
            link_or_copy(file, target / BANK_FOLDER / file.name)


def write_level_shard(
    folder: Path, manifest: Manifest, level: Level, cut: Cut, block: Block
) -> Shard:
    """Writes a shard of stored blocks, which ``block`` gives by cluster; None is a hole."""
    clusters = range(cut.first_cluster, cut.first_cluster + cut.num_clusters)
    metadata = shard_metadata(level.level, manifest.anchor_hash)
    row = manifest.row_type(level.level)
    return write_shard(folder, level, row, cut, map(block, clusters), metadata)


def bytes_of(block: StoredBlock) -> list[memoryview]:
    """What :func:`write_level_shard` takes."""
    return [memoryview(buffer).cast("B") for buffer in block.buffers]  # type: ignore[arg-type]


def added_folder(model: Path, name: str) -> Path:
    """Where an added bank lies in a model directory."""
    return model / BESIDE / name
