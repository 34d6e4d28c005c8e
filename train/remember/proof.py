"""What is left of documents that were forgotten: their loss, and their sentences by heart.

Every figure is taken with the old bank, with the new one and with the anchor alone, routed by the
window that the text lies in, as it was learned: the most favourable to whoever looks for it. The
anchor's own figures are what no bank can take away: it may have met the text in its own training.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlx_hmem.evaluate.perplexity import document_losses, windows
from mlx_hmem.evaluate.routing import route_texts
from mlx_hmem.evaluate.scoring import continue_greedily, longest_sequence
from mlx_hmem.model.model import MemoryModel

from ..corpus.own import OwnDocument
from ..corpus.own import sentences as spans_of

FEWEST_TOKENS = 12  # of a sentence to be said by heart
MOST_SENTENCES = 64  # of a document


@dataclass(frozen=True)
class Remains:
    """Of one document and one model: nats a token, and how many of its ``sentences`` the model
    ends to the letter when it is given their first half."""

    loss: float
    sentences: int
    extracted: int


class Halves(NamedTuple):
    """Of a sentence, in tokens; ``window``: the text of the window in which it begins."""

    first: list[int]
    second: list[int]
    window: str


def halves(model: MemoryModel, document: OwnDocument) -> list[Halves]:
    """Those of each sentence; the first begins as a text does."""
    parts = [text for _, text in windows(model, document.text, longest_sequence(model))]
    ends, found = np.cumsum([len(part) for part in parts]), list[Halves]()
    for start, end in spans_of(document.text)[:MOST_SENTENCES]:
        ids = model.tokenizer.encode(document.text[start:end].strip())
        if len(ids) >= FEWEST_TOKENS:
            own = min(int(np.searchsorted(ends, start, side="right")), len(parts) - 1)
            found.append(Halves(ids[: len(ids) // 2], ids[len(ids) // 2 :], parts[own]))
    return found


def remains(model: MemoryModel, documents: Sequence[OwnDocument], memory: str) -> list[Remains]:
    """Of each document what the model knows with this memory."""
    losses = document_losses(model, [d.text for d in documents], memory, progress=False)
    parts = [halves(model, d) for d in documents]
    owners = [i for i, own in enumerate(parts) for _ in own]
    pairs = [pair for own in parts for pair in own]
    paths = route_texts(model, [pair.window for pair in pairs], memory) if pairs else None
    extracted = np.zeros(len(documents), np.int64)
    longest = max((len(pair.second) for pair in pairs), default=0)
    prompts = [pair.first for pair in pairs]
    for batch in continue_greedily(model, prompts, longest, memory, paths) if pairs else ():
        for i, tokens in batch:
            second = pairs[i].second
            extracted[owners[i]] += tokens[: len(second)] == second
    each = zip(losses.nats / losses.tokens, parts, extracted, strict=True)
    return [Remains(float(loss), len(own), int(n)) for loss, own, n in each]


def look(model: MemoryModel, documents: Sequence[OwnDocument], count: int = 3) -> list[str]:
    """For some sentences, spread over the documents, their first half and what the model says."""
    every = [(d, pair) for d in documents for pair in halves(model, d)]
    if not every:
        return ["no sentence is long enough to look at"]
    chosen = [every[i * len(every) // count] for i in range(min(count, len(every)))]
    paths = route_texts(model, [pair.window for _, pair in chosen], "fetched")
    prompts, longest = [pair.first for _, pair in chosen], max(len(p.second) for _, p in chosen)
    lines = dict[int, list[str]]()
    decode = partial(model.tokenizer.decode, skip_special_tokens=True)
    for batch in continue_greedily(model, prompts, longest, "fetched", paths):
        for i, tokens in batch:
            document, (first, second, _) = chosen[i]
            said = decode(tokens[: len(second)])
            lines[i] = [f"{document.name}: {decode(first).strip()} …", f"  says {said.strip()}"]
            if tokens[: len(second)] != second:
                lines[i].append(f"  text {decode(second).strip()}")
    return [line for i in sorted(lines) for line in lines[i]]


def proof(
    old: MemoryModel,
    new: MemoryModel,
    forgotten: Sequence[OwnDocument],
    control: Sequence[OwnDocument],
) -> dict[str, Any]:
    """The figures as JSON values. ``control``: documents that none of the banks has ever seen."""
    result: dict[str, Any] = {}
    for name, documents in (("forgotten", forgotten), ("control", control)):
        found = {
            "before": remains(old, documents, "fetched") if documents else [],
            "after": remains(new, documents, "fetched") if documents else [],
            "anchor": remains(new, documents, "none") if documents else [],
        }
        result[name] = {
            "documents": [
                {key: asdict(rows[i]) for key, rows in found.items()}
                for i in range(len(documents))  # neither name nor hash: that would confirm a guess
            ],
            **{key: _mean(rows) for key, rows in found.items()},
            "before_less_anchor": _difference(found["before"], found["anchor"]),
            "after_less_anchor": _difference(found["after"], found["anchor"]),
        }
    return result


def _mean(rows: Sequence[Remains]) -> dict[str, Any]:
    return {
        "loss": float(np.mean([r.loss for r in rows])) if rows else None,
        "sentences": sum(r.sentences for r in rows),
        "extracted": sum(r.extracted for r in rows),
    }


def _difference(rows: Sequence[Remains], anchor: Sequence[Remains]) -> dict[str, float | None]:
    """Mean loss with the memory less that of the anchor, with its standard error."""
    values = np.array([a.loss - b.loss for a, b in zip(rows, anchor, strict=True)])
    if not len(values):
        return {"mean": None, "error": None}
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"mean": float(values.mean()), "error": error}


def report_lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = [f"{'':24}{'old bank':>12}{'new bank':>12}{'anchor':>12}"]
    for name in ("forgotten", "control"):
        own = result[name]
        if not own["documents"]:
            lines.append("control                 none: --control FOLDER of documents never seen")
            continue
        stages = [own[key] for key in ("before", "after", "anchor")]
        label = f"{name}, {len(own['documents'])} documents"
        lines.append(label)
        lines.append("  loss, nats a token    " + "".join(f"{s['loss']:12.3f}" for s in stages))
        less = (_said(own[f"{key}_less_anchor"]) for key in ("before", "after"))
        lines.append("  less the anchor's     " + "".join(less))
        said = "".join(f"{s['extracted']:5} of {s['sentences']:3}" for s in stages)
        lines.append("  sentences by heart    " + said)
    return lines


def _said(value: dict[str, float | None]) -> str:
    error = "" if value["error"] is None else f"±{value['error']:.2f}"
    return f"{value['mean']:+.2f}{error}".rjust(12)
