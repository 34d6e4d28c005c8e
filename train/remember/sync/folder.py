"""The folders to remember: their files, what names them as they are now, and their documents."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.documents.readers import DEFAULT, own_files
from mlx_hmem.documents.tables import Records
from mlx_hmem.errors import UserError

from ...corpus.own import Reading, read_folder
from ..export import Base
from ..plan import MEMORY_PER_BYTE


def files_of(sources: Sequence[Path], faults: Faults) -> list[CorpusFile]:
    """The files of a file or folder, or of several; then their names begin with that of theirs.
    What is left out goes to ``faults``."""
    if len(sources) == 1:
        return own_files(sources[0], faults)
    found, names = list[CorpusFile](), Counter(source.resolve().name for source in sources)
    for source in sources:
        name = source.resolve().name
        if names[name] > 1:
            raise UserError("two folders have the same name", name, "rename one of them")
        own = own_files(source, faults)
        if source.is_dir():
            own = [file._replace(name=f"{name}/{file.name}") for file in own]
        found += own
    return found


def source_of(files: list[CorpusFile], most_bytes: int | None, records: Records) -> str:
    """What names the folder as it is now: names, sizes and times of its files, and how they are
    read."""
    seen = [(file.name, *file.state) for file in files]
    own = () if records == DEFAULT else (records,)
    return hashlib.sha256(repr((seen, most_bytes, *own)).encode()).hexdigest()


def read_new(
    base: Base, files: list[CorpusFile], most_bytes: int | None, records: Records, faults: Faults
) -> tuple[Reading, str]:
    """The documents to remember, and in words what was found; UserError if there is none, or if a
    file has changed while they were read."""
    known = {document.sha256 for document in base.documents}
    most = most_bytes or machine_bytes() // MEMORY_PER_BYTE
    states = [file.state for file in files]
    reading = read_folder(files, known, faults, most, records)
    for file, state in zip(files, states, strict=True):
        if file.state != state:
            remedy = "run the same command again when it is left alone"
            raise UserError("a file changed while it was read", file.name, remedy)
    if reading.more_left and most_bytes is None:
        what = "the files unpack to more text than this machine can hold"
        remedy = f"give --max-bytes {most} or less, or a folder with less text"
        raise UserError(what, f"more than {bytes_text(most)}", remedy)
    counts = {
        "duplicates": reading.duplicates,
        "known already": sum(map(len, reading.known.values())),
        "passed over": sum((faults.counts + faults.kinds).values()),
    }
    notes = [f"{count} {what}" for what, count in counts.items() if count]
    if reading.more_left:
        notes.append(f"the rest left out by --max-bytes {most_bytes}")
    if not reading.documents:
        raise UserError("there is nothing to remember", ", ".join(notes) or "0", "give more text")
    said = f"{len(reading.documents):,}" + (f" ({', '.join(notes)})" if notes else "")
    return reading, said
