"""The loss curve of a run, and how every figure of ours looks and is saved.

matplotlib draws, by its objects alone: without pyplot there is no window and no global figure.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

# The first import builds a cache of fonts and says so, which is no news at the end of a run.
if (_logger := logging.getLogger("matplotlib")).level == logging.NOTSET:
    _logger.setLevel(logging.ERROR)

import matplotlib.style
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sftjax.training import metrics

Points = Sequence[tuple[int, float]]  # (step, loss), in order

# Colours that stay apart for colour-blind readers (Okabe and Ito); the first is the train loss.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dv"
LONG = 100  # points from which a train loss is drawn under its running mean

STYLE = {
    "axes.formatter.useoffset": False,
    "axes.grid": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.xmargin": 0.02,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4.5,
    "svg.fonttype": "none",  # text stays text: to be searched, copied and read aloud
    "svg.hashsalt": "sftjax",  # ids that do not change from one drawing to the next
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Our own look, whatever the user's matplotlibrc says; to be drawn and saved in."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # The reader's fonts count, not those that the text is measured with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, path: str | Path, title: str) -> None:
    """Write a figure as an SVG file, the same bytes for the same figure.

    title: what the file is called where a browser or a screen reader says its name.
    """
    with style():
        figure.savefig(path, format="svg", metadata={"Title": title, "Date": None, "Creator": None})


def curve_svg(metrics_jsonl_path: str | Path, out_path: str | Path, title: str = "Loss") -> None:
    """Draw "loss" and every "<set>/loss" of a metrics.jsonl over steps, as one SVG file."""
    save(loss_figure(read_losses(metrics_jsonl_path), title), out_path, title)


def read_losses(metrics_jsonl_path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The points of "loss" and of every "<set>/loss"; what was not finite has none."""
    series: dict[str, list[tuple[int, float]]] = {}
    for _, line in metrics.read_lines(metrics_jsonl_path):
        for name, value in line.items():
            if (name == "loss" or name.endswith("/loss")) and value is not None:
                series.setdefault(name, []).append((line["step"], value))
    return series


@style()
def loss_figure(series: Mapping[str, Points], title: str) -> Figure:
    """A figure of {"loss" or "<set>/loss": points}; the legend has the last value of each."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    lines, labels = [], []
    for i, name in enumerate(sorted(series, key=lambda name: (name != "loss", name))):
        colour, points = COLOURS[i % len(COLOURS)], series[name]
        called = "train" if name == "loss" else name.removesuffix("/loss")
        labels.append(f"{called} {points[-1][1]:.4g}")
        draw = _train if name == "loss" else _validation
        steps, losses = np.transpose(points)
        lines.append(draw(axes, steps, losses, colour, MARKERS[i % len(MARKERS)]))
    if lines:
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(lines), 4))
    else:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center")
    return figure


def _train(axes: Axes, steps, losses, colour, marker):
    """The line that the legend shows: the losses, or their running mean above them."""
    if len(steps) < LONG:
        return axes.plot(steps, losses, color=colour, marker=marker if len(steps) == 1 else "")[0]
    axes.plot(steps, losses, color=colour, alpha=0.3, linewidth=1)
    return axes.plot(steps, running_mean(losses, len(losses) // 50), color=colour)[0]


def _validation(axes: Axes, steps, losses, colour, marker):
    return axes.plot(steps, losses, color=colour, marker=marker)[0]


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value with those up to `reach` places before and after it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)
