"""Which documents are meant to be forgotten."""

from collections.abc import Mapping, Sequence

from mlx_hmem.bank.documents import Document, find_documents
from mlx_hmem.errors import UserError

from ..export import Base
from ..rest import Taught


def other_names(taught: Sequence[Taught]) -> dict[str, list[str]]:
    """Of documents, by their hashes, the names of copies that runs have read too."""
    found: dict[str, list[str]] = {}
    for run in taught:
        for document in run.documents:
            found.setdefault(document.sha256, []).extend(document.also)
        for sha256, names in run.known.items():
            found.setdefault(sha256, []).extend(names)
    return found


def chosen_documents(
    bases: Mapping[str, Base], taught: Sequence[Taught], names: Sequence[str]
) -> list[Document]:
    """The documents of any of the banks that are meant, each once (:func:`find_documents`). A copy
    that was read beside a document, or later, is known by the run alone, and means that document.

    Raises UserError: there is no such document, or in a bank one that no run has taught.
    """
    known = {d.sha256: d for base in bases.values() for d in base.documents}
    also = other_names(taught)
    each = (find_documents([*known.values()], name, also) for name in names)
    chosen = [*{d.sha256: d for found in each for d in found}.values()]
    for document in chosen:
        for name, base in bases.items():
            runs = [r for r in taught if name in r.banks]
            there = any(d.sha256 == document.sha256 for d in base.documents)
            if there and not any(d.sha256 == document.sha256 for r in runs for d in r.documents):
                where = f"bank {name}" if name else "the model's own bank"
                raise UserError(
                    f"no run that was given has taught {document.name}",
                    where,
                    "give the folder of the run that did with --run, beside the others",
                )
    return chosen
