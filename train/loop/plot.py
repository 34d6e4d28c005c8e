"""``mlx_hmem.train plot RUN``: a picture of a run: losses, validation, and how blocks are used.

First the anchor's loss, then that of the arms that go on from it, which see the same sequences in
the same order; each batch pale, a running mean over it. Then the perplexity on held-out windows, if
the run was validated, and how many steps each block of a level has had; before there are blocks,
how many sequences each leaf of the cluster tree got. A stage in training is drawn as far as it is
saved; what the run does not have yet is left out. matplotlib is optional: no other program needs
it.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_hmem.config import MemoryConfig
from mlx_hmem.errors import ArgumentParser, UserError, needed
from mlx_hmem.files import atomic_file

from ..data.arrays import load_mapped
from ..store.blocks import BlockStore
from ..store.records import RecordStore
from .log import read_log

# Okabe and Ito's colours, told apart by colour-blind people too.
COLOURS = {"anchor": "#444444", "dense": "#E69F00", "generic": "#56B4E9", "memories": "#D55E00"}
# What a validation of a stage shows, and whose colour its line has.
VALIDATED = {
    ("anchor", "none"): ("anchor", "anchor"),
    ("dense", "none"): ("dense", "dense"),
    ("generic", "none"): ("no memory", "anchor"),
    ("generic", "generic"): ("generic memory", "generic"),
    ("memories", "none"): ("no memory", "anchor"),
    ("memories", "generic"): ("generic memory", "generic"),
    ("memories", "fetched"): ("fetched memory", "memories"),
}
LEVELS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
COLUMNS = 3
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


def validations_of(run: Path) -> dict[tuple[str, str], np.ndarray]:
    """(step, perplexity) of every validation, (n, 2), by stage and memory. Where another arm shows
    the same, it is left out: a frozen anchor without memory stays what it is."""
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for stage in COLOURS:
        path = run / stage / "log.jsonl"
        for record in read_log(path) if path.exists() else ():
            for memory, value in record.get("validation", {}).items():
                if value is not None and (stage, memory) in VALIDATED:
                    found.setdefault((stage, memory), []).append((record["step"], value))
    if ("memories", "none") in found:
        found.pop(("generic", "none"), None)
    return {key: np.array(points, np.float64) for key, points in found.items()}


def block_steps(run: Path) -> dict[int, np.ndarray]:
    """Steps of each block by level, most first; nothing if no blocks are saved."""
    folder = run / "memories" / "store"
    if not (folder / "data.mdb").exists():
        return {}
    with RecordStore(folder, readonly=True) as records:
        saved = records.value(b"identity")
    if saved is None:
        return {}
    identity = json.loads(saved)
    config = MemoryConfig.from_dict(identity["sizes"], str(folder))
    with BlockStore(folder, config, identity["seed"], readonly=True) as store:
        levels = [level for level, r in enumerate(config.r, 1) if r]
        return {level: np.sort(store.block_steps(level))[::-1] for level in levels}


def leaf_counts(run: Path) -> np.ndarray | None:
    """Sequences of each leaf that has any, most first."""
    path = run / "sequences" / "paths.npy"
    if not path.exists():
        return None
    counts = np.unique(load_mapped(path)[:, -1], return_counts=True)[1]
    return np.sort(counts)[::-1]


def _window(curves: dict[str, np.ndarray]) -> int:
    """Batches that the line is a mean over."""
    return max(1, max(map(len, curves.values())) // 30)


def _draw_losses(axes: Any, curves: dict[str, np.ndarray], title: str) -> None:
    window = _window(curves)
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


def _log_scale(axes: Any, ticks: Sequence[float]) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=ticks))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.12g}")
    axes.yaxis.set_minor_formatter("")


def _draw_anchor(axes: Any, curve: np.ndarray, held_out: np.ndarray | None) -> None:
    _draw_losses(axes, {"anchor": curve}, "The anchor learns")
    if held_out is not None:
        nats, label = np.log(held_out[:, 1]), f"held-out text: {np.log(held_out[-1, 1]):.2f}"
        axes.plot(held_out[:, 0], nats, "o-", color="#CC79A7", markersize=3, label=label, zorder=3)
        axes.legend(frameon=False, title=axes.get_legend().get_title().get_text())
    _log_scale(axes, (1, 1.5, 2, 3, 4, 5, 6, 8))  # a fall of several nats, then of hundredths


def _draw_arms(axes: Any, curves: dict[str, np.ndarray]) -> None:
    _draw_losses(axes, curves, "The arms go on from the anchor")
    losses = np.concatenate([curve[:, 1] for curve in curves.values()])
    low, high = np.percentile(losses, [5, 95])  # single batches do not set the scale
    means = [smooth(curve[:, 1], _window(curves)) for curve in curves.values()]
    low, high = min(low, *map(np.min, means)), max(high, *map(np.max, means))
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend


def _draw_validations(axes: Any, curves: dict[tuple[str, str], np.ndarray]) -> None:
    for (stage, memory), curve in curves.items():
        what, colour = VALIDATED[stage, memory]
        label = f"{what}: {curve[-1, 1]:.2f}"
        axes.plot(*curve.T, "o-", color=COLOURS[colour], markersize=3, label=label)
    axes.set(title="Held-out text", xlabel="step", ylabel="perplexity per token")
    values = np.concatenate([curve[:, 1] for curve in curves.values()])
    low, high = values.min(), values.max()
    axes.set_ylim(low - 0.04 * (high - low), high + 0.4 * (high - low) + 1e-3 * high)
    axes.legend(frameon=False, loc="upper right")


def _draw_blocks(axes: Any, steps: dict[int, np.ndarray]) -> None:
    """Each level from its most to its least used block, so that levels of any size compare."""
    for level, counts in steps.items():
        used, colour = counts[counts > 0], LEVELS[(level - 1) % len(LEVELS)]
        place = (np.arange(len(used)) + 0.5) / len(counts)
        label = f"level {level}: {len(used):,} of {len(counts):,} blocks trained"
        marker = "o" if len(counts) <= 16 else ""
        axes.plot(place, used, marker=marker, markersize=4, color=colour, linewidth=2, label=label)
    axes.set(
        title="Steps of a block",
        xlabel="blocks of a level, most used first",
        ylabel="steps that trained it",
    )
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "all"])
    used = np.concatenate([counts[counts > 0] for counts in steps.values()])
    if len(used) and used.max() > 10 * used.min():
        _log_scale(axes, (1, 2, 5))
    else:
        axes.set_ylim(0)
    axes.legend(frameon=False)


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


def import_pyplot() -> Any:
    """matplotlib's pyplot, drawing to files; UserError where the package is missing."""
    needed("matplotlib", "a picture").use("Agg")  # to a file, without a display
    from matplotlib import pyplot

    return pyplot


def plot_run(run: Path, target: Path) -> None:
    """Draws ``run`` into the PNG file ``target``."""
    curves, validations, steps = curves_of(run), validations_of(run), block_steps(run)
    counts = None if steps else leaf_counts(run)
    held_out = validations.pop(("anchor", "none"), None)
    if not curves and not validations and not steps and counts is None:
        raise UserError("nothing to draw", run, "give the folder of a run that has begun to train")
    arms = {name: curve for name, curve in curves.items() if name != "anchor"}
    panels: list[Callable[[Any], None]] = []
    if "anchor" in curves:
        panels.append(lambda axes: _draw_anchor(axes, curves["anchor"], held_out))
    if arms:
        panels.append(lambda axes: _draw_arms(axes, arms))
    if validations:
        panels.append(lambda axes: _draw_validations(axes, validations))
    if steps:
        panels.append(lambda axes: _draw_blocks(axes, steps))
    if counts is not None:
        panels.append(lambda axes: _draw_leaves(axes, counts))
    rows = -(-len(panels) // COLUMNS)
    columns = -(-len(panels) // rows)
    apart = {"figure.constrained_layout.w_pad": 0.12}
    save(target, panels, (rows, columns), (5 * columns, 4 * rows), apart)


def save(
    target: Path,
    panels: Sequence[Callable[[Any], None]],
    shape: tuple[int, int],
    size: tuple[float, float],
    style: Mapping[str, Any] | None = None,
) -> None:
    """Draws the panels side by side in ``shape`` (rows, columns) and writes a PNG file."""
    pyplot = import_pyplot()
    own = {"axes.spines.top": False, "axes.spines.right": False, "axes.titleweight": "bold"}
    with pyplot.rc_context({**own, **(style or {})}), atomic_file(target) as file:
        figure, grid = pyplot.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
        for axes, draw in zip(grid.flat, panels, strict=False):
            draw(axes)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        figure.savefig(file, format="png", dpi=150)
        pyplot.close(figure)


def main(words: Sequence[str]) -> None:
    parser = ArgumentParser(
        prog="mlx_hmem.train plot",
        description="Draws losses and validation of a run, and how evenly its blocks are used.",
    )
    parser.add_argument("run", type=Path, help="folder of the run, --out of mlx_hmem.train")
    parser.add_argument("--out", type=Path, help="the PNG file (default: RUN/plot.png)")
    args = parser.parse_args(words)
    target = args.out or args.run / "plot.png"
    if target.suffix.lower() != ".png":
        raise UserError("--out is not a PNG file", target, "let its name end in .png")
    plot_run(args.run, target)
    print(f"plot: {target}")
