"""Checkpoints of ``torch.save``, read without PyTorch and without running what they say.

A ``.pt`` or ``.bin`` file is a zip archive: ``data.pkl``, a pickle that names the tensors, and one
entry of raw bytes per storage; or, from before PyTorch 1.6, several pickles and then the storages
(``legacy``). ``zips`` checks the archive, ``pickle_machine`` runs the pickle, and ``names`` holds
what it may name. Of the tensors only the checksums are compared. Formats that are programs, or that
no PyTorch has written since 2017, are refused: there is no unsafe way around.
"""

import contextlib
import shlex
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from mlx_hmem.errors import UserError
from mlx_hmem.reading import RESTORE, open_regular, read_exactly

from .legacy import is_legacy, read_legacy
from .names import MAX_SHARING, NAMES, SMALL, Storage, check_reference
from .pickle_machine import MAX_PICKLE, Machine, Opaque
from .tensors import PIECE, Checkpoint, LazyTensor, join, open_safetensors
from .zips import Entry, read_directory

SAVE_AGAIN = (
    "load it with torch.load(path, weights_only=True), or, a whole module, where it was made, and "
    "save its tensors alone: torch.save(model.state_dict(), path)"
)
NESTS = (
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "app",
)  # where a model's tensors may lie
MAX_DEPTH = 64
MAX_VISITS = 2_000_000  # values looked at: shared ones may multiply
MAX_TENSORS = 1 << 17
MAX_NAME = 512  # characters
CONTAINERS = (dict, list, tuple)
END = object()
DCP_TO_TORCH = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch"
ONE_FILE = "pytorch_model.bin"


def open_files(paths: Sequence[Path]) -> Checkpoint:
    """What a checkpoint of safetensors or of ``torch.save`` holds, in one file or several.

    The model is looked for under ``state_dict``, ``model``, ``model_state_dict``, ``module`` and
    ``app``, one inside the other if need be, or in the one dictionary of tensors that there is
    under another name; else the whole file is the model. Dictionaries and
    lists inside it give names joined with dots. Raises :class:`UserError` for a file that is
    damaged, of another format, or that could run code.
    """
    return join(
        [open_safetensors([p]) if p.suffix == ".safetensors" else _open_torch(p) for p in paths]
    )


def refuse_distributed(folder: Path) -> None:
    """Raises UserError, with what makes one file of it, for a checkpoint that
    torch.distributed.checkpoint has saved in ``folder`` or below, as FSDP does."""
    found = (*folder.glob(".metadata"), *folder.glob("*/.metadata"))
    for place in sorted(file.parent for file in found):
        if any(place.glob("*.distcp")):
            words = [DCP_TO_TORCH, shlex.quote(str(place)), shlex.quote(str(folder / ONE_FILE))]
            remedy = f"where PyTorch is, run {' '.join(words)} and convert again"
            raise UserError("a checkpoint in parts, as FSDP saves it", place, remedy)


def _open_torch(path: Path) -> Checkpoint:
    with open_regular(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        start = read_exactly(file, min(size, 512), path)
        if is_legacy(start):
            with _explained(f"{path} is not read", f"{RESTORE}; {SAVE_AGAIN}"):
                return _Sorter().sort_out(read_legacy(path, file, size), size)
        _check_format(path, start)
        with _explained(f"{path} is not a whole checkpoint", RESTORE):
            entries = _entries(path, read_directory(file, size))
            if "byteorder" in entries and _entry(file, entries["byteorder"], 64) != b"little":
                raise ValueError("its numbers are not little-endian")
            pickled = _entry(file, entries["data.pkl"], MAX_PICKLE)
        with _explained(f"{path} is not read", SAVE_AGAIN):
            root = Machine(pickled, NAMES, partial(_storage, path, entries)).run()
            return _Sorter().sort_out(root, size)


@contextlib.contextmanager
def _explained(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(what, error, remedy) from None


def _check_format(path: Path, start: bytes) -> None:
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return
    if start[:1] == b"\x80" or start[257:262] == b"ustar":
        what = f"{path} is no checkpoint of torch.save, or one of PyTorch before 0.1.10"
        raise UserError(what, "a bare pickle or a tar archive", SAVE_AGAIN)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} only points to its data", "a Git LFS file", "run git lfs pull")
    remedy = "give a .pt or .bin file of torch.save; fetch it again if it is one"
    raise UserError(f"{path} is not a PyTorch checkpoint", f"it begins {start[:8]!r}", remedy)


def _entries(path: Path, directory: dict[str, Entry]) -> dict[str, Entry]:
    """The archive's entries, without the folder in which they all lie."""
    pickles = [name for name in directory if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"its archive has {len(pickles)} entries data.pkl, not one")
    root = pickles[0].removesuffix("data.pkl")
    entries = {name.removeprefix(root): entry for name, entry in directory.items()}
    if "constants.pkl" in entries or any(name.startswith("code/") for name in entries):
        raise UserError(f"{path} is a program", "a TorchScript archive", SAVE_AGAIN)
    packed = next((name for name, entry in entries.items() if not entry.stored), None)
    if packed is not None:
        raise ValueError(f"its entry {packed[:80]!r} is compressed or encrypted")
    return entries


def _entry(file: BinaryIO, entry: Entry, most: int) -> bytes:
    if entry.size > most:
        raise ValueError(f"an entry of {entry.size} bytes should have {most} at most")
    file.seek(entry.start)
    data = read_exactly(file, entry.size, file.name)
    # 0 after torch.serialization.set_crc32_options(False).
    if entry.crc not in (0, zlib.crc32(data)):
        raise ValueError("an entry does not match its checksum")
    return data


def _check_sum(path: Path, entry: Entry) -> None:
    found = 0
    with open_regular(path) as file:
        file.seek(entry.start)
        for at in range(0, entry.size, PIECE):
            found = zlib.crc32(read_exactly(file, min(PIECE, entry.size - at), path), found)
    if found != entry.crc:
        raise ValueError("an entry does not match its checksum")


def _storage(path: Path, entries: dict[str, Entry], reference: Any) -> Storage:
    """Of ("storage", class, key, device, number of elements), the only persistent id."""
    kind, key, size = check_reference(reference, 5)
    entry = entries.get(f"data/{key}")
    if entry is None or size > entry.size:
        raise ValueError(f"storage {key[:80]!r} of {size} bytes is not in its archive")
    if entry.crc:  # the bytes themselves are read later, where no one would know
        _check_sum(path, entry)
        entries[f"data/{key}"] = entry._replace(crc=0)
    return Storage(path, kind.dtype, entry.start, size)


class _Sorter:
    """Sorts what a pickle holds into the model's tensors, plain values, and the rest."""

    def __init__(self) -> None:
        self.visits = 0
        self.tensors: dict[str, LazyTensor] = {}
        self.values: dict[str, Any] = {}
        self.left_out: list[str] = []

    def sort_out(self, root: Any, size: int) -> Checkpoint:
        if type(root) is Opaque:
            raise ValueError(
                f"its pickle is one {root.name!r}, which is not built: it could run code"
            )
        if not isinstance(root, CONTAINERS):
            raise ValueError("its pickle holds no dictionary of tensors")
        value: Any = root
        prefix = ""
        for _ in range(MAX_DEPTH):
            if (nest := self.nest(value)) is None:
                break
            for key, other in value.items():
                if key != nest:
                    self.keep(prefix + _word(key), other)
            value, prefix = value[nest], f"{prefix}{nest}."
        self.collect(value, "", root=True)
        logical = sum(tensor.nbytes for tensor in self.tensors.values())
        if logical > max(MAX_SHARING * size, SMALL):
            raise ValueError(f"its tensors take {logical} bytes, far more than the file's {size}")
        return Checkpoint(self.tensors, self.values, tuple(self.left_out))

    def nest(self, value: Any) -> str | None:
        """The key under which the model lies, if it does not begin here."""
        if not isinstance(value, dict):
            return None
        within = (name for name in NESTS if isinstance(value.get(name), dict))
        if found := next((name for name in within if self.holds_tensor(value[name])), None):
            return found
        # Under another name, if there is but one such and no tensor beside it.
        flat = [key for key, each in value.items() if isinstance(each, dict) and _has_tensor(each)]
        return flat[0] if len(flat) == 1 and not _has_tensor(value) else None

    def collect(self, value: Any, name: str, root: bool = False) -> None:
        if len(name) > MAX_NAME or len(self.tensors) > MAX_TENSORS:
            raise ValueError("its tensors have too long names, or are too many")
        if type(value) is LazyTensor:
            if not name or name in self.tensors:
                raise ValueError(f"it has a tensor without a name of its own: {name!r}")
            self.tensors[name] = value
        elif isinstance(value, CONTAINERS) and (root or self.holds_tensor(value)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, child in items:
                self.collect(child, f"{name}.{_word(key)}" if name else _word(key))
        else:
            self.keep(name, value)

    def keep(self, name: str, value: Any) -> None:
        """Takes up a plain value; names one that is not."""
        if type(value) is Opaque:
            self.left_out.append(f"{name} ({value.name})")
        elif all(isinstance(leaf, str | int | float | None) for leaf in self.leaves(value)):
            self.values.setdefault(name, value)
        else:
            self.left_out.append(name)

    def holds_tensor(self, value: Any) -> bool:
        return any(type(leaf) is LazyTensor for leaf in self.leaves(value))

    def leaves(self, value: Any) -> Iterator[Any]:
        within = [iter((value,))]
        while within:
            value = next(within[-1], END)
            if value is END:
                within.pop()
                continue
            self.visits += 1
            if len(within) > MAX_DEPTH or self.visits > MAX_VISITS:
                raise ValueError("its values are nested too deeply, or too many times")
            if isinstance(value, CONTAINERS):
                within.append(iter(value.values() if isinstance(value, dict) else value))
            else:
                yield value


def _has_tensor(values: dict[Any, Any]) -> bool:
    return any(type(value) is LazyTensor for value in values.values())


def _word(key: Any) -> str:
    """A key as part of a name."""
    return key[: MAX_NAME + 1] if type(key) is str else str(key)
