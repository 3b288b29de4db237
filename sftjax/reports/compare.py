"""`sftjax compare A B ...`: which settings differ, and which model is better by more than chance.

A, B: workdirs of finished runs, or files that `sftjax evaluate --out` has written. Models that were measured on the
same rows are compared row by row: the difference of each row, its mean, and an interval of it. That is far sharper than
two means with an error each.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any, NamedTuple

import numpy as np

from sftjax.errors import DataError, NotFoundError
from sftjax.evaluation.metrics import METRICS, lower_is_better
from sftjax.files import finite, read_json, write_atomic
from sftjax.reports import curves, html
from sftjax.reports.html import Part
from sftjax.reports.run import number
from sftjax.terminal import columns, json_text, show
from sftjax.training.trackers import flat

# The chance that any of a pair's metrics is called better where none is. Half of the usual 5%, so that 200 comparisons
# of equals stay below 5% too (benchmarks/compare_null.py).
LEVEL = 0.025
LOWER = ("loss", "perplexity")


class Measured(NamedTuple):
    """One side of a comparison."""

    name: str
    config: Mapping[str, Any]  # flat: {"optim.lr": 1e-4}; {} where it is not known
    values: Mapping[str, float]  # {"<set>/<metric>": value}
    rows: Mapping[str, Mapping[str, Any]]  # {"<set>": {"record": numbers, "<metric>": values}}
    losses: Mapping[str, curves.Points] = {}  # of a run's metrics.jsonl


class Difference(NamedTuple):
    """Of one metric on the same rows: the mean of b - a, its interval, and whether it is chance."""

    metric: str  # "<set>/<metric>"
    n: int
    mean: float
    low: float
    high: float
    p: float
    better: str  # "a", "b" or "" = not distinguishable


def main(argv: Sequence[str]) -> None:
    """Compare runs or evaluations: sftjax compare A B ... [--json] [--html=FILE]."""
    parser = argparse.ArgumentParser(prog="sftjax compare", description=main.__doc__)
    parser.add_argument("sides", nargs="+", metavar="A", help="a workdir, or a file of evaluate")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--html", default="", help="a file for a page of it, with the curves")
    options = parser.parse_args(argv)
    sides = [one for path in options.sides for one in read(Path(path))]
    if len(sides) < 2:
        raise DataError("one model is there to compare; name two or more", kind="setting")
    if options.html:
        write_atomic(options.html, page(sides))
    show(json_text(as_json(sides)) if options.json else text(sides))


def read(path: Path) -> list[Measured]:
    """What a workdir, or a file of evaluate, holds. Raises: NotFoundError, DataError."""
    path = path.expanduser()
    if path.is_dir():
        return [_read_run(path)]
    if not path.is_file():
        raise NotFoundError(f"{path} is no workdir and no file of sftjax evaluate --out")
    found = read_json(path, DataError)
    every = found.get("results", [found]) if isinstance(found, dict) else []
    if not every or not all(isinstance(one, dict) and "metrics" in one for one in every):
        raise DataError("no result of sftjax evaluate --out", where=str(path), kind="bad_file")
    out = []
    for one in every:
        name, rows = Path(str(one.get("data", "data"))).stem, one.get("rows", {})
        values = {f"{name}/{k}": v for k, v in one["metrics"].items()}
        rows = {f"{name} answers" if k == "answers" else name: v for k, v in rows.items()}
        out.append(Measured(f"{one.get('model', path.stem)}", {}, values, rows))
    return out


def _read_run(path) -> Measured:
    if not (path / "result.json").is_file():
        raise NotFoundError(f"{path} has no result.json: no run has come to its end there")
    after = read_json(path / "result.json", DataError)["after"]
    config, rows = (
        read_json(path / name, DataError) if (path / name).is_file() else {} for name in ("config.json", "rows.json")
    )
    answers = {f"answers/{k}": v for k, v in after.items() if isinstance(v, float)}
    lines = path / "metrics.jsonl"
    losses = curves.read_losses(lines) if lines.is_file() else {}
    return Measured(path.name, flat(config), after["losses"] | answers, rows, losses)


# ---- differences ---------------------------------------------------------------------------


def settings(sides: Sequence[Measured]) -> dict[str, list[Any]]:
    """{key: the value of each side}, of the settings in which sides with a config differ."""
    known = [one.config for one in sides if one.config]
    keys = dict.fromkeys(key for config in known for key in config)
    return {
        key: [one.config.get(key) for one in sides]
        for key in keys
        if len({json.dumps(config.get(key), sort_keys=True) for config in known}) > 1
    }


def differences(a: Measured, b: Measured) -> list[Difference]:
    """Of every metric that both have of the same rows of the same files; see `paired`."""
    found = [(name, paired(x, y, **about)) for name, (x, y), about in _common(a, b)[0]]
    out, alive = dict[str, Difference](), True
    # Holm's rule: of several metrics the least likely is held to LEVEL / their number, and so on.
    for rank, (metric, numbers) in enumerate(sorted(found, key=lambda x: x[1][-1])):
        alive = alive and numbers[-1] < LEVEL / (len(found) - rank)
        name, _, last = metric.partition("/")
        less = last in a.rows[name].get("about", {}).get("lower", LOWER) or lower_is_better(last)
        out[metric] = Difference(metric, *numbers, ("b" if (numbers[1] < 0) == less else "a") if alive else "")
    return [out[metric] for metric, _ in found]


def left_out(a: Measured, b: Measured) -> list[str]:
    """What can't be compared row by row, and why, in words."""
    return _common(a, b)[1]


def _common(a, b) -> tuple[list[tuple[str, list[np.ndarray], dict[str, Any]]], list[str]]:
    """([("<set>/<metric>", values of the rows that both have, weights and groups)], `left_out`)."""
    found, lacking = [], []
    for name in dict.fromkeys([*a.rows, *b.rows]):
        if name not in a.rows or name not in b.rows:
            lacking.append(f"{name}: one side has no values of its rows")
            continue
        sides = [a.rows[name], b.rows[name]]
        records, about = ([one.get(key, {}) for one in sides] for key in ("record", "about"))
        if about[0].get("of") != about[1].get("of"):
            lacking.append(f"{name}: measured on other files")
            continue
        at: Any = [np.arange(len(records[0]))] * 2
        if records[0] != records[1]:
            at = np.intersect1d(*records, return_indices=True)[1:]
        if not len(at[0]):
            lacking.append(f"{name}: no row in common")
            continue
        if records[0] != records[1] and any(len({*some}) < len(some) for some in records):
            lacking.append(f"{name}: rows in other pieces")
            continue
        take = lambda value, i: np.asarray(value, np.float64)[at[i]]  # noqa: B023, E731
        how = {"groups": [about[0]["group"][i] for i in at[0]]} if "group" in about[0] else {}
        for metric in [k for k in sides[0] if k in sides[1] and k not in ("record", "about")]:
            values = [take(side[metric], i) for i, side in enumerate(sides)]
            if not np.isfinite(values).all():
                lacking.append(f"{name}/{metric}: not a number in some rows")
                continue
            own = {}
            if metric == "loss" and all("weight" in one for one in about):
                own = {"weights": [take(one["weight"], i) for i, one in enumerate(about)]}
            found.append((f"{name}/{metric}", values, how | own))
    return found, lacking


def paired(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    weights: Sequence[np.ndarray] | None = None,
    groups: Sequence | None = None,
) -> tuple[int, float, float, float, float]:
    """(rows, mean of b - a, the 95% interval's ends, p) of values of the same rows.

    weights: of a's rows and of b's, where the mean is weighted. groups: rows that share one are not independent. p: of
    rows that are right or wrong McNemar's exact test, of differences that are all the same the sign test, else
    Student's paired t-test; the interval is NaN where no spread is known.
    """
    from scipy import stats

    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    n, (v, w) = len(x), weights or [np.ones(len(x))] * 2
    means = float((v * x).sum() / v.sum()), float((w * y).sum() / w.sum())
    mean = means[1] - means[0]
    # What each row adds to the difference of two ratios of sums; of plain means, its own part.
    parts = w * (y - means[1]) / w.sum() - v * (x - means[0]) / v.sum()
    if groups is not None:
        _, which = np.unique([json.dumps(one) for one in groups], return_inverse=True)
        parts = np.bincount(which, parts)
    k = len(parts)
    spread = math.sqrt((parts**2).sum() * k / (k - 1)) if k > 1 else 0.0
    half = float(stats.t.ppf(0.975, k - 1)) * spread if spread > 1e-12 * abs(mean) else math.nan
    low, high = mean - half, mean + half
    plain = weights is None and groups is None
    moved = (y - x)[y != x]
    if not len(moved):
        return n, mean, mean, mean, 1.0
    if plain and (set(np.unique(moved)) <= {-1.0, 1.0} or math.isnan(half)):
        p = stats.binomtest(int((moved > 0).sum()), len(moved)).pvalue
    else:
        p = 1.0 if math.isnan(half) else 2 * stats.t.sf(abs(mean) / spread, k - 1)
    return n, mean, low, high, float(p)


# ---- shown ---------------------------------------------------------------------------------


def parts(sides: Sequence[Measured]) -> list[Part]:
    """The settings that differ, the metrics side by side, and the first against each other."""
    letters = [chr(65 + i) for i in range(len(sides))]
    head = ("", *letters)
    out = [Part("Compared", ("", "model"), [(letter, one.name) for letter, one in zip(letters, sides, strict=True)])]
    if rows := [(k, *map(str, v)) for k, v in settings(sides).items()]:
        out.append(Part("Settings that differ", head, rows))
    metrics = dict.fromkeys(k for one in sides for k in one.values)
    out.append(Part("Measured", head, [(k, *(number(k, one.values.get(k)) for one in sides)) for k in metrics]))
    for letter, other in zip(letters[1:], sides[1:], strict=True):
        if lines := [_line(one, letter) for one in differences(sides[0], other)]:
            out.append(Part(f"{letter} - A, row by row", ("", "difference", "95% interval", "rows", "p", ""), lines))
        else:
            out.append(Part(f"{letter} and A have no rows in common", (), ()))
        if lacking := left_out(sides[0], other):
            out.append(Part(f"{letter} and A, not compared row by row", ("",), [[x] for x in lacking]))
    return out


def text(sides: Sequence[Measured]) -> str:
    """The comparison as aligned lines."""
    found = ((part.title, columns([part.head, *part.rows])) for part in parts(sides))
    return "\n\n".join(f"{title}\n{indent(lines, '  ')}".rstrip() for title, lines in found)


def page(sides: Sequence[Measured]) -> str:
    """The comparison as a page, with the curves of runs laid over each other."""
    named = {f"{chr(65 + i)} {one.name}": one.losses for i, one in enumerate(sides) if one.losses}
    title = "Loss over steps"
    drawn = [curves.picture(curves.overlay_figure(named, title), title)] if named else []
    values: dict[str, Any] = dict(title="Comparison", parts=parts(sides), pictures=drawn)
    return html.render("compare.html.jinja", styles=("report.css",), **values)


def _line(one: Difference, letter: str) -> list[str]:
    metric = one.metric.rpartition("/")[2]
    scale, unit = (100, " points") if metric in METRICS and METRICS[metric].share else (1, "")
    mean, low, high = ("?" if math.isnan(x) else f"{scale * x:+.{1 if unit else 4}f}" for x in one[2:5])
    said = {"": "not distinguishable", "a": "A is better", "b": f"{letter} is better"}[one.better]
    return [one.metric, f"{mean}{unit}", f"{low} to {high}", f"{one.n:,}", f"{one.p:.2g}", said]


def as_json(sides: Sequence[Measured]) -> dict[str, Any]:
    """The same as JSON holds it."""
    first = sides[0]
    return {
        "models": [one.name for one in sides],
        "settings": settings(sides),
        "metrics": [finite(dict(one.values)) for one in sides],
        "differences": [[finite(x._asdict()) for x in differences(first, b)] for b in sides[1:]],
        "left_out": [left_out(first, b) for b in sides[1:]],
    }
