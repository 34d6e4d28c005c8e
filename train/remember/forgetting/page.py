"""The report of a forgetting as a page that can be handed on: one file that needs nothing else.

It names what was forgotten, which neither the new model nor its run do: so it lies elsewhere.
"""

import hashlib
import html
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_hmem.bank.documents import Document
from mlx_hmem.bank.format import MANIFEST
from mlx_hmem.errors import UserError, printable, version
from mlx_hmem.files import write_atomic
from mlx_hmem.folders import lies_in
from mlx_hmem.model.find import BANK_FOLDER

STAGES = {"before": "old bank", "after": "new bank", "anchor": "anchor alone"}
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What was forgotten</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff; }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100%; }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3rem .6rem; text-align: left;
  vertical-align: top; }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums; }}
code {{ font-size: .85em; overflow-wrap: anywhere; }}
</style>
<h1>What was forgotten</h1>
<p>{count} left the model <b>{old}</b> on {when}. The new model is <b>{new}</b>. Written by mlx_hmem
{version}.</p>
{documents}
<h2>What is left of it</h2>
<p>Loss is in nats a token, the smaller the better known; a sentence is known by heart if the model
ends it to the letter when given its first half. The anchor alone is what no memory can take away.
{control}</p>
{figures}
<h2>What was done</h2>
<p>{clusters} of level 1 were trained again from their start, without the documents; all other
blocks are as they were.</p>
{hashes}
<p>Anyone who has the new model, its run and the text can look for himself:</p>
<p><code>mlx_hmem.forget {new} FILE --check</code></p>
<p>The old model and its run still hold the documents until they are deleted.</p>
</html>
"""


def check_page(page: Path, folders: Collection[Path]) -> None:
    """Raises UserError unless it is the name of a page outside of these folders."""
    if page.suffix not in (".html", ".htm"):
        raise UserError("not the name of a page", page, "end it in .html")
    if any(lies_in(page, folder) for folder in folders):
        what = "the page names what was forgotten, and would lie in the new model or its run"
        raise UserError(what, page, "write it elsewhere")


def write_page(
    page: Path,
    documents: Mapping[Document, Sequence[str]],
    result: Mapping[str, Any],
    old: Path,
    new: Path,
) -> None:
    """``documents``: that were forgotten, each with its other names; ``result``: what
    :func:`.proof.proof` found, of the documents in this order."""
    rows = zip(documents.items(), result["forgotten"]["documents"], strict=True)
    clusters = result["retrained_clusters_of_level_1"]
    control = len(result["control"]["documents"])
    text = PAGE.format(
        count=f"{len(documents)} document{'s' * (len(documents) != 1)}",
        old=_escaped(old.resolve().name),
        new=_escaped(new.resolve().name),
        when=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=_escaped(version()),
        documents=_table(
            ("name", "SHA-256 of its text", "tokens", "loss before", "after"),
            ((_named(d, also), f"<code>{d.sha256}</code>", *_figures(d, own))
             for (d, also), own in rows),
            numbers=3,
        ),
        control=f"{control} documents that it has never seen are the control."
        if control
        else "No control was given (<code>--control</code>).",
        figures=_table(("", *STAGES.values()), _losses(result), numbers=3),
        clusters=f"Cluster{'s' * (len(clusters) != 1)} {', '.join(map(str, clusters)) or 'none'}",
        hashes=_table(("SHA-256 of the bank's manifest, in which every block has its checksum",),
            ((f"{name} <code>{_digest(folder)}</code>",)
             for name, folder in (("old", old), ("new", new))),
        ),
    )  # fmt: skip
    write_atomic(page, text)


def _escaped(text: object) -> str:
    return html.escape(printable(text))


def _named(document: Document, also: Sequence[str]) -> str:
    return "<br>".join(map(_escaped, dict.fromkeys((document.name, *also))))


def _figures(document: Document, own: Mapping[str, Any]) -> tuple[str, str, str]:
    losses = (f"{own[stage]['loss']:.3f}" for stage in ("before", "after"))
    return (f"{document.tokens:,}", *losses)  # type: ignore[return-value]


def _losses(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name in ("forgotten", "control"):
        if own := result[name] if result[name]["documents"] else None:
            yield f"{name}: loss", *(f"{own[stage]['loss']:.3f}" for stage in STAGES)
            heart = (f"{own[s]['extracted']} of {own[s]['sentences']}" for s in STAGES)
            yield f"{name}: sentences by heart", *heart


def _table(names: Sequence[str], rows: Iterator[tuple[str, ...]], numbers: int = 0) -> str:
    """``numbers``: so many columns, the last ones, are set to the right."""

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [""] * (len(cells) - numbers) + [' class="number"'] * numbers
        inner = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    lines = [row(names, "th"), *(row(cells, "td") for cells in rows)]
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / BANK_FOLDER / MANIFEST).read_bytes()).hexdigest()
