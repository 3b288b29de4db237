"""A checkpoint's weights, read without a lock and without a change to the folder of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sftjax.errors import CheckpointError, NotFoundError
from sftjax.training.checkpoint import disk, seal
from sftjax.training.checkpoint.table import restore

WEIGHTS = ("params/", "frozen/", "model_state/")  # beginnings of the names of what is read


def find(directory: Path, step: str, metric: str = "", lower: bool = True) -> int:
    """The step that "latest", "best" or a number names.

    metric: by which the best one is found, of which a lower or a higher value is better. Raises:
    NotFoundError where there is none, or metric is "".
    """
    steps = [n for n, lacks in disk.steps(directory).items() if not lacks]
    there = f"; complete steps in {directory}: {steps or 'none'}"
    if step == "latest" and steps:
        return steps[-1]
    if step.isdecimal() and int(step) in steps:
        return int(step)
    if step == "best":
        if not metric:
            raise NotFoundError(f"--step=best: the run has no eval.best to choose by{there}")
        found = disk.best(directory, steps, metric, lower)
        if found is not None:
            return found
    raise NotFoundError(f"--step={step} is no checkpoint{there}; or take latest or best")


def read(directory: Path, step: int, target: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of a checkpoint under "params", "frozen" and "model_state".

    target: the same, of jax.ShapeDtypeStruct with shardings. Raises: CheckpointError for damaged
    files, or where a leaf has another name, shape or dtype.
    """
    folder = directory / str(step)
    if problem := seal.damage(folder):
        raise CheckpointError(f"checkpoint {folder} is damaged: {problem}")
    try:
        return restore(folder, dict(target), WEIGHTS)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {disk.reason(e)}") from e
