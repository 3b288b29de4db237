"""What may differ between a run and its resumption: keys, versions, evaluation sets."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from sftjax import config as config_lib
from sftjax.errors import ConfigError
from sftjax.evaluation.sets import ANSWERS
from sftjax.files import read_json, read_object
from sftjax.training.data import Feed
from sftjax.training.log import warn

MOST = 10  # lines of keys that differ


def check_config(file: Path, new: Mapping, began: Path) -> None:
    """Compare config.json, of the run's last start, with the config now, and say what may differ.

    began: the directory that relative paths are taken from. Raises: ConfigError for what may not.
    """
    try:
        old = read_json(file, ConfigError)
        if not isinstance(old, dict):
            raise ConfigError(f"{file} is damaged: it holds no config")
    except ConfigError as e:
        raise ConfigError(
            f"{e}. Put back an intact copy; or, if this is the config that the run began with,"
            " delete the file: the next start writes it anew."
        ) from None
    # A key that the run's version did not have had what is its default now.
    before, now = (
        config_lib.flat(config_lib.to_dict(config_lib.get_default())) | config_lib.flat(old),
        config_lib.flat(new),
    )
    keys = [k for k in sorted(before.keys() | now.keys()) if not k.startswith(config_lib.FREE)]
    keys = [k for k in keys if _meant(k, before.get(k), began) != _meant(k, now.get(k), began)]
    measures = [k for k in keys if k.startswith(config_lib.MEASURES)]
    show = lambda k: f"{k}: {before.get(k)!r:.100} there, {now.get(k)!r:.100} now"  # noqa: E731
    refused = [show(k) + why for k in keys if (why := _refused(k, before, now)) is not None]
    if refused:
        lines = "\n".join(f"  {line}" for line in refused[:MOST])
        more = f"\n  ... and {len(refused) - MOST} more" if len(refused) > MOST else ""
        raise ConfigError(
            f"--workdir={file.parent} belongs to a run with another config:\n{lines}{more}\nUse"
            " another workdir, or the same settings to resume that run."
        )
    if measures:
        warn("evaluation differs from now on, so its metrics may too: " + "; ".join(map(show, measures)))
    if "train.duration" in keys:
        text = f"the duration is another from now on: {show('train.duration')}"
        if rates := _rates_that_depend(now):
            text += f". Its learning rates, by {rates}, are those of such a run from here on, not"
            text += " those of a run that began so"
        warn(text)


def _refused(key, before, now) -> str | None:
    """Why a key may not differ, "" if that needs no words; None = it may."""
    if key.startswith(config_lib.MEASURES):
        return None
    if key != "train.duration":
        return ""
    if "%" in json.dumps(now.get("data.phases", [])):
        return " (data.phases end at shares of it, so their rows would be others)"
    try:
        (old, unit), (new, other) = (config_lib.amount(c[key], key) for c in (before, now))
    except (ConfigError, KeyError):
        return ""
    # In two units, the numbers of steps are compared: see identity.check_manifest.
    return " (it may grow, not shrink)" if unit == other and new < old else None


def _rates_that_depend(config) -> str:
    """The keys by which the learning rate of a step depends on the number of all steps."""
    schedule = config["optim.schedule"]
    keys = ["optim.schedule"] if schedule in ("linear", "cosine", "wsd") else []
    shares = ("optim.warmup", "optim.decay_phase") if schedule == "wsd" else ("optim.warmup",)
    keys += [key for key in shares if "%" in config[key]]
    return " and ".join(f"{key}={config[key]}" for key in keys)


def _meant(key, value, began):
    """A value, and by a path what it names, however it is written."""
    if key not in config_lib.PATHS or not isinstance(value, str):
        return value
    return [os.path.normpath(began / part.strip()) if part.strip() else "" for part in value.split(",")]


def joined(file: Path, new: dict[str, Any], trained: bool) -> dict[str, Any]:
    """env.json: the first start's record, and under "resumed" those since; says what differs."""
    old = read_object(file)
    if not old and file.exists() and jax.process_index() == 0:
        aside = file.with_name(f"{file.name}.damaged")
        os.replace(file, aside)
        warn(f"{file} is damaged; it is set aside as {aside.name}, and written anew")
    if not old or not trained:
        return new
    starts: Any = old.get("resumed")
    starts = starts if isinstance(starts, list) else []
    last = starts[-1] if starts and isinstance(starts[-1], dict) else old
    was, now = _versions(last), _versions(new)
    differ = [f"{k} {was[k]} there, {now.get(k)} now" for k in sorted(was) if was[k] != now.get(k)]
    if differ:
        warn("the run goes on with other versions, which may change its numbers' last bits: " + "; ".join(differ))
    return old | {"resumed": [*starts, new]}


def _versions(record) -> dict[str, str]:
    packages = record.get("packages")
    found = dict(packages) if isinstance(packages, dict) else {}
    found |= {"python": record.get("python"), "commit": record.get("commit")}
    return {name: text for name, text in found.items() if isinstance(text, str)}


def comparable(extra: dict[str, Any], manifest: Mapping, feed: Feed) -> dict[str, Any]:
    """The `extra` of a checkpoint without numbers of sets whose rows are others now."""
    written = extra.get("manifest", {})
    if not isinstance(written.get("evaluation"), dict):  # of an older version
        return extra
    was, now = written["evaluation"], manifest["evaluation"]

    def same(key):
        name = key.partition("/")[0]  # of "<set>/<metric>", or "<set>" alone
        return _rows_of(was.get(name)) == _rows_of(now.get(name))

    before = extra.get("before")
    if before is not None:
        kept = {
            part: {k: v for k, v in found.items() if same(k)} if type(found) is dict else found
            for part, found in before.items()
        }
        if feed.questions and not same(ANSWERS):
            kept = {k: v for k, v in kept.items() if isinstance(v, dict)}
            kept["answers"] = ["(the test set was another)"] * len(feed.questions)
        extra = extra | {"before": kept}
    best, metric = written.get("best"), manifest["best"]
    if best != metric or not same(metric):
        extra = extra | {"early_stop": None}
    return extra


def _rows_of(facts) -> Any:
    return facts and [[f["name"], f["rows"], f["sha256"]] for f in facts["files"]] + [facts["rows"]]
