"""Trackers: what their own offline stores hold after a run, and after its resumption."""

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from sftjax.errors import ConfigError
from sftjax.training import trackers
from sftjax.training.metrics import Writer

CONFIG = {"optim": {"lr": 0.5, "name": "adamw"}, "seed": 3, "eval": {"metrics": ("accuracy",)}}


def write(workdir, names, first, last):
    started = trackers.start(names, workdir, CONFIG)
    options = dict(start_step=first, trackers=started)
    with trackers.closing(started), closing(Writer(workdir, 9, **options)) as writer:
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": step / 8, "bad": float("nan")})


def test_a_tracker_that_is_none_or_not_there(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"'wand' is none; there are wandb, mlflow, trackio"):
        trackers.start(("wand",), tmp_path, CONFIG)
    for name in trackers.TRACKERS:
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ConfigError, match=rf"pip install 'sftjax\[{name}\]'"):
            trackers.start((name,), tmp_path, CONFIG)


def test_a_tracker_that_fails_is_said_and_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise OSError("no route to host")

    made = trackers.Tracker(fails, fails)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", lambda *args: made)
    write(tmp_path, ("wandb",), 0, 1)
    assert "wandb did not take a run's numbers: no route to host" in caplog.text
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": 0.125, "bad": None,
    }  # fmt: skip


def test_a_tracker_that_does_not_begin_is_said_and_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(*args):
        raise OSError("no route to host")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", fails)
    assert trackers.start(("mlflow",), tmp_path, CONFIG) == []
    assert "mlflow does not begin, and gets no numbers: no route to host" in caplog.text


def test_trackers_are_closed_however_a_run_ends():
    closed = []
    made = trackers.Tracker(lambda *args: None, lambda: closed.append(1))
    with pytest.raises(RuntimeError), trackers.closing([made]):
        raise RuntimeError
    assert closed == [1]


@pytest.mark.parity
def test_mlflow_offline(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for first, last in ((0, 2), (2, 4)):
        write(tmp_path / "run", ("mlflow",), first, last)
    client = mlflow.MlflowClient()
    [experiment] = [e for e in client.search_experiments() if e.name == "sftjax"]
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert run.data.params.items() >= {"optim.lr": "0.5", "seed": "3"}.items()
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(i, i / 8) for i in range(1, 5)]
    assert "bad" not in run.data.metrics


@pytest.mark.parity
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, ("wandb",), 0, 2)
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    [file] = folder.glob("*.wandb")
    found, config = [], {}
    for record in wandb_records(file):
        found += [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in record.history.item}]
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    lines = [{k: x[k] for k in ("_step", "loss")} for x in found if x]
    assert lines == [{"_step": 1, "loss": 0.125}, {"_step": 2, "loss": 0.25}]
    assert config["optim.lr"] == 0.5


def wandb_records(path):
    """Of a file of one block: a header of 7 bytes, then records, each with a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at = path.read_bytes(), 7
    while at + 7 <= len(data):
        n = int.from_bytes(data[at + 4 : at + 6], "little")
        yield wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + n])
        at += 7 + n


@pytest.mark.parity
def test_trackio_on_this_machine(tmp_path):
    pytest.importorskip("trackio")
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[2])\n"
        "from test_trackers import write\n"
        "write(Path(sys.argv[1]), ('trackio',), 0, 2)"
    )
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "store")}
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(Path(__file__).parent)],
        check=True, env=env,
    )  # fmt: skip
    [file] = (tmp_path / "store").rglob("*sftjax*.db")
    rows = sqlite3.connect(file).execute("select step, metrics from metrics").fetchall()
    found = [(step, json.loads(text)["loss"]) for step, text in rows]
    assert found == [(1, 0.125), (2, 0.25)]
