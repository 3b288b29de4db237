"""`sftjax status`: where a run stands, from files that may be torn."""

import json
import os
import subprocess
import sys
import time

import pytest

from sftjax.errors import NotFoundError
from sftjax.reports import status as status_lib
from sftjax.reports.status import status, text
from sftjax.training.checkpoint import disk
from sftjax.training.lock import Lock

LINE = dict(loss=2.0, lr=1e-3, tokens_per_s=1000.0, step_time=0.5)


def checkpoint(workdir, step):
    for part in status_lib.PARTS:
        path = workdir / "checkpoints" / str(step) / part
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * 500)


@pytest.fixture
def workdir(tmp_path):
    """A run of 20 steps that stopped after 12, with the best loss at 8."""
    (tmp_path / "config.json").write_text(json.dumps({"eval": {"best": "a/loss"}}))
    said = dict(state="stopped", error="by SIGTERM after step 12 of 20", step=12, steps=20)
    (tmp_path / "run.json").write_text(json.dumps(said | dict(best="a/loss", lower=True)))
    lines = [dict(step=n, **LINE, **{"loss/x": 1.0}) for n in range(1, 13)]
    lines += [{"step": n, "a/loss": loss, "a/accuracy": 0.5} for n, loss in ((4, 3), (8, 1), (12, 2))]
    lines.sort(key=lambda line: line["step"])
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in (8, 12):
        checkpoint(tmp_path, step)
    return tmp_path


def said(workdir, **values):
    path = workdir / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_stopped_run(workdir):
    found = status(workdir)
    assert time.time() - found.pop("written") < 60
    assert found == dict(
        workdir=str(workdir),
        state="stopped",
        detail="by SIGTERM after step 12 of 20; resumable from step 12",
        step=12,
        steps=20,
        logged=12,
        loss=2.0,
        tokens_per_s=1000.0,
        eta=None,
        evaluated=12,
        evaluation={"a/loss": 2, "a/accuracy": 0.5},
        best={"a/loss": {"value": 1, "step": 8}},
        checkpoints=dict(steps=[8, 12], newest=12, best=8, bytes=2000),
        export=False,
        notes=[],
    )
    page = text(status(workdir)).splitlines()
    assert page[0].startswith("state     stopped at step 12 (by SIGTERM")
    assert page[1] == "step      12/20  loss 2.0000  tok/s 1,000"
    assert "best      a/loss 1 at step 8" in page
    assert "saved     newest of step 12, best of step 8; 0.002 MB" in page
    assert page[-1] == "export    not there"


def test_a_run_that_goes_on(workdir):
    said(workdir, state="running", error="")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(dict(step=15, **LINE)) + "\n")
    lock = Lock(workdir)
    found = status(workdir)
    assert (found["state"], found["step"], found["eta"]) == ("running", 15, 2.5)
    assert found["detail"] == f"process {os.getpid()} on host {os.uname().nodename}"
    said(workdir, state="starting")  # a line after the newest checkpoint is of the run before
    assert status(workdir)["step"] == 12
    assert "not yet in its loop" in status(workdir)["detail"]
    lock.release()
    found = status(workdir)
    assert (found["state"], found["step"]) == ("stopped", 12)
    assert found["detail"] == "it was ended without a word; resumable from step 12"


def test_a_finished_and_a_failed_run(workdir):
    said(workdir, state="finished", step=20)
    (workdir / "export").mkdir()
    (workdir / "export" / "config.json").write_text("{}")
    found = status(workdir)
    assert (found["state"], found["step"], found["export"]) == ("finished", 20, True)
    said(workdir, state="failed", error="DataError: d.jsonl:3: \x1b[2J")
    found = status(workdir)
    assert (found["state"], found["step"]) == ("failed", 12)
    assert found["detail"] == "DataError: d.jsonl:3: \x1b[2J; resumable from step 12"


def test_one_that_never_began(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    found = status(tmp_path)
    assert (found["state"], found["step"], found["steps"]) == ("never began", 0, None)
    assert "state     never began" in text(found) and "step      0/?" in text(found)


def test_of_a_version_that_wrote_no_run_file(workdir):
    (workdir / "run.json").unlink()
    found = status(workdir)
    assert (found["state"], found["steps"], found["best"]["a/loss"]["step"]) == ("stopped", None, 8)
    (workdir / "result.json").write_text("{}")
    assert status(workdir)["state"] == "finished"


def test_torn_files_are_said_and_the_rest_is_shown(workdir):
    (workdir / "run.json").write_text('{"state": "fini')
    (workdir / "config.json").write_text("[]")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('5\n{"step": "x"}\n{"step": 13, "loss": NaN, "lr": 1}\n{"step": 14, "lo')
    checkpoint(workdir, 16)
    (workdir / "checkpoints" / "16" / "extra" / "metadata").unlink()
    found = status(workdir)
    assert found["notes"] == [
        "run.json can't be read: it is torn or no JSON",
        "config.json is no JSON object",
        "metrics.jsonl: 3 torn lines left out",
    ]
    assert (found["state"], found["step"], found["logged"], found["loss"]) == (
        "stopped",
        12,
        13,
        None,
    )
    assert found["checkpoints"]["newest"] == 12
    assert all(f"note      {note}" in text(found) for note in found["notes"])


def command(*arguments):
    code = (
        "import sys; from sftjax import cli; sys.argv[0] = 'sftjax'\n"
        "try: cli.main()\n"
        "finally: assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "status", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_one_object_and_loads_no_jax(workdir):
    done = command(workdir, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == status(workdir)
    before = sorted(p.name for p in workdir.iterdir())
    assert command(workdir).stdout == text(status(workdir)) + "\n"
    assert sorted(p.name for p in workdir.iterdir()) == before  # no lock, nothing written


@pytest.mark.parametrize("there", [True, False])
def test_what_is_no_workdir(tmp_path, there):
    path = tmp_path if there else tmp_path / "absent"
    with pytest.raises(NotFoundError, match="no workdir" if there else "does not exist"):
        status(path)
    done = command(path)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_checkpoint_is_whole_by_what_writes_it():
    assert status_lib.PARTS == disk.PARTS
