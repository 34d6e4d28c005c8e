"""What a quantisation saved and what it cost, for people and as JSON."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_hmem.evaluate import Perplexity
from mlx_hmem.evaluate.tables import table

from .anchor import AnchorChange
from .bank import LevelChange, level_title
from .search import Measured, Search


@dataclass(frozen=True)
class Report:
    """What a quantisation did. ``perplexity`` has (before, after) for each kind of memory."""

    model: Path
    anchor: AnchorChange
    dtype: str | None
    levels: tuple[LevelChange, ...]
    perplexity: tuple[tuple[Perplexity, Perplexity], ...]
    search: Search | None = None  # of the forms of the levels

    def to_dict(self) -> dict[str, Any]:
        scores = [
            {
                "memory": before.memory,
                "before": _finite(before.to_dict()),
                "after": _finite(after.to_dict()),
                "change_per_token": after.per_token - before.per_token,
            }
            for before, after in self.perplexity
        ]
        levels = [_finite(asdict(level)) for level in self.levels]
        bank = {"dtype": self.dtype, "levels": levels} if levels else None
        return {
            "model": str(self.model),
            "anchor": asdict(self.anchor),
            "bank": bank,
            "perplexity": scores,
            "search": self.search and _search(self.search),
        }


def _search(search: Search) -> dict[str, Any]:
    curve = [_finite(asdict(each)) for each in search.curve]
    return {**asdict(search), "curve": curve}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: None in its place, as the standard error of a single document."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in values.items()
    }


def report_table(report: Report) -> str:
    """Sizes and errors, then perplexities, for people."""
    anchor = report.anchor
    rows = [["", "stored as", "before", "after", "error", "worst block"]]
    sizes = _size(anchor.bytes_before), _size(anchor.bytes_after)
    rows.append(["anchor", _stored_as(anchor.quantization), *sizes, "", ""])
    for level in report.levels:
        how = None if level.quantization is None else level.quantization.options
        blocks = "" if level.level == 0 else f", {level.blocks:,} blocks"
        sizes = _size(level.bytes_before), _size(level.bytes_after)
        errors = [f"{e:.2%}" if e else "–" for e in (level.error, level.worst_error)]
        rows.append([level_title(level.level) + blocks, _stored_as(how), *sizes, *errors])
    before = anchor.bytes_before + sum(level.bytes_before for level in report.levels)
    after = anchor.bytes_after + sum(level.bytes_after for level in report.levels)
    rows.append(["all", "", _size(before), _size(after), "", ""])
    parts = [*(_curves(report.search) if report.search else ()), table(rows)]
    if anchor.left:
        parts.append(
            f"{len(anchor.left)} matrices of the anchor are left as they were: their rows are no "
            f"multiple of the group size (the first: {anchor.left[0]})"
        )
    if report.perplexity:
        parts.append(_perplexity_table(report.perplexity))
    return "\n\n".join([*parts, f"wrote {report.model}"])


def _curves(search: Search) -> Iterator[str]:
    """For each kind of memory a line for each candidate, the most bytes first."""
    text = f"nats per token of {search.documents} documents, {search.tokens:,} tokens"
    for memory in dict.fromkeys(each.memory for each in search.curve):
        curve = [each for each in search.curve if each.memory == memory]
        levels = sorted({form.level for each in curve for form in each.forms})
        head = [*map(level_title, levels), "bytes", "loss", "rise", "±", "of the loss", ""]
        rows = [_candidate(each, levels, curve[0].loss) for each in curve]
        most = f"rise of at most {search.max_loss:.3%}"
        yield f"{memory} memory, {text}, {most}\n{table([head, *rows])}"


def _candidate(each: Measured, levels: Sequence[int], before: float) -> list[str]:
    own = {form.level: form.options for form in each.forms}
    numbers = f"{each.loss:.5f}", f"{each.rise:+.5f}", f"{each.rise_error:.5f}"
    return [
        *(_stored_as(own.get(level)) for level in levels),
        f"{each.bytes:,}",
        *("–" if "nan" in number else number for number in numbers),
        "lost" if math.isnan(each.rise) else f"{each.rise / before:+.3%}",
        "kept" if each.kept else "",
    ]


def _perplexity_table(scores: Sequence[tuple[Perplexity, Perplexity]]) -> str:
    first = scores[0][0]
    head = f"perplexity, {first.documents} documents, {first.tokens:,} tokens"
    rows = [[head, "before", "after", "change"]]
    for before, after in scores:
        change = after.per_token - before.per_token
        cells = f"{before.per_token:.3f}", f"{after.per_token:.3f}", f"{change:+.3f}"
        rows.append([before.memory, *cells])
    return table(rows)


def _stored_as(how: dict[str, Any] | None) -> str:
    return "as it was" if how is None else f"{how['mode']} {how['bits']}, {how['group_size']}"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
