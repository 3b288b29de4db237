"""What came of a run: report.html, one page that fetches nothing, and the model card of its export."""

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Template

from sftjax import config as config_lib
from sftjax.errors import DataError
from sftjax.files import write_atomic
from sftjax.reports import curves, html
from sftjax.reports.run import measured, number, table
from sftjax.tasks import Task
from sftjax.terminal import printable
from sftjax.training import metrics
from sftjax.training.data import Feed

WORST = 20  # rows that are shown of each set
LONG = 400  # characters of a text that are shown
RISE = 0.01  # of a validation loss over its lowest, from which a run is said to overfit
# What the hub calls the tasks of ours; others have no row.
PIPELINES = {"causal_lm": "text-generation", "classification": "text-classification"}


def write_page(workdir: Path, task: Task, feed: Feed, result: Mapping[str, Any]) -> None:
    """Write workdir/report.html of a finished run; result: as train returns it."""
    before, after, config = result["before"], result["after"], feed.config
    series = curves.read_losses(workdir / "metrics.jsonl")
    start = {k: v for k, v in before["losses"].items() if k.endswith("/loss")}
    for name, points in series.items():
        if name in start and points[0][0] > 0:
            points.insert(0, (0, start[name]))
    figure = curves.loss_figure(series, f"Loss of {workdir.name}")
    curves.save(figure, workdir / "curve.svg", "Loss")
    pictures = [curves.picture(figure, "Loss over steps")]
    baselines = [
        (f"{name}/{metric}", what, number(metric, value))
        for name, some in after.get("baselines", {}).items()
        for what, values in some.items()
        for metric, value in values.items()
    ]
    for name, bins in after.get("tables", {}).items():
        if name.endswith("/calibration"):
            title = f"Reliability of {name.removesuffix('/calibration')}"
            pictures.append(curves.picture(curves.reliability_figure(bins, title), title))
    env = json.loads((workdir / "env.json").read_text(encoding="utf-8"))
    text = html.render(
        "report.html.jinja",
        styles=("report.css",),
        title=f"Run {workdir.name}",
        run=config,
        trained_on=config.data.train or ", ".join(str(s["path"]) for s in config.data.sources),
        examples=feed.summary().replace("\n", "; "),
        steps=result["steps"],
        sentences=overfitting(series),
        measured=list(measured(before, after)),
        baselines=baselines,
        pictures=pictures,
        tables=list(_tables(after.get("tables", {}))),
        rows=[*_worst(task, feed, after), *_answers(task, feed, before, after)],
        speed=_speed(workdir / "metrics.jsonl"),
        command=f"sftjax train --config=FILE.py --workdir={workdir}",
        versions=json.dumps(env, indent=1),
        config=json.dumps(config_lib.to_dict(config), indent=1),
    )
    write_atomic(workdir / "report.html", text)


def overfitting(series: Mapping[str, curves.Points]) -> list[str]:
    """A sentence for each set whose loss has risen from its lowest while the training loss fell."""
    said, train = [], dict(series.get("loss", ()))
    for name, points in series.items():
        if name == "loss" or len(points) < 2:
            continue
        at, least = min(points, key=lambda point: point[1])
        step, last = points[-1]
        early = [loss for n, loss in train.items() if n <= at][-3:] or list(train.values())[:3]
        late = list(train.values())[-3:]
        falls = early and statistics.mean(late) < statistics.mean(early)
        if last > least * (1 + RISE) and step > at and falls:
            said.append(
                f"The run overfits: the loss of {name.removesuffix('/loss')} was lowest at step {at} ({least:.4g}) and"
                f" rose to {last:.4g} by step {step}, while the training loss fell to {statistics.mean(late):.4g}."
                f" Train for fewer steps, or keep the best checkpoint with eval.best={name}."
            )
    return said


def _tables(tables: Mapping[str, Any]) -> Iterator[html.Part]:
    """Confusion matrices, the labels one by one, calibration; of others, their JSON."""
    for name, found in tables.items():
        kind = name.rpartition("/")[2]
        if kind == "confusion":
            names = [f"wanted {label}" for label in found["labels"]]
            rows = [(n, *row) for n, row in zip(names, found["rows"], strict=True)]
            head = ("", *(f"given {label}" for label in found["labels"]))
        elif kind == "per_label":
            head = ("label", "precision", "recall", "f1", "rows")
            rows = [(k, *(number(m, v[m]) for m in head[1:4]), v["n"]) for k, v in found.items()]
        elif kind == "calibration":
            head = ("mean confidence", "share right", "share of rows")
            rows = [tuple(f"{one[k]:.1%}" for k in ("confidence", "accuracy", "share")) for one in found]
        else:
            head, rows = (), [(json.dumps(found),)]
        yield html.Part(name, head, rows)


def _worst(task, feed, after) -> Iterator[html.Part]:
    """The rows of each set whose loss is largest."""
    for name, found in after.get("rows", {}).items():
        source = feed.opened.get(name)
        if source is None or "loss" not in found:
            continue
        pairs = sorted(zip(found["loss"], found["record"], strict=True), reverse=True)[:WORST]
        rows = [(source.where(i), f"{loss:.3f}", _text(feed.readers.get(name, task), source, i)) for loss, i in pairs]
        yield html.Part(f"{name}: the rows with the largest loss", ("row", "loss", "text"), rows)


def _text(task, source, i) -> str:
    """A record as the task reads it, with what it notes of it."""
    try:
        [example] = task.examples([source[i]], [source.where(i)])
    except DataError as e:
        return f"not read: {e.problem}"
    note = getattr(example, "note", "")
    return _short(example.text) + f" ({note})" * bool(note)


def _short(text: str) -> str:
    return text if len(text) <= LONG else f"{text[:LONG]} ..."


def _answers(task, feed, before, after) -> Iterator[html.Part]:
    """Questions that are answered, those that are wrong first."""
    if not feed.questions or "answers" not in after:
        return
    scores = after.get("rows", {}).get("answers", {})
    metric = next((name for name in scores if name not in ("record", "about")), "")
    order = sorted(range(len(feed.questions)), key=lambda i: scores[metric][i] if metric else 0)
    rows = []
    for i in order[:WORST]:
        one = feed.questions[i]
        asked = task.tokenizer.decode(one.prompt, skip_special_tokens=True)
        texts = (asked, one.answer, before["answers"][i], after["answers"][i])
        rows.append(tuple(_short(x if isinstance(x, str) else " | ".join(x)) for x in texts))
    title = f"Answers, those of the lowest {metric} first" if metric else "Answers"
    yield html.Part(title, ("question", "wanted", "before", "after"), rows)


def _speed(path) -> list[tuple[str, str]]:
    """Medians over the lines of training."""
    lines = [line for _, line in metrics.read_lines(path) if "step_time" in line]
    names = {
        "step_time": ("seconds a step", "{:.4g}"),
        "tokens_per_s": ("tokens a second", "{:,.0f}"),
        "trained_tokens_per_s": ("trained tokens a second", "{:,.0f}"),
        "mfu": ("MFU", "{:.1%}"),
        "data_wait": ("share of time waiting for data", "{:.1%}"),
        "peak_memory": ("peak memory, bytes", "{:,.0f}"),
    }
    out = []
    for key, (what, form) in names.items():
        if given := [line[key] for line in lines if line.get(key) is not None]:
            out.append((f"{what}, median", form.format(statistics.median(given))))
    return out


def write_card(export: Path, feed: Feed, result: Mapping[str, Any]) -> None:
    """Write README.md into an exported model's directory; result: as train returns it."""
    config, d = feed.config, feed.config.data
    drawn = config.model.init == "random"
    base = "" if drawn or Path(config.model.path).exists() else config.model.path
    sources = d.train or ", ".join(str(source["path"]) for source in d.sources)
    file = Path(__file__).with_name("templates") / "card.md.jinja"
    text = Template(file.read_text(encoding="utf-8"), trim_blocks=True).render(
        base=base, pipeline=PIPELINES.get(config.task), name=export.parent.name, config=config, drawn=drawn,
        sources=sources, result=result, table=table(result["before"], result["after"]),
        sets=", ".join(feed.sets | feed.tests) or "none",
    )  # fmt: skip
    write_atomic(export / "README.md", printable(text) + "\n")
