"""The pictures of a study: recall by times stated, perplexity, and each sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..loop.plot import save
from .file import Study, Sweep
from .rows import Figure, Row, leading, sweep_rows

# Okabe and Ito's colours, told apart by colour-blind people too.
COLOURS = ["#444444", "#E69F00", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#0072B2", "#999999"]
AXIS = {
    "fetched_parameters": "parameters of one fetched memory",
    "bank_parameters": "parameters of the bank",
}


def plot_study(study: Study, out: Path, rows: Sequence[Row]) -> None:
    """Writes recall.png, perplexity.png and sweep-NAME.png, of what there are figures for."""
    # The arms that are run with all seeds of the study.
    main = [row for row in leading(study, rows).values() if study.arms[row.arm].seeds is None]
    if any(row.recall for row in main):
        _save(out / "recall.png", [lambda axes: _draw_recall(axes, main)], width=9)
    if any(row.perplexity for row in main):
        _save(out / "perplexity.png", [lambda axes: _draw_perplexity(axes, main)])
    for sweep in study.sweeps:
        _plot_sweep(out, sweep, sweep_rows(study, out, sweep))


def _save(target: Path, panels: Sequence[Any], width: float = 6.5) -> None:
    save(target, panels, (1, len(panels)), (width * len(panels), 4.2))


def _draw_line(
    axes: Any, places: Sequence[float], figures: Sequence[Figure | None], fmt: str, **look: Any
) -> None:
    means, errors = ([getattr(figure, name) for figure in figures] for name in ("mean", "error"))
    axes.errorbar(places, means, errors, fmt=fmt, ms=4, capsize=3, **look)


def _times(row: Row) -> list[int]:
    return [times for times in row.recall if times is not None]


def _draw_recall(axes: Any, rows: Sequence[Row]) -> None:
    for i, row in enumerate(row for row in rows if row.recall):
        times, colour = _times(row), COLOURS[i % len(COLOURS)]
        line = "o-" if i < len(COLOURS) else "s--"  # the colours once more
        figures = [row.recall[t] for t in times]
        _draw_line(axes, times, figures, line, color=colour, label=row.label)
    axes.set_xscale("log", base=2)
    ticks = _times(rows[0])
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set(
        title="Facts recalled",
        ylabel="per cent",
        xlabel="statements of a fact in one pass",
        ylim=(0, 100),
    )
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def _draw_perplexity(axes: Any, rows: Sequence[Row]) -> None:
    shown = [row for row in rows if row.perplexity][::-1]
    for i, row in enumerate(shown):
        assert row.perplexity is not None
        colour = COLOURS[(len(shown) - 1 - i) % len(COLOURS)]
        axes.errorbar(
            row.perplexity.mean, i, xerr=row.perplexity.error, fmt="o", capsize=3, color=colour
        )
    axes.set_yticks(range(len(shown)), [row.label for row in shown])
    axes.set(title="Held-out text", xlabel="perplexity per token")


def _plot_sweep(out: Path, sweep: Sweep, points: Sequence[Row]) -> None:
    if not points:
        return
    panels = []
    if all(row.recall for row in points):
        panels.append(lambda axes: _draw_sweep_recall(axes, sweep, points))
    if all(row.perplexity for row in points):
        panels.append(lambda axes: _draw_sweep_perplexity(axes, sweep, points))
    _save(out / f"sweep-{sweep.name.replace(' ', '-')}.png", panels)


def _axis(axes: Any, sweep: Sweep, points: Sequence[Row]) -> list[float]:
    """Where the points lie: at their number of parameters, or side by side."""
    if sweep.x is None:
        places: list[float] = list(range(len(points)))
        axes.set_xticks(places, [row.label for row in points], rotation=15)
    else:
        places = [row.sizes[sweep.x] for row in points]
        axes.set_xscale("log")
        axes.set_xlabel(AXIS[sweep.x])
        axes.set_xticks(places, [f"{p:,.0f}" for p in places])
        axes.set_xticks([], minor=True)
    return places


def _draw_sweep_recall(axes: Any, sweep: Sweep, points: Sequence[Row]) -> None:
    places, joined = _axis(axes, sweep, points), "-" if sweep.x else ":"
    for i, times in enumerate(_times(points[0])):
        figures = [row.recall[times] for row in points]
        colour = COLOURS[i % len(COLOURS)]
        _draw_line(axes, places, figures, "o" + joined, color=colour, label=f"{times}×")
    axes.set(title=f"{sweep.name}: facts recalled", ylabel="per cent", ylim=(0, 100))
    axes.legend(frameon=False, fontsize="small")


def _draw_sweep_perplexity(axes: Any, sweep: Sweep, points: Sequence[Row]) -> None:
    places, figures = _axis(axes, sweep, points), [row.perplexity for row in points]
    _draw_line(axes, places, figures, "o-" if sweep.x else "o:", color="#0072B2")
    axes.set(title=f"{sweep.name}: held-out text", ylabel="perplexity per token")
