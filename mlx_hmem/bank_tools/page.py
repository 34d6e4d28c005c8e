"""The page of ``inspect --html``: one file that needs nothing else, neither network nor server.

It routes typed texts by itself where the encoder is the static one: that takes 6 MB for its word
pieces and vectors, and as many levels of centroids as fit ``CENTROID_BYTES``. With another encoder
it shows the routes of the texts given with ``--text`` alone.
"""

import base64
import html
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.bank.views import Views
from mlx_hmem.bank_tools.contents import Contents, stored_as
from mlx_hmem.bank_tools.effects import Effects
from mlx_hmem.errors import UserError
from mlx_hmem.files import load_safetensors, write_atomic
from mlx_hmem.model.load import open_encoder
from mlx_hmem.retriever.encoder import STATIC_FOLDER
from mlx_hmem.retriever.static import MAX_CHARACTERS, StaticEncoder

CENTROID_BYTES = 8 << 20
MOST_CLUSTERS = 1 << 17  # of a bank; deeper levels are left out


def write_page(
    out: Path, contents: Sequence[Contents], views: Views, effects: Effects | None
) -> str:
    """Writes the page; a line that says so."""
    if out.suffix not in (".html", ".htm"):  # what else there is must not be written over
        raise UserError("not the name of a page", out, "end it in .html")
    encoder, note = _encoder(contents)
    first = contents[0]
    documents = sum(len(each.documents) for each in contents)
    data = {
        "title": first.opened.folder.resolve().name,
        "facts": f"{sum(each.config.bank_parameters for each in contents):,} parameters in "
        f"{sum(sum(each.config.num_clusters) for each in contents):,} clusters, "
        f"{documents:,} documents, {len(contents)} bank{'s' if len(contents) > 1 else ''}",
        "banks": [_bank(each, effects) for each in contents],
        "views": {name: [list(path) for path in barred] for name, barred in views.items()},
        "texts": None if effects is None else [text._asdict() for text in effects.texts],
        "routeNote": note,
    }
    parts = {
        "@TITLE@": html.escape(str(data["title"]), quote=False),
        "@STYLE@": _asset("page.css"),
        "@DATA@": _json(data),
        "@ENCODER@": _json(encoder),
        "@ROUTE@": _asset("page_route.js"),
        "@SCRIPT@": _asset("page.js"),
    }
    page = _asset("page.html")
    pieces = []
    for mark, text in parts.items():  # one after the other: what is put in is not looked at again
        before, _, page = page.partition(mark)
        pieces += [before, text]
    write_atomic(out, "".join([*pieces, page]))
    return f"{out}: {out.stat().st_size:,} bytes; open it in a browser"


def _asset(name: str) -> str:
    return (files("mlx_hmem.bank_tools") / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that may stand in a script element: no < can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _base64(array: np.ndarray, dtype: str = "<f4") -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype).tobytes()).decode()


def _shown_levels(contents: Contents) -> int:
    """How many levels of a bank the page shows."""
    counts = [int((counts > 0).sum()) for counts in contents.opened.tree.counts]
    return max(1, int((np.cumsum(counts) <= MOST_CLUSTERS).sum()))


def _bank(contents: Contents, effects: Effects | None) -> dict[str, Any]:
    bank, config = contents.opened.bank, contents.config
    levels = []
    for level in range(1, _shown_levels(contents) + 1):
        found = sorted((c, each) for (n, c), each in contents.clusters.items() if n == level)
        blocks = {} if effects is None else effects.blocks
        of_each = [blocks.get((contents.opened.name, level, c)) for c, _ in found]
        levels.append(
            {
                "count": config.num_clusters[level - 1],
                "ids": [c for c, _ in found],
                "examples": [each.examples for _, each in found],
                "tokens": [round(each.tokens) for _, each in found],
                "terms": [each.terms for _, each in found],
                "empty": [int(each.empty) for _, each in found],
                "effect": [
                    None if e is None else [round(e.per_token, 5), e.tokens] for e in of_each
                ],
            }
        )
    return {
        "name": contents.opened.name,
        "kind": config.kind,
        "r": config.r,
        "branching": config.branching,
        "parameters": config.bank_parameters,
        "anchor": bank.anchor_hash,
        "tree": bank.tree_hash,
        "blockBytes": [bank.block_bytes(n) if r else 0 for n, r in enumerate(config.r, 1)],
        "stored": [stored_as(bank, n) for n in range(1, config.num_levels + 1)],
        "levels": levels,
        "documents": [vars(document) | {"words": None} for document in contents.documents],
    }


def _encoder(contents: Sequence[Contents]) -> tuple[dict[str, Any] | None, str]:
    """What the page routes with, None where it cannot, and what a reader should know of that."""
    first = contents[0].opened
    encoder = open_encoder(first.folder, first.hmem)
    if not isinstance(encoder, StaticEncoder):
        return None, (
            f"This model routes with the encoder {encoder.name}, which is too large for a page: "
            "routes are shown of the texts that inspect was given with --text."
        )
    trees: list[list[str]] = []
    left, note = CENTROID_BYTES, ""
    for each in contents:
        trees.append([])
        tree = each.opened.tree
        for level in range(1, _shown_levels(each) + 1):
            rows = np.array(sorted(c for n, c in each.clusters if n == level))
            left -= len(rows) * tree.dim * 4
            if left < 0:
                note = f"Texts are routed down to level {level - 1}: deeper centroids are too many."
                break
            trees[-1].append(_base64(np.asarray(tree.centroids[level - 1])[rows]))
    if not all(trees):
        return None, "The trees are too large for a page to route with."
    name = first.hmem.routed.encoder
    return _tables(STATIC_FOLDER if name == "static" else first.folder / name, encoder, trees), note


def _tables(folder: Path, encoder: StaticEncoder, trees: list[list[str]]) -> dict[str, Any]:
    """What the page's own encoder is made of."""
    arrays = {
        name: np.array(a) for name, a in load_safetensors(folder / "encoder.safetensors").items()
    }
    ids = encoder.pieces.tokenizer.get_vocab()
    return {
        "vocabulary": sorted(ids, key=lambda piece: ids[piece]),
        "vectors": _base64(arrays.pop("vectors"), "i1"),
        **{name: _base64(array) for name, array in arrays.items()},
        "rank": encoder.vectors.shape[1],
        "dim": encoder.dim,
        "max_length": encoder.pieces.max_length,
        "max_characters": MAX_CHARACTERS,
        "trees": trees,
    }
