"""A checkpoint's weights, read without a lock and without a change to the folder of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from sftjax.errors import CheckpointError, NotFoundError
from sftjax.training.checkpoint import disk, seal
from sftjax.training.checkpoint.table import check_table, from_table, placed, to_table

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
    folder, wanted = directory / str(step), to_table(dict(target))
    if problem := seal.damage(folder):
        raise CheckpointError(f"checkpoint {folder} is damaged: {problem}")
    places = {name: placed(x) for name, x in wanted.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        try:
            stored = orbax.metadata(folder / "state").item_metadata
            found = {k: v for k, v in dict(stored).items() if k.startswith(WEIGHTS)}
            check_table(folder, found, wanted)
            how = ocp.checkpoint_utils.construct_restore_args(places)
            args = ocp.args.PyTreeRestore(places, restore_args=how, partial_restore=True)
            table = orbax.restore(folder / "state", args=args)
        except (OSError, ValueError) as e:
            reason = (str(e).strip().splitlines() or [""])[0]
            raise CheckpointError(f"checkpoint {folder} cannot be read: {reason:.300}") from e
    return from_table(jax.block_until_ready(table), dict(target))
