"""``python -m train.plot RUN``: a picture of a run: its loss curves and how evenly blocks are used.

Left the anchor's loss; in the middle that of the arms that go on from it, which see the same
sequences in the same order; each batch pale, a running mean over it. Right how many sequences each
leaf of the cluster tree got. A stage in training is drawn as far as it is saved; what the run does
not have yet is left out. matplotlib is optional: no other program needs it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.errors import ArgumentParser, UserError, run_program
from mlx_hmem.files import atomic_file

# Okabe and Ito's colours, told apart by colour-blind people too.
COLOURS = {"anchor": "#444444", "dense": "#E69F00", "generic": "#56B4E9", "memories": "#D55E00"}
RAW_POINTS = 4000  # of a longer curve, every n-th batch is drawn


def read_curve(path: Path) -> np.ndarray:
    """(step, loss) of every line, (n, 2); a file that is not a loss curve is a ``UserError``."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        values = np.array([[row["step"], row["loss"]] for row in rows], np.float64)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a loss curve", error, "train the stage again") from None
    return values.reshape(-1, 2)


def smooth(losses: np.ndarray, width: int) -> np.ndarray:
    """Mean over the ``width`` batches around each, fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(losses)])
    at = np.arange(len(losses))
    first, last = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(losses))
    return (sums[last] - sums[first]) / (last - first)


def curves_of(run: Path) -> dict[str, np.ndarray]:
    """The loss curves of the stages that have trained."""
    files = {name: run / name / "loss.jsonl" for name in COLOURS}
    curves = {name: read_curve(path) for name, path in files.items() if path.exists()}
    return {name: curve for name, curve in curves.items() if len(curve)}


def leaf_counts(run: Path) -> np.ndarray | None:
    """Sequences of each leaf that has any, most first."""
    path = run / "sequences" / "paths.npy"
    if not path.exists():
        return None
    counts = np.unique(np.load(path, mmap_mode="r")[:, -1], return_counts=True)[1]
    return np.sort(counts)[::-1]


def _draw_losses(axes: Any, curves: dict[str, np.ndarray], title: str) -> None:
    window = max(1, max(map(len, curves.values())) // 30)
    for name, curve in curves.items():
        every = -(-len(curve) // RAW_POINTS)
        steps, losses = curve[:, 0] + 1, curve[:, 1]
        mean, colour = smooth(losses, window), COLOURS[name]
        pale = 0.25 / len(curves)  # the curves of several arms lie on each other
        axes.plot(
            steps[::every], losses[::every], color=colour, alpha=pale, linewidth=0.6, zorder=1
        )
        label = f"{name}: {mean[-1]:.2f} at step {steps[-1]:,.0f}"
        axes.plot(steps, mean, color=colour, linewidth=2, label=label, zorder=2)
    axes.set(title=title, xlabel="step", ylabel="training loss (nats per token)")
    axes.set_xlim(1, max(curve[-1, 0] + 1 for curve in curves.values()))
    what = f"pale: each batch, line: mean of {window}"
    axes.legend(frameon=False, title=what, loc="upper right")


def _draw_anchor(axes: Any, curve: np.ndarray) -> None:
    _draw_losses(axes, {"anchor": curve}, "The anchor learns")
    axes.set_yscale("log")  # a fall of several nats, then of hundredths
    low, high = curve[:, 1].min(), curve[:, 1].max()
    ticks = [
        t for t in (0.1, 0.2, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12) if low * 0.95 <= t <= high
    ]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.set_yticks([], minor=True)


def _draw_arms(axes: Any, curves: dict[str, np.ndarray]) -> None:
    _draw_losses(axes, curves, "The arms go on from the anchor")
    losses = np.concatenate([curve[:, 1] for curve in curves.values()])
    low, high = np.percentile(losses, [5, 95])  # the lines set the scale, not single batches
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend


def _draw_leaves(axes: Any, counts: np.ndarray) -> None:
    axes.bar(np.arange(len(counts)) + 1, counts, width=1.0, color="#0072B2", linewidth=0)
    mean = counts.mean()
    axes.axhline(mean, color="black", linewidth=1, linestyle="--", label=f"mean, {mean:,.0f}")
    span = f"{counts[-1]:,} to {counts[0]:,}"
    axes.set(
        title=f"Sequences of a leaf: {span}",
        xlabel=f"the {len(counts):,} leaves in use, most used first",
        ylabel="sequences",
    )
    axes.set_xlim(0.5, len(counts) + 0.5)
    if counts[0] > 30 * counts[-1]:
        axes.set_yscale("log")
    axes.legend(frameon=False)


def plot_run(run: Path, target: Path) -> None:
    """Draws ``run`` into the PNG file ``target``."""
    curves, counts = curves_of(run), leaf_counts(run)
    if not curves and counts is None:
        raise UserError("nothing to draw", run, "give the folder of a run that has begun to train")
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "a picture needs the package matplotlib",
            "it is not installed",
            "pip install 'mlx-hmem[plot]'",
        ) from None
    matplotlib.use("Agg")  # to a file, without a display
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    arms = {name: curve for name, curve in curves.items() if name != "anchor"}
    panels: list[Callable[[Any], None]] = []
    if "anchor" in curves:
        panels.append(lambda axes: _draw_anchor(axes, curves["anchor"]))
    if arms:
        panels.append(lambda axes: _draw_arms(axes, arms))
    if counts is not None:
        panels.append(lambda axes: _draw_leaves(axes, counts))
    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with pyplot.rc_context(style):
        figure, grid = pyplot.subplots(
            1,
            len(panels),
            figsize=(5 * len(panels), 4),
            layout=ConstrainedLayoutEngine(w_pad=0.12),
            squeeze=False,
        )
        for axes, draw in zip(grid[0], panels, strict=True):
            draw(axes)
        with atomic_file(target) as file:
            figure.savefig(file, format="png", dpi=150)
        pyplot.close(figure)


def main() -> None:
    parser = ArgumentParser(
        prog="python -m train.plot",
        description="Draws the loss curves of a run and how evenly its blocks are used.",
    )
    parser.add_argument("run", type=Path, help="folder of the run, --out of python -m train")
    parser.add_argument("--out", type=Path, help="the PNG file (default: RUN/plot.png)")
    args = parser.parse_args()
    target = args.out or args.run / "plot.png"
    if target.suffix.lower() != ".png":
        raise UserError("--out is not a PNG file", target, "let its name end in .png")
    plot_run(args.run, target)
    print(f"plot: {target}")


if __name__ == "__main__":
    run_program(main)
