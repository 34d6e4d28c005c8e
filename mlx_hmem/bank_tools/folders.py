"""New model directories out of old ones.

A file that is the same in both is a hard link where the file system has them, else a copy: files of
a model are never written into, only replaced, so a link is as good. Shards of a bank that have
changed are written anew.
"""

from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.files import link_or_copy
from mlx_hmem.model.find import BANK_FOLDER

TREE = "retriever/tree.safetensors"
# What a bank consists of, who may fetch it apart.
BANK = tuple(f"{BANK_FOLDER}/{name}" for name in (MANIFEST, DOCUMENTS, "*.safetensors"))


def link_model(
    source: Path, target: Path, only: Sequence[str] = ("*",), but: Sequence[str] = ()
) -> None:
    """Links files of a model directory, those of :func:`model_files`."""
    for name in model_files(source, only, but):
        link_or_copy(source / name, target / name)


def model_files(folder: Path, only: Sequence[str] = ("*",), but: Sequence[str] = ()) -> list[Path]:
    """The files of a folder, relative to it, that a pattern of ``only`` names and none of ``but``,
    none of them hidden; * matches / too."""
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.is_file()]
    return sorted(
        file
        for file in files
        if not any(part.startswith(".") for part in file.parts)
        and any(fnmatch(str(file), pattern) for pattern in only)
        and not any(fnmatch(str(file), pattern) for pattern in but)
    )
