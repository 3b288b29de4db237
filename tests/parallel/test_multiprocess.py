"""Several processes train as one does; and the loss of one of them ends the others, by its name."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_train import files, losses, make  # noqa: F401 (files is a fixture)

from sftjax import train as train_lib

pytestmark = pytest.mark.multiprocess
REPO = Path(__file__).resolve().parents[2]

RUN = """
import pathlib, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/helpers"]
import test_train
from sftjax import config, exits, train
def main(argv):
    c = test_train.make(pathlib.Path({files!r}))
    for argument in argv[1:]:
        key, value = argument.split("=", 1)
        config.override(c, key, value)
    train.train(c, argv[0])
exits.run(main)
"""


def start(
    files,  # noqa: F811
    workdir,
    process,
    port,
    *overrides,
    processes=2,
    devices=4,
    before="",
    output=None,
):
    """before: code that runs in it first; output: a file for it; port 0: it is the only one."""
    env = os.environ | {
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1",
    }
    code = before + RUN.format(tests=str(REPO / "tests"), files=str(files))
    arguments = [
        f"mesh.coordinator=localhost:{port}",
        f"mesh.processes={processes}",
        f"mesh.process_id={process}",
    ]
    arguments = [*arguments[: 3 * (port > 0)], *overrides]
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir), *arguments],
        env=env, stdout=open(output, "w") if output else subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_all(files, workdir, *overrides, processes=2, **options):  # noqa: F811
    """The outputs of all processes of a run, by the id."""
    port = free_port() if processes > 1 else 0
    options["processes"] = processes
    all_ = [start(files, workdir, i, port, *overrides, **options) for i in range(processes)]
    outputs = [p.communicate(timeout=600)[0] for p in all_]
    assert [p.returncode for p in all_] == [0] * processes, "\n----\n".join(outputs)
    return outputs


def resume_at(run, step, other):
    """A copy of a run's workdir whose last checkpoint is of that step."""
    shutil.copytree(run, other)
    for folder in (other / "checkpoints").iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    assert (other / "checkpoints" / str(step)).is_dir()
    return other


def close(one, two):
    """The loss and the gradient's norm of each step: other batches would give quite others."""
    assert one.keys() == two.keys() and len(one) == 12
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)


def test_two_processes_equal_one(files, tmp_path):  # noqa: F811
    one = train_lib.train(make(files, mesh__fsdp=4, mesh__tensor=2), tmp_path / "one")
    outputs = run_all(files, tmp_path / "two", "mesh.fsdp=4", "mesh.tensor=2")
    assert "After 12 steps" in outputs[0] and "After 12 steps" not in outputs[1]
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    for k, v in one["after"]["losses"].items():
        np.testing.assert_allclose(result["after"]["losses"][k], v, rtol=1e-4)
    files_one, files_two = (sorted(p.name for p in (tmp_path / w / "export").iterdir()) for w in ("one", "two"))
    assert files_one == files_two


def test_a_run_of_two_processes_is_resumed_by_one_on_another_mesh(files, tmp_path):  # noqa: F811
    """The last checkpoint of two processes is removed; one process does those steps again."""
    run_all(files, tmp_path / "run", "mesh.fsdp=4", "mesh.tensor=2")
    two = losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    train_lib.train(make(files, mesh__data=2, mesh__fsdp=4), tmp_path / "run")
    one = losses(tmp_path / "run")
    assert one.keys() == two.keys() and one[9] == two[9]
    np.testing.assert_allclose(list(one.values()), list(two.values()), rtol=1e-5)


def test_a_missing_process_is_named(files, tmp_path):  # noqa: F811
    process = start(files, tmp_path / "run", 0, free_port(), "mesh.timeout=10")
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "after 10 s, process 1 of 2 has not come" in output and "Traceback" not in output
    alone = start(files, tmp_path / "run", 1, free_port(), "mesh.timeout=5")
    output = alone.communicate(timeout=300)[0]
    assert alone.returncode == 1
    assert "process 1 of 2 found no complete group at localhost" in output


@pytest.mark.parametrize(
    "processes", [2, pytest.param(4, marks=pytest.mark.long)]
)  # one device in each of four, two in each of two
def test_micro_batches_and_packed_rows_of_several_processes(files, tmp_path, processes):  # noqa: F811
    options = ["train.micro_batches=2", "data.packing=wrapped", "mesh.data=2", "mesh.fsdp=2"]
    run_all(files, tmp_path / "one", *options, processes=1)
    devices = 4 // processes
    run_all(files, tmp_path / "all", *options, processes=processes, devices=devices)
    close(losses(tmp_path / "one"), losses(tmp_path / "all"))


@pytest.mark.long
def test_a_run_goes_on_on_other_meshes_and_with_more_processes(files, tmp_path):  # noqa: F811
    """Eight devices, then four of two processes, then one; fsdp becomes tensor and data."""
    keep = "train.keep=9"
    train_lib.train(make(files, mesh__fsdp=8, train__keep=9), tmp_path / "8")
    whole = losses(tmp_path / "8")
    second = resume_at(tmp_path / "8", 3, tmp_path / "4")
    output, _ = run_all(files, second, keep, "mesh.tensor=2", "mesh.fsdp=2", devices=2)
    assert "resumed   step 3 of" in output
    close(whole, losses(second))
    third = resume_at(second, 6, tmp_path / "1")
    [output] = run_all(files, third, keep, processes=1, devices=1)
    assert "resumed   step 6 of" in output and "devices   1 x cpu" in output
    close(whole, losses(third))


# --- a process that is lost, and one that is slow ---

# Each goes on in every step, so that the process is killed in it.
OFTEN = {
    "save": ["train.checkpoint_every=1 steps", "train.keep=1"],
    "evaluation": ["eval.every=1 steps"],
}


def wait_for(text, path, processes, seconds=300):
    """Until a file has the text; the time of it."""
    deadline = time.monotonic() + seconds
    while not re.search(text, path.read_text(errors="replace")):
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.02)


@pytest.mark.parametrize(
    "moment, processes, victim",
    [
        ("step", 2, 1),
        ("compile", 2, 0),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [
                *(("step", 2, 0), ("compile", 2, 1), ("save", 2, 0), ("save", 2, 1)),
                *(("evaluation", 2, 0), ("evaluation", 2, 1)),
                *(("step", 4, 0), ("step", 4, 2), ("save", 4, 3)),
            ]
        ),
    ],
)
def test_a_killed_process_is_named(files, tmp_path, moment, processes, victim):  # noqa: F811
    port = free_port()
    options = [
        "train.duration=5000 steps",
        "train.checkpoint_every=0",
        "eval.every=0",
        "data.test=",
    ]
    options += OFTEN.get(moment, [])
    all_ = [
        start(files, tmp_path / "run", i, port, *options, processes=processes, devices=1,
              output=tmp_path / f"{i}.txt")
        for i in range(processes)
    ]  # fmt: skip
    mark = "state     " if moment == "compile" else "step 5/"
    wait_for(mark, tmp_path / "0.txt", all_)
    assert listens(port) <= {"127.0.0.1", "::1"} and listens(port)
    all_[victim].send_signal(signal.SIGKILL)
    for i, process in enumerate(all_):
        if i != victim:
            assert process.wait(timeout=10) == 1
            *_, last = lines = (tmp_path / f"{i}.txt").read_text().splitlines()
            said = f"ProcessError: process {victim} of {processes}, on {socket.gethostname()}, is gone"
            assert last.startswith(said) and "go" in last, lines[-20:]
            noise = ("Traceback", "is gone", "Terminating", "preemption", "coordination", "***")
            assert not [x for x in lines[:-1] if any(n in x for n in noise)]


def listens(port):
    """The addresses at which this machine listens at a port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            address, number = line.split()[1].split(":")
            if int(number, 16) == port and line.split()[3] == "0A":
                words = [bytes.fromhex(address[n : n + 8])[::-1] for n in range(0, len(address), 8)]
                family = socket.AF_INET if name == "tcp" else socket.AF_INET6
                found.add(socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:"))
    return found


def test_a_slow_process_is_named(files, tmp_path):  # noqa: F811
    slow = """
import sys, time
if "mesh.process_id=1" in sys.argv:
    from sftjax.training import data
    put = data.Feed.put
    data.Feed.put = lambda *arguments: (time.sleep(0.3), put(*arguments))[1]
"""
    one, other = run_all(files, tmp_path / "run", before=slow, devices=1)
    assert one.count("is slow") == 1 and "is slow" not in other
    assert re.search(r"process 1 of 2, on \S+, is slow: in 3 lines of the log its own part", one)
