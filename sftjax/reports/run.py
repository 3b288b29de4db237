"""What a run shows at its end: the table before and after, samples, and where things lie."""

import json
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from sftjax.evaluation.metrics import METRICS
from sftjax.files import finite, write_atomic
from sftjax.tasks import Task
from sftjax.terminal import columns, show
from sftjax.training.data import Feed


def table(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What the answers and each set score, before and after; under it what baselines score."""
    rows = [("", "before", "after")]
    for name, old, new, error in measured(before, after):
        rows.append((name, old, f"{new} ± {error}" if error else new))
    lines = [textwrap.indent(columns(rows, right=(1,)), "  ")]
    for name, baselines in after.get("baselines", {}).items():
        for what, values in baselines.items():
            lines.append(f"  {name}, {what}: {', '.join(f'{k} {number(k, v)}' for k, v in values.items())}")
    return "\n".join(lines)


def values(found: Mapping[str, Any]) -> dict[str, float]:
    """{"<set>/<metric>": value} of what Evaluator.full returns; "answers" is a set too."""
    return {f"answers/{k}": v for k, v in found.items() if isinstance(v, float)} | found["losses"]


def measured(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """(name, before, after, standard error) of all values, as they are shown."""
    old, errors = values(before), after.get("errors", {})
    for name, new in values(after).items():
        error = number(name, errors[name]) if name in errors else ""
        yield name, number(name, old.get(name)), number(name, new), error


def number(name: str, value: float | None) -> str:
    """A metric's value as it is shown: shares in percent, "-" for none."""
    metric = name.rpartition("/")[2]
    share = METRICS[metric].share if metric in METRICS else metric == "no_label"
    return "-" if value is None else f"{value:.1%}" if share else f"{value:.4f}"


def finish(workdir: Path, task: Task, feed: Feed, result: dict[str, Any], samples: int) -> None:
    """Print and write what came of the run (process 0 only). samples: of the test set, to show."""
    if jax.process_index():
        return
    before, after = result["before"], result["after"]
    if feed.questions or feed.sets or feed.tests:
        show(f"\nAfter {result['steps']} steps:\n{table(before, after)}\n")
    if feed.questions:
        task.write_answers(workdir / "samples" / "test.jsonl", feed.questions, before, after)
    if text := task.shown(result, feed.questions, samples):
        show(text)
    if "rows" in after:
        write_atomic(workdir / "rows.json", json.dumps(finite(after["rows"]), allow_nan=False))
    numbers = {
        when: {k: finite(v) for k, v in result[when].items() if k not in ("answers", "rows")}
        for when in ("before", "after")
    }
    text = json.dumps(numbers | {"steps": result["steps"]}, indent=2, allow_nan=False)
    write_atomic(workdir / "result.json", text + "\n")
    from sftjax.reports import page  # a run that trains has no need of matplotlib before

    page.write_page(workdir, task, feed, result)
    if (workdir / "export" / "config.json").exists():
        page.write_card(workdir / "export", feed, result)
    for what, path in places(workdir):
        show(f"  {what:<22}{path}")
    export = workdir / "export"
    if export.exists() and (text := task.try_it(feed.config.data, export)):
        show(f"\n{text}")


def places(workdir: Path) -> list[tuple[str, Path]]:
    """(what, where) of everything the run has left."""
    names = {
        "report": "report.html",
        "loss curve": "curve.svg",
        "metrics": "metrics.jsonl",
        "TensorBoard log": "tensorboard",
        "checkpoints": "checkpoints",
        "answers to the test": "samples/test.jsonl",
        "exported model": "export",
    }
    full = lambda path: any(p.name != "manifest.json" for p in path.glob("*"))  # noqa: E731
    paths = {what: workdir / name for what, name in names.items()}
    return [(what, path) for what, path in paths.items() if path.is_file() or full(path)]
