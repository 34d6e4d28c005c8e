"""Which documents have taught the blocks that a text fetches, and where they say it."""

from collections.abc import Iterator

from mlx_hmem.generation.passages import Passages
from mlx_hmem.model.fetch import NOTHING_NEAR
from mlx_hmem.model.model import MemoryModel


def which_lines(model: MemoryModel, text: str, passages: Passages | None) -> Iterator[str]:
    """For people: the memory, then its documents, those first that cover the most of the text,
    each with how much that is and its nearest passage, where the text of the documents is there."""
    banks = model.require_banks()
    bank, path = banks.route(text)
    if path is None:
        yield f"memory: none: {NOTHING_NEAR}"
        return
    yield f"memory: {f'bank {bank}, ' if bank else ''}{path}"
    documents = banks.taught_by(bank, path, frozenset(), text)
    for document, covered in documents.items():
        yield f"{covered:5.0%}  {document.name}"
        passage = None if passages is None else passages.nearest_in(document.name, text)
        if passage is not None:
            yield f"       {passage.text}"
    if not documents:
        yield "no document is known to have taught it"
