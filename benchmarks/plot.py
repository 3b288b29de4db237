"""One picture of the results in benchmarks/results/: what each script measured, as ratios.

    python benchmarks/plot.py [--results=benchmarks/results] [--out=benchmarks/results/results.svg]

A panel for each file whose form it knows (the table READERS below): bars of the ratio that the
script prints, with its range over the rounds, and a line at 1. A file of another form is named and
left out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sftjax.reports import curves

BAR, HEAD = 0.24, 0.5  # inches: the height of a bar with its space, and of a title


# ---- readers: a result file's JSON -> (title, {label: (low, middle, high)}) ------------------


def read_loss(facts):
    rows = facts["time"]["shares"] if facts["time"] else []
    bars = {f"{r['trained']:.0%} trained, speed": r["speed_vs_chunked"] for r in rows}
    for r in facts["memory"]:
        ratio = r["temp_bytes"]["plain"] / r["temp_bytes"]["sftjax"]
        bars[f"{r['vocab']:,} vocabulary, {r['dtype']}, memory"] = [ratio] * 3
    return "Loss: against all positions chunked (speed), plain (memory)", bars


def read_train_step(facts):
    """Of --variants, or beside other libraries."""
    found = facts["results"]
    if "steps" not in found:
        bars = {name: row["speed_vs_default"] for name, row in found.items()}
        return "Train step: speed against the default", bars
    rows = found["steps"] | {f"lengths: {k}": v for k, v in (found.get("lengths") or {}).items()}
    return "Train step: sftjax faster by", {k: v["ratio"] for k, v in rows.items() if "ratio" in v}


def read_attention(facts):
    bars = {
        f"{shape}, {name}": row["speed_vs_xla"]
        for shape, rows in facts["results"].items()
        for name, row in rows.items()
        if not name.endswith("xla")
    }
    return "Attention: speed against the whole score matrix", bars


def read_startup(facts):
    rows = facts["results"]
    rows = rows["depth"] if isinstance(rows, dict) else rows
    bars = {f"{r['model']}, {r['layers']} layers": [r["ratio"]] * 3 for r in rows}
    return "Compile time against the shallowest", bars


def read_gpu(facts):
    bars = {
        f"{case}, {row['variant']}": row["sftjax_speed"]
        for case, result in facts["results"].items()
        for row in result["variants"]
        if row.get("sftjax_speed") and row["variant"] != "sftjax"
    }
    return "GPU: sftjax faster by", bars


READERS = {"loss": read_loss, "train_step": read_train_step, "attention": read_attention,
           "startup": read_startup, "gpu": read_gpu}  # fmt: skip


# ---- drawing -------------------------------------------------------------------------------


@curves.style()
def overview(results: dict) -> Figure:
    """A figure of {name of the result file: (title, bars)}: one panel under the other."""
    heights = [HEAD + BAR * len(bars) for _, bars in results.values()]
    width, height = 8.6, sum(heights) + BAR
    figure = Figure(figsize=(width, height))
    top = height
    for i, ((title, bars), high) in enumerate(zip(results.values(), heights, strict=True)):
        bottom = top - high
        place = (0.38, bottom / height, 0.54, BAR * len(bars) / height)
        figure.text(0.02, (top - HEAD / 2) / height, title, weight="bold", va="center")
        panel(figure.add_axes(place), bars, curves.COLOURS[i % len(curves.COLOURS)])
        top = bottom
    return figure


def panel(axes: Axes, bars: dict, colour: str) -> None:
    """Bars from a common zero with the ratio, its range over the rounds, and a line at 1."""
    low, middle, high = np.transpose(list(bars.values()))
    places = np.arange(len(bars))
    axes.barh(places, middle, height=0.65, color=colour)
    axes.hlines(places, low, high, color="black")
    axes.axvline(1, color="#333333", linestyle="--", linewidth=1)
    for place, value, end in zip(places, middle, high, strict=True):
        axes.annotate(f"{value:.2f}", (end, place), (5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, max(1.0, *high))
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_yticks(places, bars)
    axes.tick_params(length=0)
    axes.xaxis.set_visible(False)  # the ratio stands beside each bar
    axes.grid(False)
    axes.spines[:].set_visible(False)


@curves.style()
def loglog(series: dict, title: str, x_label: str, y_label: str) -> Figure:
    """A figure of {name: [(x, y)]}, both axes logarithmic; one point is a dot, more are a line."""
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x_label, ylabel=y_label)
    for i, (name, points) in enumerate(series.items()):
        colour = curves.COLOURS[i % len(curves.COLOURS)]
        axes.loglog(*np.transpose(points), color=colour, marker="o" if len(points) == 1 else "")
        axes.annotate(name, points[-1], (7, 0), textcoords="offset points", va="center", color=colour)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    here = Path(__file__).resolve().parent / "results"
    parser.add_argument("--results", type=Path, default=here)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    found = {}
    for file in sorted(args.results.glob("*.json")):
        reader = next((r for name, r in READERS.items() if file.stem.startswith(name)), None)
        if reader is None or file.stem.startswith("loss_curve"):
            print(f"{file.name}: of another form, left out")
            continue
        title, bars = reader(json.loads(file.read_text()))
        if bars:
            found[file.name] = (f"{title} ({file.name})", bars)
    if not found:
        parser.error(f"no result that can be drawn in {args.results}")
    out = args.out or args.results / "results.svg"
    curves.save(overview(found), out, "Results of the benchmarks")
    print(f"{out}: {', '.join(found)}")


if __name__ == "__main__":
    main()
