"""Stops: a signal ends the loop after a step that all processes share, with a checkpoint.

What asks for a stop, and what becomes of it: docs/runs.md.

Python runs a signal's handler between two of its own instructions, which a compilation or a collective keeps it from
for minutes. So a thread is told of the signal too (signal.set_wakeup_fd): it prints, counts, and ends the process where
the main thread does not.

A process that is asked to stop tells the others by a key of JAX's coordination service, and they agree in threads on
the step after the latest that any of them has reached: the loop asks a flag, and waits for nobody. JAX's own notice
(`reached_preemption_sync_point`) goes by the same rule.
"""

import contextlib
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import jax
from jax._src import distributed  # its client has no public name; Orbax takes it from here too
from jax.experimental import multihost_utils

from sftjax.errors import Stopped
from sftjax.parallel import processes
from sftjax.terminal import show

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ELSEWHERE = 5.0  # seconds for leaving where there is nothing to save
_TICK = 0.5  # seconds between two looks at what other processes say
_SAME = 0.3  # seconds in which signals are one: GNU timeout sends its signal twice
_numbers = itertools.count()  # of stops; the same in each process, for keys that no other run has


def group() -> tuple[int, int]:
    """(this process's id, how many there are), known without starting any device."""
    state = distributed.global_state
    return (0, 1) if state.client is None else (state.process_id or 0, state.num_processes or 1)


class Stop:
    """Whether this run is asked to stop, and after which step it may.

    As a context manager in the main thread, it takes SIGTERM and SIGINT until its end, but for one that the process was
    started to ignore; else it knows of JAX's notice and of `ask` alone.

    Attributes:
      asked: by what the run is asked to stop, "SIGTERM"; "" = it is not.
      grace: seconds that a stop may take.
      leaving: called with the reason, for a second at most, before the process is ended at once.
    """

    def __init__(self) -> None:
        self.asked, self.grace = "", 120.0
        self.leaving: Callable[[str], object] = lambda reason: None
        self._key = f"sftjax/stop/{next(_numbers)}"
        self._several = self._holding = self._raised = False
        self._counter = -1  # the last step that the loop has asked about; -1 = it has not begun
        self._at: int | None = None  # several processes: the step that they have agreed on
        self._agreeing = threading.Lock()  # held while they agree: the counter must not move
        self._once = threading.Lock()  # taken by the first who begins the stop
        self._deadline = float("inf")
        self._old: dict[int, Any] = {}  # signal: its handler before
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    # ---- signals ----

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        self._old = {s: old for s in SIGNALS if (old := signal.getsignal(s)) != signal.SIG_IGN}
        self._old_fd = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._old_hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._thread = threading.Thread(target=self._watch, name="sftjax stop", daemon=True)
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread is None:
            return
        for number, old in self._old.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: not Python's
        signal.set_wakeup_fd(self._old_fd)
        sys.unraisablehook = self._old_hook
        self._closed.set()
        os.write(self._pipe[1], b"\0")  # wakes the thread
        self._thread.join()
        self._thread = None
        for end in self._pipe:
            os.close(end)

    def listen(self) -> None:
        """Take the signals, inside `with`; again when JAX's runtime, which takes SIGTERM, is up."""
        self._several = group()[1] > 1  # not before: what asks a client that connects is ended
        if self._thread is not None:
            for number in self._old:
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        """In the main thread: end it here, where one process has nothing to save."""
        self.asked = self.asked or signal.Signals(number).name
        if not (self._several or self._holding or self._raised):
            self._raised = True
            raise Stopped(self._nothing_saved())

    def _unraisable(self, what: Any) -> None:
        """Say nothing of a Stopped that Python swallows, which `hold` raises again."""
        if what.exc_type is not Stopped:
            self._old_hook(what)

    def _watch(self) -> None:
        """The thread: signals, the notice of other processes, and the end of the grace time."""
        first = 0.0  # when the first signal came
        while not self._closed.is_set():
            ready, _, _ = select.select([self._pipe[0]], [], [], _TICK)
            for number in os.read(self._pipe[0], 64) if ready else b"":
                if number not in self._old:  # somebody else's signal
                    continue
                name = signal.Signals(number).name
                first = first or time.monotonic()
                if time.monotonic() > first + _SAME:
                    self._leave(128 + number, f"at once, by a second signal ({name})")
                self.ask(name)
            self._hear()
            if time.monotonic() > self._deadline and not self._closed.is_set():
                said = f"by {self.asked}, after {self.grace:g} s" if self._holding else ""
                self._leave(Stopped.status, said or self._nothing_saved())

    # ---- asking and agreeing ----

    def ask(self, reason: str) -> None:
        """Ask the run, or one process of it, to stop after this step, and say why."""
        self.asked = self.asked or reason
        if not self._once.acquire(blocking=False):
            return
        if self._holding and group()[0] == 0:
            line = f"stopping  by {self.asked}: a checkpoint follows the present step; a second"
            show("\n" * sys.stderr.isatty() + f"{line} signal ends it at once", file=sys.stderr)
        wait = self.grace if self._holding or self._several else min(ELSEWHERE, self.grace)
        self._deadline = time.monotonic() + wait
        if self._several:
            threading.Thread(target=self._agree, name="sftjax agree", daemon=True).start()

    def _hear(self) -> None:
        """Ask too, where another process has been asked."""
        client = distributed.global_state.client
        if client is None or self.asked or not self._several:
            return
        with contextlib.suppress(Exception):  # there is no such key yet, or nobody to ask
            self.ask(client.key_value_try_get(f"{self._key}/by"))

    def _agree(self) -> None:
        """Agree on a step with all; if one has not begun its loop, or has ended it, all end now."""
        client, (me, _) = distributed.global_state.client, group()
        assert client is not None
        try:
            with self._agreeing:
                client.key_value_set(f"{self._key}/by", self.asked, allow_overwrite=True)
                client.key_value_set(f"{self._key}/at/{me}", str(self._counter))
                client.wait_at_barrier(f"{self._key}/agreed", int(1000 * self.grace))
                counters = [int(value) for _, value in client.key_value_dir_get(f"{self._key}/at/")]
                self._at = max(counters) + 1
        except Exception:  # one has ended already; without it no step comes to its end
            self._deadline = min(self._deadline, time.monotonic() + ELSEWHERE)
            return
        if min(counters) < 0 or not self._holding:
            self._leave(Stopped.status, self._nothing_saved())

    # ---- what the loop asks ----

    def hold(self, step: int) -> None:
        """From here on a stop waits for the end of a step. step: the last one that is done."""
        self._counter, self._holding = step, True
        if self.asked and not self._several:  # a signal whose exception somebody has swallowed
            self._raised = True
            raise Stopped(self._nothing_saved())

    def due(self, step: int) -> bool:
        """Must the run stop after this step, and save? Asked once a step, by all processes."""
        with self._agreeing:
            self._counter = step
            if self._at == step or (self.asked and not self._several):
                return True
        # jax adds its options to its class as it is imported, so its types have none of them.
        enabled = getattr(jax.config, "jax_enable_preemption_service", True)
        if enabled and multihost_utils.reached_preemption_sync_point(step):
            self.asked = self.asked or "a preemption notice"
            return True
        return False

    def release(self, step: int, steps: int, saved: int | None) -> None:
        """End of the loop after `step` of `steps`; raises Stopped if asked to. saved: the newest checkpoint's step."""
        self._holding = False
        if not self.asked:
            return
        self._raised = True
        done = f"by {self.asked} after step {step} of {steps}"
        again = f"start the same command again to go on from the checkpoint of step {saved}"
        if self._several and step >= steps and self._at != step:
            self._leave(Stopped.status, f"{done}; {again}")  # others may not have come so far
        raise Stopped("" if group()[0] else f"{done}; {again}")

    def _nothing_saved(self) -> str:
        return f"by {self.asked}, outside the training loop: no step is lost; start the same command again to go on"

    def _leave(self, status: int, how: str) -> None:
        """End the process here and now; checkpoints that are not complete do not count."""
        me = group()[0]
        if me == 0 or status != Stopped.status:
            show("\n" * sys.stderr.isatty() + f"Stopped: {how}", file=sys.stderr)
        last = threading.Thread(target=self.leaving, args=(how,), daemon=True)
        last.start()
        last.join(1.0)
        processes.done()
        if self._several and me == 0 and status == Stopped.status:
            time.sleep(1.0)  # the others' connection is to us; they end first
        os._exit(status)
