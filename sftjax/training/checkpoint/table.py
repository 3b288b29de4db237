"""A state as a flat table {name: array}, which is what a checkpoint holds.

PRNG keys are stored as their key data, arrays of size 0 and None not at all: the restore target supplies the structure
and the shardings, on a mesh that may be another.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sftjax import params as params_lib
from sftjax.errors import CheckpointError
from sftjax.training.checkpoint import disk


def to_table(tree: Any) -> dict[str, Any]:
    """{name: array or ShapeDtypeStruct} of a tree of them."""
    table = {}
    for name, x in params_lib.named_leaves(tree):
        if name in table:
            raise CheckpointError(f"two leaves of the state are named {name!r}; rename one")
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if math.prod(x.shape):
            table[name] = _key_data(x) if _is_key(x) else x
    return table


def from_table(table: Mapping[str, Any], target: Any) -> Any:
    """The arrays of `table` in the structure of `target`."""

    def value(name, spec):
        if not math.prod(spec.shape):
            return jax.numpy.zeros(spec.shape, spec.dtype, device=spec.sharding)
        if _is_key(spec):
            return jax.random.wrap_key_data(table[name], impl=_key_impl(spec))
        return table[name]

    values = [value(name, spec) for name, spec in params_lib.named_leaves(target)]
    return jax.tree.unflatten(jax.tree.structure(target), values)


def _is_key(x) -> bool:
    return jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _key_data(x):
    if isinstance(x, jax.Array):
        return jax.random.key_data(x)
    raw = jax.eval_shape(jax.random.key_data, x)
    return jax.ShapeDtypeStruct(raw.shape, raw.dtype, sharding=x.sharding)


def _key_impl(spec):
    found = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), spec)
    return found[0]


def restore(folder: Path, target: Any, beginnings: tuple[str, ...] = ("",)) -> Any:
    """The arrays of a checkpoint in the structure of `target`, laid out as it says.

    beginnings: of the names that are read. Raises: CheckpointError where a leaf has another name, shape or dtype, or
    Orbax can't read it.
    """
    wanted = to_table(target)
    places = {name: _placed(x) for name, x in wanted.items()}
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            stored = dict(orbax.metadata(folder / "state").item_metadata)
            _check(folder, {k: v for k, v in stored.items() if k.startswith(beginnings)}, wanted)
            how = ocp.checkpoint_utils.construct_restore_args(places)
            args = ocp.args.PyTreeRestore(places, restore_args=how, partial_restore=True)
            table = orbax.restore(folder / "state", args=args)
        return from_table(jax.block_until_ready(table), target)
    except (CheckpointError, jax.errors.JaxRuntimeError):  # the other is of no memory
        raise
    except Exception as e:
        others = [step for step in disk.complete(folder.parent) if str(step) != folder.name]
        raise CheckpointError(
            f"checkpoint {folder} cannot be read, though its files are as they were written:"
            f" {disk.reason(e)}\nOther complete steps there: {others}"
        ) from e


def read_weights(folder: Path, target: Mapping[str, Any]) -> dict[str, Any]:
    """The trees of a checkpoint under "params", "frozen" and "model_state", without a lock.

    target: the same, of jax.ShapeDtypeStruct with shardings. Raises: CheckpointError for damaged files, or where a leaf
    has another name, shape or dtype.
    """
    if problem := disk.damage(folder):
        raise CheckpointError(f"checkpoint {folder} is damaged: {problem}")
    return restore(folder, dict(target), ("params/", "frozen/", "model_state/"))


def _placed(x) -> jax.ShapeDtypeStruct:
    """A restore target always says where: without a sharding, the default device."""
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _check(path, found, wanted):
    """CheckpointError unless both tables have the same names, shapes and dtypes."""

    def text(table, name):
        if name not in table:
            return "absent"
        x = table[name]
        return f"{np.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"

    lines = [
        f"  {name}: {text(found, name)} in the checkpoint, {text(wanted, name)} in this run"
        for name in sorted(set(found) | set(wanted))
        if text(found, name) != text(wanted, name)
    ]
    if lines:
        more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit this run's state:\n"
            + "\n".join(lines[:10])
            + more
            + "\nResume with the model, optimizer, dtypes and trainable rules that wrote it, or"
            " use another workdir."
        )
