"""The lock of a workdir: one run at a time.

It is an flock on `workdir/lock`, which says in JSON whose it is. Where a file system keeps none for all its machines,
the file's time decides about a process of another machine, and its process id about one of this machine: docs/runs.md.
This module loads no JAX: `sftjax status` uses it too.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from sftjax.errors import LockedError, writing
from sftjax.files import parse_object
from sftjax.terminal import show

RENEW = 10.0  # seconds between two renewals
STALE = 30.0  # seconds without one, after which a process of another machine is taken for dead
NAME = "lock"


class Lock:
    """A taken lock; `release` gives it back."""

    def __init__(self, workdir: Path) -> None:
        """Take the lock of a workdir, or one that a dead process left. Raises: LockedError."""
        self.path = workdir / NAME
        self._file, flocked = _open(self.path)
        try:
            left = parse_object(self._file.read())
            if left and (_machine() != left.get("machine") or not flocked):
                _check_left(self.path, left)
            if left:
                show(f"{'lock':<10}{self.path} was left by {whose(left)}, which has ended: taken")
            self._file.seek(0)
            self._file.truncate()
            self._file.write(json.dumps(_mine(), indent=1) + "\n")
            self._file.flush()
        except BaseException:
            self._file.close()
            raise
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="sftjax lock", daemon=True).start()

    def _renew(self) -> None:
        while not self._released.wait(RENEW):
            with contextlib.suppress(OSError, ValueError):  # ValueError: closed meanwhile
                os.utime(self._file.fileno())

    def release(self) -> None:
        """Give the lock back; nothing the second time."""
        if not self._released.is_set():
            self._released.set()
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self.path), os.fstat(self._file.fileno())):
                    self.path.unlink()  # while it is ours
            self._file.close()


def _open(path: Path) -> tuple[TextIO, bool]:
    """(the file, is the flock ours); False where the file system has none."""
    while True:
        with writing("the lock", path):
            file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
        file.seek(0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            flocked = True
        except BlockingIOError:
            holder = parse_object(file.read())
            file.close()
            raise _locked(path, holder) from None
        except OSError:
            flocked = False
        with contextlib.suppress(FileNotFoundError):  # its holder took it away as we opened it
            if os.path.samestat(os.stat(path), os.fstat(file.fileno())):
                return file, flocked
        file.close()


def _check_left(path: Path, left: dict) -> None:
    """Raise LockedError if the process that wrote a lock, whose flock tells nothing, may live."""
    here = _lives_here(left)
    if here is None:
        renewed = path.stat().st_mtime
        with tempfile.TemporaryFile(dir=path.parent) as probe:  # the file system's own clock
            age = os.fstat(probe.fileno()).st_mtime - renewed
        if age < STALE:
            show(f"{'lock':<10}{path} is of {whose(left)}: {STALE:.0f} s to see whether that run goes on")
            end = time.monotonic() + STALE
            while not here and time.monotonic() < end:
                time.sleep(0.5)
                here = path.stat().st_mtime != renewed
    if here:
        raise _locked(path, left)


def _locked(path: Path, holder: dict) -> LockedError:
    return LockedError(
        f"--workdir={path.parent}: a run goes on there, {whose(holder)} (lock file {path}); wait"
        " for its end, stop it, or use another workdir"
    )


def whose(lock: dict[str, Any]) -> str:
    """The process that a lock names: "process 71 on host a, started 2026-01-31 12:00:00"."""
    if not lock:
        return "a process that has not written its name"
    known = [f"process {lock.get('pid')} on host {lock.get('host')}"]
    with contextlib.suppress(TypeError, ValueError, OverflowError, OSError, KeyError):
        known += [f"started {datetime.fromtimestamp(lock['started']):%Y-%m-%d %H:%M:%S}"]
    return ", ".join(known)


def holder(workdir: Path) -> tuple[dict[str, Any], bool]:
    """(what the lock of a workdir says, does that process live); ({}, False) without one."""
    path = workdir / NAME
    try:
        lock = parse_object(path.read_text("utf-8", "replace"))
        age = time.time() - path.stat().st_mtime
    except OSError:
        return {}, False
    here = _lives_here(lock)
    return lock, age < STALE if here is None else here


def _mine() -> dict[str, Any]:
    """What we write into our lock; started: seconds since 1970."""
    return dict(
        pid=os.getpid(),
        host=socket.gethostname(),
        started=time.time(),
        command=sys.argv,
        machine=_machine(),
        ticks=_ticks(os.getpid()),
    )


def _machine() -> str:
    """Within what a process id means one process: a boot of a kernel, and a container of it."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()  # no Linux


def _ticks(pid: int) -> int:
    """When a process began, in the kernel's ticks: its id may be another's later. 0 = unknown."""
    try:
        # The name, in brackets, may hold blanks; the 22nd field is the 20th after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _lives_here(lock: dict) -> bool | None:
    """Does the process of a lock live; None if it is not of this machine."""
    pid = lock.get("pid")
    if lock.get("machine") != _machine() or not isinstance(pid, int) or pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return not lock.get("ticks") or _ticks(pid) == lock["ticks"]
