"""Pictures of the benchmarks: horizontal bars, one panel for each thing measured.

matplotlib is optional: only ``--plot`` needs it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_hmem.errors import UserError
from train.loop.plot import import_pyplot


class Panel(NamedTuple):
    """Bars from top to bottom. ``line``: a value to compare them with, drawn across all."""

    title: str
    unit: str
    bars: Sequence[tuple[str, float]]
    line: float | None = None


def draw(target: Path, panels: Sequence[Panel], caption: str) -> None:
    """Draws the panels one below the other into the PNG file ``target``.

    Raises UserError where matplotlib is missing or the file cannot be written.
    """
    pyplot = import_pyplot()

    heights = [len(panel.bars) + 1.5 for panel in panels]
    figure, axes = pyplot.subplots(
        len(panels),
        figsize=(8, 0.28 * sum(heights) + 0.4),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for panel, ax in zip(panels, axes[:, 0], strict=True):
        labels, values = zip(*panel.bars, strict=True)
        bars = ax.barh(range(len(values)), values, color="#3b6fb6", height=0.7)
        ax.bar_label(
            bars,
            fmt=lambda value: f"{value:.0f}" if value >= 100 else f"{value:.3g}",
            padding=3,
            fontsize=8,
        )
        ax.set_yticks(range(len(values)), labels, fontsize=8)
        ax.invert_yaxis()
        ax.set_title(f"{panel.title}, {panel.unit}", loc="left", fontsize=9)
        ax.set_xlim(0, 1.12 * max(*values, panel.line or 0))
        ax.tick_params(axis="x", labelsize=7)
        ax.spines[["top", "right"]].set_visible(False)
        if panel.line is not None:
            ax.axvline(panel.line, color="#c0504d", linewidth=1, linestyle="--")
    figure.supxlabel(caption, fontsize=7)
    try:
        figure.savefig(target, dpi=150, format="png")
    except OSError as error:
        raise UserError("the picture cannot be written", error, "choose another path") from None
    finally:
        pyplot.close(figure)
