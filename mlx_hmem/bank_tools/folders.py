"""New model directories out of old ones.

A file that is the same in both is a hard link where the file system has them, else a copy: files of
a model are never written into, only replaced, so a link is as good. Shards of a bank that have
changed are written anew. Only files of the format come along: what else somebody has put into a
folder, a note or a page that names a document, is none of the model's.
"""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from mlx_hmem.bank.documents import DOCUMENTS
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.bank.views import VIEWS
from mlx_hmem.config import HmemConfig
from mlx_hmem.files import link_or_copy
from mlx_hmem.model.find import BANK_FOLDER, BESIDE, check_inside
from mlx_hmem.reading import lies_there, open_regular

TREE = "retriever/tree.safetensors"
# What a bank consists of, who may fetch it apart.
SHARDS = ("generic.safetensors", "level-*.safetensors")
BANK = tuple(f"{BANK_FOLDER}/{name}" for name in (MANIFEST, DOCUMENTS, *SHARDS))
MEMORY = ("hmem.json", TREE, *BANK)
# Of an anchor: what mlx-lm and transformers read, and what says who made it.
ANCHOR = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.model", "*.tiktoken", "chat_template.*", "*.jinja", "README.md",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
ENCODER = ("config.json", "tokenizer.json", "encoder.safetensors", "model.safetensors")


def link_model(
    source: Path, target: Path, only: Sequence[str] = ("*",), but: Sequence[str] = ()
) -> None:
    """Links files of a model directory, those of :func:`model_files`."""
    for name in model_files(source, only, but):
        link_or_copy(source / name, target / name)


def model_files(folder: Path, only: Sequence[str] = ("*",), but: Sequence[str] = ()) -> list[Path]:
    """The files of the format in a model's folder, relative to it, that a pattern of ``only`` names
    and none of ``but``; * matches / too. UserError for views that cannot be read (without them
    everything would be allowed), and for a link to elsewhere, but for tensors: shards may lie on
    another disk."""
    if lies_there(views := folder / BANK_FOLDER / VIEWS):
        with open_regular(views):
            pass
    files = {file.relative_to(folder) for each in _places(folder) for file in folder.glob(each)}
    found = sorted(
        file
        for file in files
        if not (folder / file).is_dir()
        and any(fnmatch(str(file), pattern) for pattern in only)
        and not any(fnmatch(str(file), pattern) for pattern in but)
    )
    for file in found:
        with open_regular(folder / file):  # a pipe or a device would be left out in silence
            pass
        if file.suffix != ".safetensors":
            check_inside(folder / file, folder)
    return found


def _places(folder: Path) -> Iterator[str]:
    """Where files of a model lie, as patterns of which * stays within a folder."""
    yield from (*ANCHOR, *MEMORY, f"{BANK_FOLDER}/{VIEWS}")
    yield from (f"{BESIDE}/*/{name}" for name in MEMORY)
    if (folder / "hmem.json").is_file():
        retriever = HmemConfig.from_file(folder / "hmem.json").retriever
        encoder = Path(".." if retriever is None else retriever.encoder)
        if not encoder.is_absolute() and ".." not in encoder.parts:
            yield from (str(encoder / name) for name in ENCODER)
