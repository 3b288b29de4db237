"""Checkpoints of processes that end in every way: full disks, kills, failed saves, two of them."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checkpoint import abstract_like, assert_same, make_state, raw, run_python, spoiled

from sftjax.training.checkpoint import Checkpointer

FULL_DISK = """
import logging, resource, signal, sys, time
logging.basicConfig(stream=sys.stdout, format="%(message)s", force=True)
import jax.numpy as jnp, numpy as np
from sftjax.training.checkpoint import Checkpointer, CheckpointError
noise = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32))
ckpt = Checkpointer({path!r}, keep=1)
ckpt.save(1, {{"x": noise}})
ckpt.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
ckpt.save(2, {{"x": noise + 1}})
try:
    {then}
except CheckpointError as e:
    print(e)
try:
    ckpt.close()
except CheckpointError as e:
    print(e)
"""

ENDS = {
    "close": "ckpt.close()",
    "next save": 'ckpt.save(3, {"x": noise})',
    "check": "[(time.sleep(0.1), ckpt.check()) for _ in range(30)]",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_full_disk_is_reported_and_the_good_checkpoint_stays(tmp_path, end):
    # A limit on the size of files stands for a disk that fills while the save runs.
    done = run_python(FULL_DISK.format(path=str(tmp_path), then=ENDS[end]))
    assert "checkpoint of step 2" in done.stdout and "was not written: " in done.stdout
    assert "newest complete one there: step 1" in done.stdout
    assert len(done.stdout.splitlines()) < 10 and "Traceback" not in done.stdout
    assert "Traceback" not in done.stderr  # Orbax's threads have nothing to say beside
    with closing(Checkpointer(tmp_path)) as ckpt:
        assert ckpt.all_steps() == [1]
        got, _ = ckpt.restore({"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
    assert np.array_equal(got["x"], np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32))


SAVE_FOREVER = """
import sys, itertools
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, make_state
ckpt = Checkpointer({path!r}, keep=2)
for step in itertools.count((ckpt.latest_step() or 0) + 1):
    ckpt.save(step, make_state(step), {{"row": step * 10}})
"""


def test_kill_9_leaves_complete_checkpoints(tmp_path):
    code = SAVE_FOREVER.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    reached = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], env=env)
        wait_for_step(tmp_path, reached + 3, process)
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        copied = Path(shutil.copytree(tmp_path, f"{tmp_path}-{reached}"))
        with closing(Checkpointer(copied)) as ckpt:
            reached, steps = ckpt.latest_step(), ckpt.all_steps()
            for step in reversed(steps):
                got, extra = ckpt.restore(abstract_like(make_state()))
                assert_same(got, make_state(step))
                assert extra == {"row": step * 10}
                shutil.rmtree(copied / str(step))


FAULTS = """
import logging, os, shutil, sys, threading, time
import jax.numpy as jnp
from sftjax.training.checkpoint import Checkpointer, CheckpointError, disk
logging.basicConfig(stream=sys.stdout, format="%(message)s", force=True)
ckpt = Checkpointer({path!r}, keep=1)
x = jnp.ones((300, 300))
ckpt.save(1, {{"x": x}})
ckpt.wait()
mkdir, good = os.mkdir, disk.seal

def refuse(path, *args, **kwargs):
    if {part!r} in str(path):
        raise PermissionError(13, "Permission denied", str(path))
    mkdir(path, *args, **kwargs)

def full(folder):
    raise OSError(28, "No space left on device")

{fault}
try:
    for step in range(2, 9):
        ckpt.save(step, {{"x": x}})
        while ckpt._thread and ckpt._thread.is_alive():
            time.sleep(0.01)
        ckpt.check()
        print("trained on after", step, "there:", ckpt.all_steps())
        if step == 3 and {mended}:
            os.mkdir, disk.seal = mkdir, good
except CheckpointError as e:
    print("ERROR", e)
print("threads:", [t.name for t in threading.enumerate() if not t.daemon and "save" in t.name])
"""


@pytest.mark.parametrize(
    "fault, part, reason",
    [
        ("os.mkdir = refuse", ".saving", "Permission denied"),
        ("os.mkdir = refuse", "orbax", "Permission denied"),  # Orbax's own folder
        ("disk.seal = full", "", "No space left on device"),
        ("shutil.rmtree({path!r})", "", "the directory is gone: it was deleted"),
    ],
)
def test_failed_saves_are_tried_again_and_the_third_in_a_row_ends_the_run(tmp_path, fault, part, reason):
    path = str(tmp_path / "c")
    options = dict(path=path, part=part, fault=fault.format(path=path))
    code = FAULTS.format(**options, mended=False)
    began = time.monotonic()
    done = run_python(code, XLA_FLAGS="")
    assert time.monotonic() - began < 60  # no thread waits the 300 s that Orbax gives a folder
    said = done.stdout.splitlines()
    failed = [line for line in said if "was not written" in line]
    assert len(failed) == 3 and all(f"was not written: {reason}" in line for line in failed)
    assert failed[-1].startswith("ERROR checkpoint of step 4")
    assert "3 saves in a row have failed" in done.stdout and said[-1] == "threads: []"
    assert "if it fails too, the run ends" in done.stdout and "Traceback" not in done.stderr
    if "rmtree" not in fault:
        assert os.listdir(path) == ["1"]  # the good one, and nothing of the failed ones
        done = run_python(FAULTS.format(**options | dict(path=path + "2"), mended=True))
        assert "trained on after 8 there: [8]" in done.stdout and "ERROR" not in done.stdout


def wait_for_step(path, step, process, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if any(d.name.isdecimal() and int(d.name) >= step for d in path.iterdir()):
            return
        time.sleep(0.01)
    pytest.fail(f"no step {step} after {seconds} s; the saving process: {process.poll()}")


TWO_PROCESSES = """
import sys, jax
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, abstract_like, closing, make_state
from test_checkpoint_ends import assert_same_here
assert jax.device_count() == 4 and jax.local_device_count() == 2
state = make_state(3, jax.devices(), (4,))
manifest = {{"identity": {{"model": "a"}}}}
with closing(Checkpointer({path!r}, keep=1, manifest=manifest)) as ckpt:
    ckpt.save(2, state, {{"row": 1}})
    ckpt.save(3, state, {{"row": 2}})
    ckpt.wait()
    target = abstract_like(make_state(0, jax.devices(), (2, 2)))
    got, extra = ckpt.restore(target)
    assert extra["row"] == 2 and ckpt.all_steps() == [3]
    assert_same_here(got, make_state(3, jax.devices(), (2, 2)))
print("same")
"""


ONE_FAILS = """
import logging, resource, signal, sys, time
import jax
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, CheckpointError, abstract_like, disk, make_state
from test_checkpoint_ends import assert_same_here, make_noise, spoil_one
logging.basicConfig(stream=sys.stdout, format="%(message)s", force=True)
me = jax.process_index()
state = make_state(3, jax.devices(), (4,))
noise = make_noise(state.params["mlp"]["w"].sharding)
ckpt = Checkpointer({path!r}, keep=3)
ckpt.save(1, state, {{"row": 1}})
ckpt.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if me == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
began = time.monotonic()
ckpt.save(2, {{"x": noise}})
try:
    ckpt.wait()
except CheckpointError as e:
    assert "File too large" in str(e), e
else:
    raise AssertionError
assert time.monotonic() - began < 30, time.monotonic() - began
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert ckpt.all_steps() == [1]
for step in (3, 4):
    ckpt.save(step, make_state(step, jax.devices(), (4,)), {{"row": step}})
ckpt.wait()
assert ckpt.all_steps() == [1, 3, 4]
if me == 0:
    spoil_one({path!r})
jax.experimental.multihost_utils.sync_global_devices("spoiled")
got, extra = ckpt.restore(abstract_like(state))
assert extra == {{"row": 3}} and ckpt.all_steps() == [1, 3]
assert_same_here(got, make_state(3, jax.devices(), (4,)))
ckpt.close()
print("same")
"""


def make_noise(sharding):
    draw = lambda: jax.random.normal(jax.random.key(0), (1024, 1024))  # noqa: E731
    return jax.jit(draw, out_shardings=sharding)()


def spoil_one(path):
    spoiled(Path(path) / "4", "a bit")


def assert_same_here(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        for s, t in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert s.index == t.index and raw(s.data).tobytes() == raw(t.data).tobytes()


def run_two(code):
    """Run the code in two processes; both must end with the line "same"."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    code = code.replace("ADDRESS", address)
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    ends = [process.communicate(timeout=90) for process in processes]
    for process, (out, err) in zip(processes, ends, strict=True):
        assert process.returncode == 0 and "same" in out.splitlines(), out + err
    return [out for out, _ in ends]


@pytest.mark.multiprocess
def test_two_processes_save_one_checkpoint_that_one_process_restores(tmp_path):
    tests = str(Path(__file__).parent)
    run_two(TWO_PROCESSES.format(address="ADDRESS", tests=tests, path=str(tmp_path)))
    with closing(Checkpointer(tmp_path)) as ckpt:
        got, extra = ckpt.restore(abstract_like(make_state()))
    assert_same(got, make_state(3))
    assert extra["row"] == 2 and extra["manifest"]["identity"] == {"model": "a"}


@pytest.mark.multiprocess
def test_a_process_that_fails_fails_the_save_of_all_at_once_and_all_take_the_same_one(tmp_path):
    tests = str(Path(__file__).parent)
    outs = run_two(ONE_FAILS.format(address="ADDRESS", tests=tests, path=str(tmp_path)))
    assert ["damaged" in out for out in outs] == [True, False]  # process 0 says it
