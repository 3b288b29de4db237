"""SIGTERM, Ctrl-C and a preemption notice: a checkpoint, exit status 75, and nothing lost."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from jax.experimental import multihost_utils
from test_multiprocess import free_port
from test_train import files, make  # noqa: F401 (files is a fixture)

from sftjax import exits
from sftjax import train as train_lib
from sftjax.errors import LockedError, Stopped
from sftjax.reports.status import status
from sftjax.training.stops import SIGNALS, Stop

REPO = Path(__file__).resolve().parents[2]
# What differs between two runs that are the same: times, and the memory of the process.
OF_TIME = {"cells_per_s", "tokens_per_s", "trained_tokens_per_s", "step_time", "data_wait"}
OF_TIME |= {"peak_memory", "mfu"}
LONG = dict(  # lines of 7 steps, so that a stop falls inside one
    train__duration="120 steps",
    train__log_every=7,
    train__checkpoint_every="50 steps",
    eval__every="40 steps",
    data__test="",
)


def lines(workdir):
    text = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in OF_TIME} for x in text]


def kept(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


# ---- without a run -------------------------------------------------------------------------------


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_handlers_are_put_back():
    before = [signal.getsignal(s) for s in SIGNALS]
    with pytest.raises(ValueError, match="mine"), Stop() as stop:
        assert all(signal.getsignal(s) == stop._handle for s in SIGNALS)
        raise ValueError("mine")
    assert [signal.getsignal(s) for s in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert "sftjax stop" not in {t.name for t in threading.enumerate()}


def test_a_signal_whose_exception_python_swallows(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda what: told.append(what.exc_type))

    class Dying:
        def __init__(self, error=None):
            self.error = error

        def __del__(self):
            if self.error:
                raise self.error
            signal.raise_signal(signal.SIGTERM)

    with Stop() as stop:
        del [Dying()][0]
        wait_for(lambda: stop.asked)
        with pytest.raises(Stopped, match="by SIGTERM, outside the training loop"):
            stop.hold(0)
        del [Dying(ValueError)][0]
    assert told == [ValueError]


def test_a_users_program_keeps_its_handlers():
    """train() makes a Stop that is not entered; in a thread, entering takes nothing either."""
    before = [signal.getsignal(s) for s in SIGNALS]
    found = []

    def look():
        with Stop() as stop:
            stop.listen()
            found.extend(signal.getsignal(s) for s in SIGNALS)

    Stop().listen()
    found.extend(signal.getsignal(s) for s in SIGNALS)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [*before, *before]


def test_a_signal_that_is_ignored_stays_ignored():
    """As of a command that a shell has put into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN and not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_loop_it_waits_for_the_steps_end(number, capsys):
    with Stop() as stop:
        stop.hold(3)
        assert not stop.due(4)
        signal.raise_signal(number)
        assert stop.due(5) and stop.asked == number.name
        wait_for(lambda: stop._deadline < float("inf"))
        with pytest.raises(Stopped) as e:
            stop.release(5, 9, 5)
    expected = f"by {number.name} after step 5 of 9; start the same command again to go on from"
    assert str(e.value) == f"{expected} the checkpoint of step 5"
    told = capsys.readouterr().err
    assert told.startswith(f"stopping  by {number.name}: ") and told.count("\n") == 1


def test_elsewhere_it_ends_at_once(capsys):
    with pytest.raises(Stopped, match="by SIGTERM, outside the training loop"), Stop():
        signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(Stopped, match="outside"), Stop() as stop:
        stop.asked = "SIGTERM"  # somebody has swallowed the exception
        stop.hold(0)


def test_jaxs_preemption_notice_stops_too(monkeypatch):
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: step == 6)
    stop = Stop()
    stop.hold(4)
    assert [stop.due(step) for step in (5, 6)] == [False, True]
    with pytest.raises(Stopped, match="by a preemption notice after step 6 of 9; .* of step 6"):
        stop.release(6, 9, 6)


def test_the_command_ends_with_75_and_one_line(capsys):
    def main(argv):
        raise Stopped("by SIGTERM")

    with pytest.raises(SystemExit) as e:
        exits.run(main, [])
    assert (e.value.code, capsys.readouterr().err) == (75, "Stopped: by SIGTERM\n")


def test_ctrl_c_in_another_command_is_one_line(capsys):
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as e:
        exits.run(main, [])
    assert (e.value.code, capsys.readouterr().err) == (130, "Stopped: by Ctrl-C\n")


SLEEP = """
import sys, time
from sftjax import exits
from sftjax.training.stops import Stop
def main(argv):
    with Stop() as stop:
        stop.grace = float(argv[1])
        if argv[0] == "loop":
            stop.hold(0)
        print("ready", flush=True)
        lock = __import__("threading").Lock()
        while True:  # does not ask, and swallows everything
            try:
                time.sleep(60)
            except BaseException:
                pass
exits.run(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, grace, signals, code, told",
    [
        ("loop", 60, ["SIGTERM", "SIGTERM"], 128 + 15, "at once, by a second signal (SIGTERM)"),
        ("loop", 60, ["SIGTERM", "SIGINT"], 128 + 2, "at once, by a second signal (SIGINT)"),
        ("loop", 1, ["SIGINT"], 75, "by SIGINT, after 1 s"),
        ("elsewhere", 60, ["SIGTERM"], 75, "by SIGTERM, outside the training loop"),
    ],
)
def test_a_second_signal_and_the_end_of_the_grace_time_end_it(where, grace, signals, code, told):
    command = [sys.executable, "-c", SLEEP, where, str(grace)]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    for name in signals:
        process.send_signal(getattr(signal, name))
        time.sleep(0.6)  # two at once are one signal
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == code
    assert f"Stopped: {told}" in errors and "Traceback" not in errors


# ---- runs ----------------------------------------------------------------------------------------


def test_one_run_a_workdir_before_data_and_model_are_read(files, tmp_path, monkeypatch):  # noqa: F811
    found = []

    def load(config):
        with pytest.raises(LockedError, match=f"process {os.getpid()} on host") as e:
            train_lib.train(make(files, optim__lr=7e-3), tmp_path / "run")
        found.append(str(e.value))
        assert status(tmp_path / "run")["state"] == "running"
        raise RuntimeError("far enough")

    monkeypatch.setattr(train_lib, "load_tokenizer", load)
    with pytest.raises(RuntimeError, match="far enough"):
        train_lib.train(make(files), tmp_path / "run")
    assert len(found) == 1 and f"{tmp_path}/run/lock" in found[0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["optim"]["lr"] == 3e-3
    assert not (tmp_path / "run" / "lock").exists()  # given back
    said = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (said["state"], said["error"]) == ("failed", "RuntimeError: far enough")


def test_a_refused_start_gives_the_lock_back_and_says_nothing(files, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="needs 3 devices"):
        train_lib.train(make(files, mesh__fsdp=3), tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def command(files, tmp_path, workdir):  # noqa: F811
    config = tmp_path / "config.py"
    config.write_text(
        f"import sys\nsys.path[:0] = {[str(REPO / 'tests'), str(REPO / 'tests' / 'helpers')]!r}\n"
        f"import pathlib, test_train\n"
        f"def get_config(arg=''):\n"
        f"  return test_train.make(pathlib.Path({str(files)!r}), **{LONG!r})\n"
    )
    python = [sys.executable, "-m", "sftjax.train"]
    return [*python, f"--config={config}", f"--workdir={workdir}"]


def start(command, output, *flags):
    env = os.environ | {"PYTHONPATH": str(REPO)}
    if flags and "coordinator" in flags[0]:
        env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    with open(output, "w") as out:
        return subprocess.Popen([*command, *flags], env=env, stdout=out, stderr=subprocess.STDOUT)


def wait_until(process, output, text):
    """Wait for a text in what a process has written to a file: lines are flushed at once."""
    deadline = time.monotonic() + 240
    while text not in output.read_text():
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("straight") / "run"
    train_lib.train(make(files, **LONG), workdir)
    return workdir


@pytest.mark.slow
def test_stopped_wherever_it_is_a_run_resumes_bit_equal(straight, files, tmp_path):  # noqa: F811
    """Before its first step, in its loop, and after its last."""
    workdir, output = tmp_path / "run", tmp_path / "output"
    steps = []
    for text, name in [
        ("state     ", "SIGTERM"),
        ("step 14/120", "SIGINT"),
        ("step 120/120", "SIGTERM"),
    ]:
        process = start(command(files, tmp_path, workdir), output)
        wait_until(process, output, text)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 75, output.read_text()
        told = output.read_text()
        assert told.count("Stopped: by") == 1 and f"by {name}" in told and "Traceback" not in told
        assert not (workdir / "lock").exists()
        if text.startswith("step"):
            assert told.count(f"stopping  by {name}") == 1
            steps.append(kept(workdir)[-1])
            assert f"{name} after step {steps[-1]} of 120; start the same command again" in told
            assert status(workdir)["state"] == "stopped"
            assert status(workdir)["step"] == steps[-1]
    assert 14 <= steps[0] < steps[1] == 120
    process = start(command(files, tmp_path, workdir), output)
    assert process.wait(240) == 0 and "\nresumed   step 120 of" in output.read_text()
    assert lines(workdir) == lines(straight)
    assert status(workdir)["state"] == "finished"
    for name in ("export/model.safetensors", "result.json"):
        assert (workdir / name).read_bytes() == (straight / name).read_bytes()


@pytest.mark.slow
def test_workers_go_on_while_the_run_saves(files, tmp_path):  # noqa: F811
    """Ctrl-C goes to the whole group of processes, those that read the data too."""
    output, workdir = tmp_path / "output", tmp_path / "run"
    argv = ["setsid", *command(files, tmp_path, workdir), "--config.data.workers=1"]
    process = start(argv, output)
    wait_until(process, output, "step 14/120")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == 75, output.read_text()
    assert "Traceback" not in output.read_text() and len(kept(workdir)) == 1
    wait_for(lambda: not group_lives(process.pid))


def group_lives(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    "name, asked",
    [
        ("SIGTERM", [1]),
        pytest.param("SIGINT", [0], marks=pytest.mark.long),
        pytest.param("SIGTERM", [0, 1], marks=pytest.mark.long),
    ],
)
def test_two_processes_stop_after_one_step(files, tmp_path, name, asked):  # noqa: F811
    """However many of them are asked; elsewhere than in the loop, both end as well."""
    workdir, outputs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    for text in ("state     ", "step 14/120"):
        flags = [f"--config.mesh.coordinator=localhost:{free_port()}", "--config.mesh.processes=2"]
        run = command(files, tmp_path, workdir)
        both = [start(run, outputs[i], *flags, f"--config.mesh.process_id={i}") for i in range(2)]
        wait_until(both[0], outputs[0], text)
        for i in asked:
            both[i].send_signal(getattr(signal, name))
        assert [p.wait(60) for p in both] == [75, 75], outputs[1].read_text()
        told = "".join(output.read_text() for output in outputs)
        assert told.count(f"Stopped: by {name}") == 1 and "Traceback" not in told
        assert not (workdir / "lock").exists()
    assert len(kept(workdir)) == 1 and 14 <= kept(workdir)[0] < 120
    assert f"after step {kept(workdir)[0]} of 120" in told


@pytest.mark.multiprocess
def test_of_several_processes_all_are_refused(files, tmp_path):  # noqa: F811
    from sftjax.training.lock import Lock

    workdir, outputs = tmp_path / "run", [tmp_path / "0", tmp_path / "1"]
    workdir.mkdir()
    lock = Lock(workdir)
    flags = [f"--config.mesh.coordinator=localhost:{free_port()}", "--config.mesh.processes=2"]
    run = command(files, tmp_path, workdir)
    both = [start(run, outputs[i], *flags, f"--config.mesh.process_id={i}") for i in range(2)]
    assert [p.wait(120) for p in both] == [1, 1]
    assert all("LockedError: --workdir=" in output.read_text() for output in outputs)
    lock.release()
