"""Checkpoints: a state and its host-side companions, written by Orbax behind the training loop.

A step directory appears under its number only when every byte of it is written, and an old one is
deleted only after that; so a killed run leaves complete checkpoints and no others. The state is
stored as a flat table `name -> array` (PRNG keys as their key data), so None leaves, namedtuples
and empty optimizer states need no entry: the restore target supplies the structure, the shardings
and thereby the mesh, which may differ from the one that saved.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from sftjax import params as params_lib
from sftjax.errors import CheckpointError, ConfigError, NotFoundError
from sftjax.files import read_json, write_atomic


class Checkpointer:
    """The checkpoints of one run, in one directory on a disk that all processes share.

    directory: created when absent; a CheckpointError says when it cannot be written.
    manifest: see make_manifest; a directory made by another identity raises CheckpointError.
    keep: newest checkpoints kept. best_metric: name of the metric whose best checkpoint is kept
    besides ("" = none), best_mode: "min" or "max". Use it as a context manager, or call close().
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        manifest: Mapping | None = None,
        keep: int = 2,
        best_metric: str = "",
        best_mode: str = "min",
    ) -> None:
        if keep < 1 or best_mode not in ("min", "max"):
            raise ConfigError(
                f"keep={keep}, best_mode={best_mode!r}; expected keep >= 1 and 'min' or 'max'"
            )
        self.directory = Path(directory).absolute()
        self.manifest = manifest
        self.best_metric, self._sign = best_metric, 1 if best_mode == "max" else -1
        check_writable(self.directory)
        if manifest is not None:
            check_manifest(self.directory, manifest)
        _set_aside_incomplete(self.directory)
        keepers = [managers.LatestN(keep)]
        if best_metric:
            keepers.append(
                managers.BestN(
                    get_metric_fn=self._score, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._manager = managers.CheckpointManager(
            self.directory,
            options=managers.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                preservation_policy=managers.AnyPreservationPolicy(keepers),
                # Without a best_fn Orbax writes no metrics, and a resumed run forgets its best.
                best_fn=self._score if best_metric else None,
            ),
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "extra": ocp.JsonCheckpointHandler(),
            },
        )
        self._writing: int | None = None  # the step being written

    def _score(self, metrics) -> float:
        # Absent when an earlier run in this directory tracked another metric.
        value = metrics.get(self.best_metric, math.nan)
        return -math.inf if math.isnan(value) else self._sign * value

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> bool:
        """Copy `state` off the devices and write it behind the loop; True when a save was begun.

        The state may be donated to the next step at once. extra: anything JSON holds (data
        position, counters, config); it comes back with lists for tuples. metrics: {name: number}
        that best_metric is looked up in; None when the step was not evaluated. False when `step`
        is the newest checkpoint already. Raises CheckpointError when this save, or the one
        before it, failed.
        """
        self.wait()
        if step == self.latest_step():
            return False
        self._check_newer(step)
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_to_table(state)),
            extra=ocp.args.JsonSave(self._extra(extra)),
        )
        metrics = self._metrics(metrics)
        try:
            self._manager.save(step, args=args, metrics=metrics, force=True)
        except Exception as e:
            raise self._failed(step, e) from e
        self._writing = step
        return True

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, extra) of `step`, or of the newest complete checkpoint.

        abstract_state: the state to fill, of jax.ShapeDtypeStruct with shardings on the present
        mesh (see abstract_like). Raises NotFoundError when there is no such checkpoint, and
        CheckpointError naming every leaf whose name, shape or dtype is another.
        """
        self.wait()
        steps = self.all_steps()
        if not steps or (step is not None and step not in steps):
            raise NotFoundError(
                f"no checkpoint {'' if step is None else f'of step {step} '}in {self.directory};"
                f" complete steps there: {steps or 'none'}"
            )
        step = steps[-1] if step is None else step
        table = _to_table(abstract_state)
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore({name: _placed(x) for name, x in table.items()}),
            extra=ocp.args.JsonRestore(),
        )
        try:
            found = self._manager.item_metadata(step).state
            _check_table(self.directory / str(step), found, table)
            restored = self._manager.restore(step, args=args)
        except CheckpointError:
            raise
        except Exception as e:
            raise CheckpointError(
                f"checkpoint {self.directory / str(step)} cannot be read: {e}\nIf it is damaged,"
                f" move it away; other complete steps there: {[s for s in steps if s != step]}"
            ) from e
        return _from_table(restored.state, abstract_state), restored.extra

    def all_steps(self) -> list[int]:
        """Steps completely on disk, ascending; one still being written is not among them."""
        return _steps(self.directory, complete=True)

    def latest_step(self) -> int | None:
        """The newest step completely on disk."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step with the best best_metric among those kept; None when none was evaluated."""
        self.wait()
        return self._manager.best_step() if self.best_metric else None

    def wait(self) -> None:
        """Block until the save under way is on disk; CheckpointError when it failed."""
        step, self._writing = self._writing, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as e:
            raise self._failed(step, e) from e

    def check(self) -> None:
        """Raise CheckpointError if the save under way has already failed; does not block."""
        # Not Orbax's check_for_errors: it takes the error away from the thread that would then
        # go on and delete the old checkpoint.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def close(self) -> None:
        """Wait for the save under way and release threads; CheckpointError when it failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it repeats what wait, check or save has raised
                self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _check_newer(self, step):
        latest = self.latest_step()
        if latest is not None and step < latest:
            raise CheckpointError(
                f"step {step} would be saved into {self.directory}, which has the later step"
                f" {latest}: move the later steps away, or use another workdir"
            )

    def _extra(self, extra) -> dict:
        extra = dict(extra or {})
        if self.manifest is not None:
            extra["manifest"] = self.manifest
        for key, value in extra.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as e:
                raise TypeError(
                    f"extra[{key!r}] of a checkpoint: {e}; make arrays lists, scalars int or float"
                ) from e
        return json.loads(json.dumps(extra))  # a copy: the caller may go on changing its own

    def _metrics(self, metrics) -> dict | None:
        if not self.best_metric or metrics is None:
            return None
        if self.best_metric not in metrics:
            raise CheckpointError(
                f"best_metric {self.best_metric!r} is not among the metrics of this evaluation:"
                f" {sorted(metrics)}"
            )
        return {name: float(value) for name, value in metrics.items()}

    def _failed(self, step, error) -> CheckpointError:
        free = shutil.disk_usage(self.directory).free if self.directory.is_dir() else 0
        return CheckpointError(
            f"checkpoint of step {step} in {self.directory} was not written:"
            f" {type(error).__name__}: {error}\nThe newest complete one there is of step"
            f" {self.latest_step()}; the disk has {free / 1e9:.1f} GB free. Make room or choose"
            " another workdir, then start the same command again to resume."
        )


def abstract_like(state: Any) -> Any:
    """The restore target of a concrete state: shapes, dtypes and shardings, no values."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


# ---- manifest and directory ----------------------------------------------------------------


def make_manifest(config: Mapping, identity: Mapping) -> dict:
    """What a run is: its config's sha256, library versions, and `identity`.

    identity: flat {name: JSON value} of what must not change inside one directory, such as the
    model, and the sha256 of tokenizer and data (see files_sha256). The rest may.
    """
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        "identity": json.loads(json.dumps(dict(identity))),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "versions": {name: version(name) for name in ("sftjax", "jax", "orbax-checkpoint")},
    }


def version(name: str) -> str | None:
    """The installed version of a package; None where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return None


def files_sha256(paths: Iterable[Path | str]) -> str:
    """One sha256 over the names and contents of files; their order does not matter."""
    total = hashlib.sha256()
    for path in sorted(map(Path, paths)):
        with path.open("rb") as f:
            total.update(f"{path.name}:{hashlib.file_digest(f, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def check_manifest(directory: Path | str, manifest: Mapping) -> None:
    """Claim `directory` for the manifest's identity, or raise CheckpointError if it has another."""
    path = Path(directory) / "manifest.json"
    if not path.exists():
        if jax.process_index() == 0:
            write_atomic(path, json.dumps(manifest, indent=2))
        return
    found, new = read_json(path, CheckpointError), manifest["identity"]
    old = found.get("identity") if isinstance(found, dict) else None
    if not isinstance(old, dict):
        raise CheckpointError(
            f"{path} is damaged: expected an object with identity, {{name: value}}. Use another"
            " workdir, or move this file away if the checkpoints beside it are this run's."
        )
    differing = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if differing:
        lines = "\n".join(f"  {k}: {old.get(k)!r} there, {new.get(k)!r} now" for k in differing)
        raise CheckpointError(
            f"{directory} holds checkpoints of another run:\n{lines}\n"
            "Use another workdir, or restore these settings to resume that run."
        )


def check_writable(directory: Path | str, need_bytes: int = 0) -> None:
    """Create `directory` and a file in it; CheckpointError if that fails or space is short."""
    try:
        os.makedirs(directory, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as probe:
            probe.write(b"sftjax")
    except OSError as e:
        raise CheckpointError(
            f"cannot write to {directory}: {e.strerror or e}. Choose a workdir on a disk that is"
            " writable and not full."
        ) from e
    free = shutil.disk_usage(directory).free
    if free < need_bytes:
        raise CheckpointError(
            f"{directory} has {free / 1e9:.2f} GB free, {need_bytes / 1e9:.2f} GB are needed."
            " Make room, keep fewer checkpoints or choose another workdir."
        )


def _steps(directory, complete) -> list[int]:
    """Numbered directories that are whole (complete=True) or lack a part (False), ascending."""
    parts = ("_CHECKPOINT_METADATA", "state/_METADATA", "extra/metadata")
    return sorted(
        int(d.name)
        for d in Path(directory).iterdir()
        if d.name.isdecimal() and complete == all((d / part).exists() for part in parts)
    )


def _set_aside_incomplete(directory):
    """Rename numbered directories that lack a part (a deletion cut short, a partial copy)."""
    if jax.process_index() == 0:
        for step in _steps(directory, complete=False):
            aside = tempfile.mkdtemp(prefix=f"{step}.incomplete-", dir=directory)
            os.replace(directory / str(step), Path(aside) / str(step))
    multihost_utils.sync_global_devices("sftjax: checkpoint directory is clean")


# ---- state <-> table -----------------------------------------------------------------------


def _to_table(tree) -> dict:
    """{name: array or ShapeDtypeStruct}; Orbax takes no PRNG keys and no arrays of size 0."""
    table = {}
    for name, x in params_lib.named_leaves(tree):
        if name in table:
            raise CheckpointError(f"two leaves of the state are named {name!r}; rename one")
        x = x if hasattr(x, "dtype") else np.asarray(x)
        if math.prod(x.shape):
            table[name] = _key_data(x) if _is_key(x) else x
    return table


def _from_table(table, target):
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


def _placed(x):
    """A restore target always says where: without a sharding, the default device."""
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _check_table(path, found, wanted) -> None:
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
