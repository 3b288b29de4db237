"""Checkpoints: a state and its companions, by Orbax behind the loop: docs/resuming.md."""

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import threading
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax._src import distributed
from jax.experimental import multihost_utils

from sftjax.errors import CheckpointError, NotFoundError
from sftjax.files import finite, read_object
from sftjax.parallel import processes
from sftjax.training.checkpoint import disk
from sftjax.training.checkpoint.table import restore, to_table
from sftjax.training.identity import check_manifest
from sftjax.training.log import warn

EXTRA = "extra/metadata"  # of a checkpoint: what is beside its state
FAILURES = 3  # saves in a row that may fail before the run ends
TIMEOUT = 1200.0  # seconds for the slowest process to write its part
_numbers = itertools.count()


class Checkpointer:
    """The checkpoints of one run, in one directory on a disk that all processes share.

    directory: created when absent. manifest: see identity.check_manifest. keep: newest checkpoints kept; besides the
    best by best_metric ("" = none), of which lower says: is less of it better. Raises CheckpointError where the
    directory can't be written, or is another identity's. Process 0 seals what all have written. Call close() at the
    end. frozen: do they hold the frozen parameters too; else `restore` is given them.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        manifest: Mapping | None = None,
        keep: int = 2,
        best_metric: str = "",
        lower: bool = True,
        frozen: bool = True,
    ) -> None:
        self.directory, self.frozen = Path(directory).absolute(), frozen
        self.manifest, self.keep = manifest, keep
        self.best_metric, self._lower = best_metric, lower
        disk.check_writable(self.directory)
        if manifest is not None:
            check_manifest(self.directory, manifest)
        # Numbered directories that lack a part (a deletion cut short, a partial copy).
        found = disk.steps(self.directory)
        wrong = {step: text for step, text in found.items() if text}
        if wrong and len(wrong) == len(found):
            raise disk.none_is_whole(self.directory, wrong)
        self._set_aside(wrong)
        if jax.process_index() == 0:
            disk.sweep(self.directory)
        # Held open, so that the system gives its number to no other directory.
        self._handle = os.open(self.directory, os.O_RDONLY)
        weakref.finalize(self, os.close, self._handle)
        self._agreement = Agreement()  # of the save under way
        self._orbax = _orbax(lambda **key: self._agreement.barrier(**key))
        # The save under way; what it came to is left in _outcome by its thread.
        self._thread: threading.Thread | None = None
        self._outcome: tuple[int, Exception | None] = 0, None
        self._failures = 0  # in a row
        self._failed: CheckpointError | None = None  # the last save's

    # ---- saving ----

    def save(self, step: int, state: Any, extra: Mapping | None = None, metrics: Mapping | None = None) -> bool:
        """Copy `state` off the devices and write it behind the loop; True when a save was begun.

        The state may be donated to the next step at once. extra: anything JSON holds; None comes back for numbers that
        JSON has not. metrics: {name: number} of an evaluation of this step. False when `step` is the newest checkpoint
        already. Raises CheckpointError when FAILURES saves in a row, the one before this the last of them, have failed.
        """
        self._settle()
        latest = self.latest_step()
        if step == latest:
            return False
        if latest is not None and step < latest:
            raise CheckpointError(
                f"step {step} would be saved into {self.directory}, which has the later step"
                f" {latest}: move the later steps away, or use another workdir"
            )
        if not self.frozen:
            state = state.replace(frozen=None)
        table = to_table(state)
        beside = {EXTRA: self._extra(extra), "metrics/metrics": self._metrics(metrics)}
        self._agreement, problem = Agreement(), self._begin(step)
        if not problem:
            try:
                self._orbax.save(self._saving(step) / "state", args=ocp.args.StandardSave(table))
            except Exception as e:
                problem = e
        # No daemon: a run that ends by an error of another kind still completes its checkpoint.
        self._thread = threading.Thread(target=self._finish, args=(step, beside, problem), name="save")
        self._thread.start()
        return True

    def _saving(self, step) -> Path:
        return self.directory / f".saving-{step}"

    def _begin(self, step) -> Exception | None:
        """Make the folder to write into. If Orbax failed to, others would wait at its barriers."""
        problem = None
        if jax.process_index() == 0:
            try:
                self._check_there()
                shutil.rmtree(self._saving(step), ignore_errors=True)
                self._saving(step).mkdir()
            except OSError as e:
                problem = e
        texts = [text for text in processes.gather(problem and disk.reason(problem)) if text]
        return problem or (OSError(texts[0]) if texts else None)

    def _check_there(self):
        """Is this the directory that the run began with? Orbax makes a deleted one anew."""
        try:
            same = os.path.samestat(os.stat(self.directory), os.fstat(self._handle))
        except OSError:
            same = False
        if not same:
            raise FileNotFoundError("the directory is gone: it was deleted, moved or unmounted")

    def _finish(self, step, beside, problem):
        """In a thread: wait until all is written, let it count, and delete what is too old."""
        agreement = self._agreement
        try:
            if problem:
                raise problem
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._check_there()
                for name, value in beside.items():
                    if value is not None:
                        text = json.dumps(finite(value), allow_nan=False)
                        path = self._saving(step) / name
                        path.parent.mkdir()
                        path.write_text(text, encoding="utf-8")
                disk.seal(self._saving(step))
                os.rename(self._saving(step), self.directory / str(step))
                disk.sync(self.directory)
                with contextlib.suppress(OSError):  # the next save deletes what this one could not
                    disk.remove(self.directory, self._unwanted())
                agreement.post("committed")
            agreement.wait("committed", 1)
        except Exception as e:
            with contextlib.suppress(Exception):  # the others may be gone
                agreement.post("failed", disk.reason(e) or "it failed")
            if jax.process_index() == 0:
                disk.sweep(self.directory)  # what it has written may fill the disk
            problem = e
        self._outcome = step, problem

    def _unwanted(self) -> list[int]:
        steps, best = list(disk.steps(self.directory)), None
        if self.best_metric:
            best = disk.best(self.directory, self.all_steps(), self.best_metric, self._lower)
        return [s for s in steps[: -self.keep] if s != best]

    def check(self) -> None:
        """Say it, or raise as `save` does, if the save under way has failed already."""
        if self._thread and not self._thread.is_alive() and jax.process_count() == 1:
            self._settle()

    def wait(self) -> None:
        """Block until the save under way is on disk; CheckpointError when the last one failed."""
        self._collect()
        if self._failed:
            error, self._failed = self._failed, None
            raise error

    def close(self) -> None:
        """Wait for the save under way and release threads; CheckpointError when it failed."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # it repeats what wait has raised
                self._orbax.close()

    def _settle(self):
        """As wait, but a failure is said, until there are too many in a row."""
        if not self._collect():
            return
        if self._failures >= FAILURES:
            self.wait()
        left = FAILURES - self._failures
        fails = "it fails" if left == 1 else f"{left} in a row fail"
        goes_on = "Training goes on, and the next checkpoint that is due is tried"
        warn(f"{self._failed}\n{goes_on}; if {fails} too, the run ends.")

    def _collect(self) -> bool:
        """Take the outcome of the save under way, if there is one. Has it failed?"""
        if self._thread is None:
            return False
        self._thread.join()
        self._thread, (step, problem) = None, self._outcome
        self._failures = self._failures + 1 if problem else 0
        self._failed = self._as_error(step, problem) if problem else None
        return bool(problem)

    def _as_error(self, step, problem) -> CheckpointError:
        free, many, newest = "", "", self.latest_step()
        there = "none" if newest is None else f"step {newest}"
        with contextlib.suppress(OSError):  # the directory may be gone
            free = f"; the disk has {shutil.disk_usage(self.directory).free / 1e9:.2f} GB free"
        if self._failures >= FAILURES:
            many = f" {self._failures} saves in a row have failed."
        return CheckpointError(
            f"checkpoint of step {step} in {self.directory} was not written: {disk.reason(problem)}\n"
            f"The newest complete one there: {there}{free}.{many} Make room or choose another workdir; the same"
            " command, started again, resumes."
        )

    def _extra(self, extra) -> dict:
        extra = dict(extra or {}) | ({} if self.manifest is None else {"manifest": self.manifest})
        return json.loads(json.dumps(extra))  # a copy: the caller may go on changing its own

    def _metrics(self, metrics) -> dict | None:
        if not self.best_metric or metrics is None:
            return None
        return {name: float(value) for name, value in metrics.items()}

    def check_space(self, state: Any, export: bool) -> None:
        """Compare what this run will write with the free space of the disk, and say if it is short.

        state: as of save, or its shapes. export: are its parameters written once more. Raises: CheckpointError where
        not even one checkpoint finds room beside what is there.
        """
        sizes = {n: math.prod(x.shape) * x.dtype.itemsize for n, x in to_table(state).items()}
        known = {n: 4 * size if n.endswith("/codes") else size for n, size in sizes.items()}  # few bits become 16
        model = sum(size for n, size in known.items() if n.startswith(("params/", "frozen/")))
        sizes = {n: size for n, size in sizes.items() if self.frozen or not n.startswith("frozen/")}
        saves = self.keep + 1 + bool(self.best_metric)  # an old one goes after the new one is there
        save, more = sum(sizes.values()), max(saves - len(disk.steps(self.directory)), 1)
        free = min(processes.gather(shutil.disk_usage(self.directory).free))
        gb = lambda n: f"{n / 1e9:.2f} GB"  # noqa: E731
        has = f"{self.directory} has {gb(free)} free"
        if free < save:
            raise CheckpointError(
                f"{has}, and a checkpoint of this run takes up to {gb(save)}. Make room, or choose"
                " a workdir on another disk."
            )
        if free < more * save + model * export:
            warn(
                f"the disk of {has}; {more} checkpoints of up to {gb(save)}, which lie there at a time, and"
                f" {gb(model * export)} of the export may not find room: lower train.keep, or make room"
            )

    # ---- restoring ----

    def restore(self, abstract_state: Any, frozen: Any = None) -> tuple[Any, dict]:
        """(state, extra) of the newest checkpoint whose files are intact; newer ones are set aside.

        abstract_state: the state to fill, of jax.ShapeDtypeStruct with shardings. frozen: its parameters that the
        checkpoints do not hold. Raises NotFoundError when there is no checkpoint, and CheckpointError where none is
        intact, or naming every leaf whose name, shape or dtype is another.
        """
        self.wait()
        wrong, steps = dict[int, str](), self.all_steps()
        if not steps:
            raise NotFoundError(f"no checkpoint in {self.directory}; complete steps there: none")
        for at in reversed(steps):
            if problem := self._damage(at):
                wrong[at] = problem
                continue
            folder = self.directory / str(at)
            target = abstract_state if self.frozen else abstract_state.replace(frozen=None)
            state = restore(folder, target)
            state = state if self.frozen else state.replace(frozen=frozen)
            self._set_aside(wrong, at)
            return state, read_object(folder / EXTRA)
        raise disk.none_is_whole(self.directory, wrong)

    def _damage(self, step) -> str:
        """What is wrong with a checkpoint's files; each process reads a part of them."""
        problem = disk.damage(self.directory / str(step), jax.process_index(), jax.process_count())
        return next((text for text in processes.gather(problem) if text), "")

    def _set_aside(self, wrong: Mapping[int, str], taken: int | None = None) -> None:
        """Rename damaged ones, and say what that costs. taken: the step that is gone back to."""
        multihost_utils.sync_global_devices("sftjax: all have seen the checkpoints")
        if jax.process_index() == 0:
            for step, text in sorted(wrong.items()):
                name = disk.set_aside(self.directory, step)
                said = f"{self.directory / str(step)} is damaged: {text}; it is set aside as {name}"
                if taken is not None:
                    said += f". The newest intact one, of step {taken}, is taken: {step - taken} steps are repeated."
                warn(f"checkpoint {said}")
        multihost_utils.sync_global_devices("sftjax: damaged checkpoints are set aside")

    # ---- which there are ----

    def all_steps(self) -> list[int]:
        """Steps completely on disk, ascending; one still being written is not among them."""
        return disk.complete(self.directory)

    def latest_step(self) -> int | None:
        """The newest step completely on disk."""
        return max(self.all_steps(), default=None)


def _orbax(barrier) -> ocp.AsyncCheckpointer:
    """Orbax's writer of one state, which gives nothing a number and deletes nothing."""
    # What fails is raised to us, and said by us; its threads log a traceback each.
    logging.getLogger("absl").addFilter(_not_of_orbax)
    return ocp.AsyncCheckpointer(
        ocp.StandardCheckpointHandler(),
        async_options=ocp.options.AsyncOptions(
            timeout_secs=int(TIMEOUT),
            barrier_sync_fn=barrier,
            # Else threads wait 300 s for a folder that can't be made, and the interpreter, at its end, for the threads.
            # Of several items Orbax makes the folders so in any case, which is why it is given the state alone.
            create_directories_asynchronously=False,
        ),
    )


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno < logging.ERROR


class Agreement:
    """What processes tell one another of one save, in JAX's key-value store: a failure at once.

    All processes must make the same ones in the same order.
    """

    def __init__(self) -> None:
        self._prefix = f"sftjax/save/{next(_numbers)}"
        self._client = distributed.global_state.client if jax.process_count() > 1 else None

    def post(self, what: str, text: str = "-") -> None:
        """Say that this process has come so far, or that it "failed", and why."""
        if self._client is not None:
            self._client.key_value_set(f"{self._prefix}/{what}/{jax.process_index()}", text, allow_overwrite=True)

    def wait(self, what: str, count: int, timeout: float = TIMEOUT) -> None:
        """Until `count` processes have said so. Raises: CheckpointError if one has failed."""
        end, pause = time.monotonic() + timeout, 0.02
        while self._client is not None and len(self._said(what)) < count:
            if failed := self._said("failed"):
                raise CheckpointError("; ".join(f"process {p}: {t}" for p, t in failed.items()))
            if time.monotonic() > end:
                raise CheckpointError(f"not all processes wrote their part within {timeout:.0f} s")
            time.sleep(pause)
            pause = min(pause * 1.5, 1.0)

    def barrier(self, *, key: str, timeout_ms: int) -> None:
        """The barrier of Orbax's background threads."""
        self.post(key)
        self.wait(key, jax.process_count(), timeout_ms / 1000)

    def _said(self, what) -> dict[int, str]:
        assert self._client is not None
        found = self._client.key_value_dir_get(f"{self._prefix}/{what}/")
        return {int(key.rpartition("/")[2]): text for key, text in found}
