"""The loss curve of a run, and how every figure of ours looks and is saved.

matplotlib draws, by its objects alone: without pyplot there is no window and no global figure.
"""

import base64
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

# The first import builds a cache of fonts and says so, which is no news at the end of a run.
if (_logger := logging.getLogger("matplotlib")).level == logging.NOTSET:
    _logger.setLevel(logging.ERROR)

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sftjax.training import metrics

Points = Sequence[tuple[int, float]]  # (step, loss), in order

# Colours that stay apart for colour-blind readers (Okabe and Ito); the first is the train loss.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "os^Dv"
LONG = 100  # points from which a train loss is drawn under its running mean

STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Our own look, whatever the user's matplotlibrc says; to be drawn and saved in."""
    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        # The reader's fonts count, not those that the text is measured with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def save(figure: Figure, path: str | Path | io.BytesIO, title: str) -> None:
    """Write a figure as SVG, the same bytes each time. title: its name in a browser."""
    with style():
        figure.savefig(path, format="svg", metadata={"Title": title, "Date": None, "Creator": None})


def read_losses(metrics_jsonl_path: str | Path) -> dict[str, list[tuple[int, float]]]:
    """The points of "loss" and of every "<set>/loss"; what was not finite has none."""
    series: dict[str, list[tuple[int, float]]] = {}
    for _, line in metrics.read_lines(metrics_jsonl_path):
        for name, value in line.items():
            if (name == "loss" or name.endswith("/loss")) and value is not None:
                series.setdefault(name, []).append((line["step"], value))
    return series


def picture(figure: Figure, title: str) -> dict[str, str]:
    """{"source": a data: URL, "title"} of a figure, for a page that holds it."""
    file = io.BytesIO()
    save(figure, file, title)
    data = base64.b64encode(file.getvalue()).decode()
    return {"source": f"data:image/svg+xml;base64,{data}", "title": title}


def loss_figure(series: Mapping[str, Points], title: str) -> Figure:
    """A figure of {"loss" or "<set>/loss": points}; the legend has the last value of each."""
    return overlay_figure({"": series}, title)


@style()
def overlay_figure(runs: Mapping[str, Mapping[str, Points]], title: str) -> Figure:
    """The losses of several runs over each other: a colour a run, dashes for validation; of one run a colour a set."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="step", ylabel="loss")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    lines, labels, several = [], [], len(runs) > 1
    for i, (run, series) in enumerate(runs.items()):
        for n, name in enumerate(sorted(series, key=lambda name: (name != "loss", name))):
            lines.append(_draw(axes, name, series[name], i if several else n, n))
            lines[-1].set_linestyle("--" if several and name != "loss" else "-")
            called = "train" if name == "loss" else name.removesuffix("/loss")
            labels.append(f"{run} {called} {series[name][-1][1]:.4g}".strip())
    if lines:
        figure.legend(lines, labels, loc="outside lower center", ncols=min(len(lines), 4))
    else:
        axes.text(0.5, 0.5, "no loss was logged", transform=axes.transAxes, ha="center")
    return figure


@style()
def reliability_figure(bins: Sequence[Mapping[str, float]], title: str) -> Figure:
    """How often answers of a confidence are right; bins: the table "calibration" of labels."""
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel="mean confidence", ylabel="share right")
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    x, y, share = ([one[k] for one in bins] for k in ("confidence", "accuracy", "share"))
    axes.plot(x, y, color=COLOURS[0])
    axes.scatter(x, y, s=[20 + 400 * part for part in share], color=COLOURS[0])
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02), aspect="equal")
    return figure


def _draw(axes: Axes, name, points, colour: int, marker: int):
    """The line that the legend shows: losses; of many train losses their running mean above."""
    steps, losses = np.transpose(points)
    how: dict[str, Any] = dict(color=COLOURS[colour % len(COLOURS)], marker="")
    if name == "loss" and len(steps) >= LONG:
        axes.plot(steps, losses, alpha=0.3, linewidth=1, **how)
        losses = running_mean(losses, len(losses) // 50)
    elif name != "loss" or len(steps) == 1:
        how["marker"] = MARKERS[marker % len(MARKERS)]
    return axes.plot(steps, losses, **how)[0]


def running_mean(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of each value with those up to `reach` places before and after it."""
    return np.array([values[max(i - reach, 0) : i + reach + 1].mean() for i in range(len(values))])
