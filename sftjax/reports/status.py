"""`sftjax status WORKDIR`: where a run stands, from its files alone, also while it goes on.

It takes no lock, writes nothing and loads no JAX. A file that is missing or torn, as a machine that lost its power may
leave it, is said in a note, and the rest is shown.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from math import isfinite
from pathlib import Path
from typing import Any

from sftjax.errors import NotFoundError
from sftjax.files import parse_json, parse_object
from sftjax.terminal import json_text, show
from sftjax.training import lock as lock_lib

# A step's folder is whole when it has all of these. training/checkpoint/disk.py says the same, and a test compares
# them: to import it would load JAX.
PARTS = ("state/_METADATA", "extra/metadata")
# Beginnings of the names of what training logs of its sources.
OF_TRAINING = ("loss/", "trained_tokens/", "documents/", "epochs/")
NUMBER = (int, float)  # as JSON has them
LOWER = ("loss", "perplexity")  # metrics of which less is better, where the run does not say


def main(argv: Sequence[str]) -> None:
    """Show where the run of a workdir stands: sftjax status WORKDIR [--json]."""
    parser = argparse.ArgumentParser(prog="sftjax status", description=main.__doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder that training was given")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    found = status(options.workdir)
    show(json_text(found) if options.json else text(found))


def status(workdir: Path | str) -> dict[str, Any]:
    """What the files of a workdir say, as JSON holds it; None or {} where they don't.

    state: running | stopped | finished | failed | never began; detail: that in words.
    step, steps: done, and of the whole run.
    logged, loss, tokens_per_s, eta: the last line's step and numbers; eta in seconds.
    evaluated, evaluation, best: a step, {metric: value} and {metric: {value, step}}.
    checkpoints: steps, newest, best, bytes.
    written: when the last line was, in seconds since 1970.
    export: is one there. notes: what could not be read.

    Raises: NotFoundError if that is no workdir.
    """
    workdir, notes = Path(workdir).expanduser(), list[str]()
    if not any((workdir / name).exists() for name in ("config.json", "run.json", "checkpoints")):
        what = "is no workdir: it has no config.json, run.json or checkpoints"
        problem = what if workdir.is_dir() else "does not exist"
        raise NotFoundError(f"{workdir} {problem}; name the folder given to train as --workdir")
    run, config = (_read(workdir / name, notes) for name in ("run.json", "config.json"))
    log = workdir / "metrics.jsonl"
    lines = list(_lines(log, notes))
    trained = [line for line in lines if "lr" in line]
    measured = [line for line in lines if "lr" not in line]
    last = trained[-1] if trained else {}
    kept, size = _checkpoints(workdir / "checkpoints")
    lock, alive = lock_lib.holder(workdir)
    state, detail = _state(workdir, run, lock, alive, kept, bool(trained))
    # The steps of lines after the last checkpoint are done again, so only a run in its loop counts them: it has dropped
    # those of runs before it.
    counted = lines if alive and run.get("state") == "running" else []
    step = max([*kept, *(line["step"] for line in counted)], default=0)
    step = run.get("step") or step if state == "finished" else step
    steps, newest = run.get("steps"), max(kept, default=None)
    eta = None
    if state == "running" and isinstance(steps, int) and isinstance(last.get("step_time"), float):
        eta = last["step_time"] * max(steps - step, 0)
    metric = run.get("best") or config.get("eval", {}).get("best") or ""
    there = [line for line in measured if line["step"] in kept]  # of them eval.best names one
    best, still = (_best(lines, metric, run.get("lower")) for lines in (measured, there))
    saved = still.get(metric, {}).get("step")
    return dict(
        workdir=str(workdir),
        state=state,
        detail=detail,
        step=step,
        steps=steps,
        logged=last.get("step"),
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        eta=eta,
        evaluation=_metrics(measured[-1]) if measured else {},
        evaluated=measured[-1]["step"] if measured else None,
        best=best,
        checkpoints=dict(steps=kept, newest=newest, best=saved, bytes=size),
        written=log.stat().st_mtime if log.exists() else None,
        export=(workdir / "export" / "config.json").exists(),
        notes=notes,
    )


def _state(workdir, run, lock, alive, kept, trained) -> tuple[str, str]:
    """(state, the same in words)."""
    resumable = f"resumable from step {max(kept)}" if kept else "it begins anew when started again"
    if alive:
        where = "" if run.get("state") == "running" else ", not yet in its loop"
        return "running", f"process {lock.get('pid')} on host {lock.get('host')}{where}"
    said, why = run.get("state"), run.get("error") or ""
    if said == "finished" or (said is None and (workdir / "result.json").exists()):
        return "finished", ""
    if said == "failed":
        return "failed", f"{why}; {resumable}"
    if not kept and not trained:
        return "never began", f"no step was taken; {why}" if why else "no step was taken"
    if said in ("starting", "running"):
        who = f"process {lock['pid']} on host {lock.get('host')}" if lock.get("pid") else "it"
        return "stopped", f"{who} was ended without a word; {resumable}"
    return "stopped", f"{why or 'the run is not at its end'}; {resumable}"


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object of a JSON file; {}, with a note, where there is none."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
        notes.append(f"{path.name} is no JSON object")
    except FileNotFoundError:
        notes.append(f"{path.name} is not there")
    except (OSError, ValueError) as e:
        notes.append(f"{path.name} can't be read: {e.strerror if isinstance(e, OSError) else 'it is torn or no JSON'}")
    return {}


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole, their steps whole numbers."""
    torn = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                line = parse_object(text) if text.endswith("\n") else {}
                if type(line.get("step")) is int:
                    yield {k: v for k, v in line.items() if type(v) is not float or isfinite(v)}
                else:
                    torn += 1
    except FileNotFoundError:
        notes.append(f"{path.name} is not there")
    except OSError as e:
        notes.append(f"{path.name} can't be read: {e.strerror}")
    if torn:
        notes.append(f"{path.name}: {torn} torn line{'s' * (torn > 1)} left out")


def _checkpoints(folder: Path) -> tuple[list[int], int]:
    """(steps of the whole checkpoints, ascending; bytes of all there is). They may come and go."""
    names = [p for p in folder.glob("*") if p.name.isdecimal()]
    kept = sorted(int(p.name) for p in names if all((p / part).exists() for part in PARTS))
    size = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted meanwhile
            size += path.lstat().st_size if path.is_file() else 0
    return kept, size


def _metrics(line: dict[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation's line."""
    return {k: v for k, v in line.items() if "/" in k and not k.startswith(OF_TRAINING)}


def _best(measured: list[dict], metric: str, lower: Any) -> dict[str, Any]:
    """{metric: {value, step}} of eval.best, or of each set's loss where that is empty."""
    names = dict.fromkeys(k for line in measured for k in _metrics(line) if k.endswith("/loss"))
    out = {}
    for name in [metric] if metric else names:
        found = [(line[name], line["step"]) for line in measured if type(line.get(name)) in NUMBER]
        if found:
            less = lower if metric and isinstance(lower, bool) else name.rpartition("/")[2] in LOWER
            value, step = (min if less else max)(found, key=lambda pair: pair[0])
            out[name] = dict(value=value, step=step)
    return out


def text(found: dict[str, Any]) -> str:
    """A status as lines for a reader."""
    saved = found["checkpoints"]
    parts = {
        "loss": lambda v: f"loss {v:.4f}",
        "tokens_per_s": lambda v: f"tok/s {v:,.0f}",
        "eta": lambda v: f"eta {timedelta(seconds=round(v))}",
    }
    now = [write(found[k]) for k, write in parts.items() if type(found[k]) in NUMBER]
    if found["logged"] not in (None, found["step"]):
        now.append(f"(logged at step {found['logged']})")
    total = "?" if found["steps"] is None else found["steps"]
    state = found["state"] + f" at step {found['step']}" * (found["state"] == "stopped")
    rows = [
        ("state", f"{state} ({found['detail']})" if found["detail"] else state),
        ("step", "  ".join([f"{found['step']}/{total}", *now])),
    ]
    if found["evaluation"]:
        values = (f"{k} {v:.4g}" for k, v in found["evaluation"].items() if type(v) in NUMBER)
        rows.append(("evaluated", f"step {found['evaluated']}: {'  '.join(values)}"))
    for name, best in found["best"].items():
        rows.append(("best", f"{name} {best['value']:.4g} at step {best['step']}"))
    kept = "none"
    if saved["steps"]:
        best = "" if saved["best"] is None else f", best of step {saved['best']}"
        kept = f"newest of step {saved['newest']}{best}; {saved['bytes'] / 1e6:,.4g} MB"
    rows.append(("saved", kept))
    if found["written"] is not None:
        age = timedelta(seconds=max(round(time.time() - found["written"]), 0))
        when = datetime.fromtimestamp(found["written"])
        rows.append(("written", f"last line {when:%Y-%m-%d %H:%M:%S}, {age} ago"))
    rows.append(("export", "there" if found["export"] else "not there"))
    rows += [("note", note) for note in found["notes"]]
    return "\n".join(f"{what:<10}{line}" for what, line in rows)
