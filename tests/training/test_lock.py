"""One run a workdir: whose the lock is, when it is stale, and that reading takes nothing."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from sftjax.errors import LockedError, UserError
from sftjax.training import lock as lock_lib
from sftjax.training.lock import Lock, holder

HOLD = """
import sys, time, pathlib
from sftjax.training.lock import Lock
lock = Lock(pathlib.Path(sys.argv[1]))
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the lock of tmp_path."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def write(tmp_path, age=0.0, **changes):
    """A lock file that nobody holds, of this process unless changed, `age` seconds old."""
    path = tmp_path / "lock"
    path.write_text(json.dumps(lock_lib._mine() | changes))
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_the_second_is_refused_and_told_who_when_and_where(tmp_path, other):
    with pytest.raises(LockedError) as e:
        Lock(tmp_path)
    started = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    host = re.escape(os.uname().nodename)
    expected = rf"a run goes on there, process {other.pid} on host {host}, started {started} "
    assert re.search(expected, str(e.value)) and f"(lock file {tmp_path}/lock)" in str(e.value)
    assert holder(tmp_path)[1] and holder(tmp_path)[0]["pid"] == other.pid


def test_a_killed_process_loses_it_and_that_is_said(tmp_path, other, capsys):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / "lock").exists() and not holder(tmp_path)[1]
    Lock(tmp_path).release()
    told = capsys.readouterr().out
    assert told.startswith("lock      ") and told.count("\n") == 1
    assert f"was left by process {other.pid} on host" in told


def test_a_lock_is_given_back_and_taken_again_without_a_word(tmp_path, capsys):
    for _ in range(2):
        lock = Lock(tmp_path)
        with pytest.raises(LockedError):  # by this process too
            Lock(tmp_path)
        lock.release()
        lock.release()
        assert not (tmp_path / "lock").exists() and holder(tmp_path) == ({}, False)
    assert capsys.readouterr().out == ""


def test_reading_takes_nothing(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(fcntl, "flock", lambda *a: pytest.fail("a reader must not lock"))
    assert holder(tmp_path)[1]


def test_the_id_of_a_dead_process_may_be_anothers(tmp_path):
    write(tmp_path, ticks=lock_lib._ticks(os.getpid()) + 1)
    assert not holder(tmp_path)[1]


def test_after_a_reboot_it_is_stale(tmp_path, capsys):
    """Its flock is gone, and nobody has renewed it since."""
    write(tmp_path, age=lock_lib.STALE + 1, machine="another boot")
    Lock(tmp_path).release()
    assert "has ended: taken" in capsys.readouterr().out


def test_another_host_that_renews_it_is_believed(tmp_path, monkeypatch):
    """A file system that keeps flock for each machine alone: ours says nothing of theirs."""
    path = write(tmp_path, machine="another", host="far", pid=71)
    monkeypatch.setattr(lock_lib, "STALE", 20)
    renew = threading.Timer(0.2, os.utime, [path])
    renew.start()
    with pytest.raises(LockedError, match="process 71 on host far"):
        Lock(tmp_path)
    renew.join()
    assert holder(tmp_path)[1] and json.loads(path.read_text())["pid"] == 71


def test_another_host_that_does_not_is_not(tmp_path, monkeypatch, capsys):
    write(tmp_path, machine="another", host="far", pid=71)
    monkeypatch.setattr(lock_lib, "STALE", 0.2)
    Lock(tmp_path).release()
    told = capsys.readouterr().out
    assert "to see whether that run goes on" in told and "left by process 71 on host far" in told


@pytest.mark.parametrize("lives", [True, False])
def test_without_flock_the_process_decides(tmp_path, monkeypatch, lives):
    def none(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", none)
    write(tmp_path, pid=os.getpid() if lives else 2**22 + 1)
    if lives:
        with pytest.raises(LockedError, match=f"process {os.getpid()}"):
            Lock(tmp_path)
    else:
        Lock(tmp_path).release()


@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"pid": "x", "started": {}}', "\0\xff"])
def test_a_torn_lock_that_nobody_holds_is_taken(tmp_path, text, monkeypatch):
    monkeypatch.setattr(lock_lib, "STALE", 0.1)
    (tmp_path / "lock").write_text(text, encoding="latin-1")
    lock = Lock(tmp_path)
    assert holder(tmp_path)[0]["pid"] == os.getpid()
    lock.release()


def test_a_lock_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(UserError, match="the lock .*/lock cannot be written"):
        Lock(tmp_path)


def test_it_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_lib, "RENEW", 0.02)
    lock = Lock(tmp_path)
    os.utime(tmp_path / "lock", (1, 1))
    deadline = time.monotonic() + 20
    while (tmp_path / "lock").stat().st_mtime < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
