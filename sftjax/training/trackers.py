"""Trackers of experiments that a run also writes to; `train.trackers` names them, each an extra.

Where they write, and whether to a server at all, is said in the package's own way: WANDB_MODE, MLFLOW_TRACKING_URI,
TRACKIO_SPACE_ID. A resumed run goes on in the same run of the tracker.
"""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from sftjax.config import flat
from sftjax.errors import ConfigError
from sftjax.terminal import warn

PROJECT = "sftjax"


class Tracker(NamedTuple):
    """What a run does with a tracker."""

    write: Callable[[int, dict[str, float]], object]  # a step and its finite numbers
    close: Callable[[], object]


def wandb(workdir: Path, key: str, config: Mapping[str, Any]) -> Tracker:
    """Weights & Biases, with its files in the workdir."""
    import wandb

    run = wandb.init(project=PROJECT, name=workdir.name, id=key, resume="allow", dir=workdir, config=dict(config))
    return Tracker(lambda step, values: run.log(values, step=step), run.finish)


def mlflow(workdir: Path, key: str, config: Mapping[str, Any]) -> Tracker:
    """MLflow; the config is its parameters."""
    import mlflow

    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(PROJECT)
    where = found.experiment_id if found else client.create_experiment(PROJECT)
    runs = client.search_runs([where], f"tags.workdir = '{key}'", max_results=1)
    run = runs[0] if runs else client.create_run(where, None, {"workdir": key}, workdir.name)
    own = run.info.run_id
    if not runs:
        for name, value in config.items():
            client.log_param(own, name, str(value)[:500])  # the longest that it takes

    def write(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            client.log_metric(own, name, value, step=step)

    return Tracker(write, lambda: client.set_terminated(own))


def trackio(workdir: Path, key: str, config: Mapping[str, Any]) -> Tracker:
    """Trackio; a database on this machine, or the Space that TRACKIO_SPACE_ID names."""
    import trackio

    run = trackio.init(project=PROJECT, name=f"{workdir.name}-{key[:6]}", resume="allow", config=dict(config))
    return Tracker(lambda step, values: run.log(values, step=step), run.finish)


TRACKERS = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}


def start(names: tuple[str, ...], workdir: Path, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of these names, told the run's config; of process 0. Raises: ConfigError."""
    key = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"train.trackers={name!r} is none; there are {', '.join(TRACKERS)}")
    begun = []
    for name in names if jax.process_index() == 0 else ():
        try:
            begun.append(guarded(name, TRACKERS[name](workdir, key, flat(config))))
        except ModuleNotFoundError:
            raise ConfigError(
                f"train.trackers={name!r} needs the package {name}, which is not installed: pip"
                f" install 'sftjax[{name}]'"
            ) from None
        except Exception as e:  # whatever a package of others may raise
            warn(f"{name} does not begin, and gets no numbers: {e}")
    return begun


@contextlib.contextmanager
def closing(begun: Sequence[Tracker]) -> Iterator[None]:
    """Close them at the end, however it comes."""
    try:
        yield
    finally:
        for tracker in begun:
            tracker.close()


def guarded(name: str, tracker: Tracker) -> Tracker:
    """A tracker whose failure is said, and never ends a run."""

    def call(fn: Callable, *args: Any) -> None:
        try:
            fn(*args)
        except Exception as e:  # whatever a package of others may raise
            warn(f"{name} did not take a run's numbers: {e}")

    return Tracker(*(functools.partial(call, fn) for fn in tracker))
