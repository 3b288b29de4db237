"""A run in its workdir: it holds the lock, and `run.json` says how far it is and how it ended."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from sftjax.errors import LockedError, UserError
from sftjax.files import read_object, write_atomic
from sftjax.parallel import processes
from sftjax.training import stops
from sftjax.training.lock import Lock
from sftjax.training.workdir import make_workdir

NAME = "run.json"


class Run:
    """One run, from its lock to its end; of several processes, process 0 does all of it.

    run.json: state (starting | running | stopped | finished | failed), steps (of the whole run), step (where this start
    began, or ended), best (eval.best) and lower (is less of it better), error (why it failed or stopped), written
    (seconds since 1970).
    """

    def __init__(self, workdir: Path | str, stop: stops.Stop) -> None:
        """Make the workdir and take its lock. Raises, in all processes: LockedError."""
        me, several = stops.group()
        self.workdir, self._lock, problem = make_workdir(workdir), None, ""
        if me == 0:
            try:
                self._lock = Lock(self.workdir)
            except UserError as e:
                if several == 1:
                    raise
                problem = str(e)
        if several > 1:
            problem = processes.gather(problem)[0]
        if problem:
            raise LockedError(problem)
        self._said = read_object(self.workdir / NAME)  # of the last start
        stop.leaving = self._left

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Give the lock back if what is inside fails, and leave run.json: it is another run's."""
        try:
            yield
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        self.say(state="starting", error="")
        return self

    def __exit__(self, kind: object, e: BaseException | None, trace: object) -> None:
        with contextlib.suppress(OSError):  # the error that ended the run is the one to be seen
            if e is None:
                self.say(state="finished")
            elif isinstance(e, KeyboardInterrupt):  # Stopped is one
                self.say(state="stopped", error=str(e).partition(";")[0])
            else:
                self.say(state="failed", error=f"{type(e).__name__}: {e}"[:2000])
        self._release()

    def say(self, **values: Any) -> None:
        """Set values of run.json, those that the class names."""
        self._said |= values | dict(written=time.time())
        if self._lock is not None:
            write_atomic(self.workdir / NAME, json.dumps(self._said, indent=1) + "\n")

    def _left(self, reason: str) -> None:
        """The process ends at once."""
        self.say(state="stopped", error=reason.partition(";")[0])
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
