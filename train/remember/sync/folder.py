"""The documents of the folders to remember."""

from mlx_hmem.budget.resident import bytes_text, machine_bytes
from mlx_hmem.documents.files import CorpusFile, Faults
from mlx_hmem.documents.tables import Records
from mlx_hmem.errors import UserError

from ...corpus.own import Reading, read_folder
from ..export import Base
from ..plan import MEMORY_PER_BYTE


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
    named = {what if n > 1 else what.removesuffix("s"): n for what, n in counts.items() if n}
    notes = [f"{n} {what}" for what, n in named.items()]
    if reading.more_left:
        notes.append(f"the rest left out by --max-bytes {most_bytes}")
    if not reading.documents:
        raise UserError("there is nothing to remember", ", ".join(notes) or "0", "give more text")
    said = f"{len(reading.documents):,}" + (f" ({', '.join(notes)})" if notes else "")
    return reading, said
