"""Two processes of four devices each train as one process of eight does."""

import json
import os
import socket
import subprocess
import sys
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


def start(files, workdir, process, port, *overrides, processes=2):  # noqa: F811
    env = os.environ | {
        "PYTHONPATH": str(REPO),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    code = RUN.format(tests=str(REPO / "tests"), files=str(files))
    arguments = [
        f"mesh.coordinator=localhost:{port}",
        f"mesh.processes={processes}",
        f"mesh.process_id={process}",
        *overrides,
    ]
    return subprocess.Popen(
        [sys.executable, "-c", code, str(workdir), *arguments],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def run_both(files, workdir, *overrides):  # noqa: F811
    port = free_port()
    both = [start(files, workdir, i, port, *overrides) for i in range(2)]
    outputs = [p.communicate(timeout=600)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], "\n----\n".join(outputs)
    return outputs


def test_two_processes_equal_one(files, tmp_path):  # noqa: F811
    one = train_lib.train(make(files, mesh__fsdp=4, mesh__tensor=2), tmp_path / "one")
    outputs = run_both(files, tmp_path / "two", "mesh.fsdp=4", "mesh.tensor=2")
    assert "After 12 steps" in outputs[0] and "After 12 steps" not in outputs[1]
    a, b = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert a.keys() == b.keys()
    np.testing.assert_allclose(list(a.values()), list(b.values()), rtol=1e-5)
    result = json.loads((tmp_path / "two" / "result.json").read_text())
    for k, v in one["after"]["losses"].items():
        np.testing.assert_allclose(result["after"]["losses"][k], v, rtol=1e-4)
    files_one, files_two = (
        sorted(p.name for p in (tmp_path / w / "export").iterdir()) for w in ("one", "two")
    )
    assert files_one == files_two


def test_a_run_of_two_processes_is_resumed_by_one_on_another_mesh(files, tmp_path):  # noqa: F811
    """The last checkpoint of two processes is removed; one process does those steps again."""
    import shutil

    run_both(files, tmp_path / "run", "mesh.fsdp=4", "mesh.tensor=2")
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
