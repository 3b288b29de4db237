"""Metrics: what is written, and the arithmetic of speed."""

import io
import json
import math
import subprocess
import sys
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sftjax.errors import MetricError
from sftjax.training import metrics
from sftjax.training.metrics import Writer, mfu, peak_memory, read_lines


def read(workdir):
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ---- writer --------------------------------------------------------------------------------


def test_one_json_object_a_line_also_for_nan_and_arrays(tmp_path):
    with closing(Writer(tmp_path, 10, tensorboard=False)) as writer:
        writer.write(1, {"loss": jnp.float32(0.5), "tokens": 7, "lr": np.float64(0.25)})
        writer.write(2, {"loss": float("nan"), "a": float("inf"), "b": -math.inf})
        with pytest.raises(TypeError, match="metric 'bad' is .* expected one number"):
            writer.write(3, {"bad": np.ones(2)})
    assert read(tmp_path) == [
        {"step": 1, "loss": 0.5, "tokens": 7, "lr": 0.25},
        {"step": 2, "loss": None, "a": None, "b": None},
    ]


def test_a_resumed_run_writes_no_step_twice(tmp_path):
    with closing(Writer(tmp_path, 10, tensorboard=False)) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 6, "lo')  # torn by a kill
    with closing(Writer(tmp_path, 10, tensorboard=False, start_step=3)) as writer:
        for step in range(4, 7):
            writer.write(step, {"loss": -step})
    assert [(x["step"], x["loss"]) for x in read(tmp_path)] == [
        (1, 1), (2, 2), (3, 3), (4, -4), (5, -5), (6, -6)
    ]  # fmt: skip


def test_what_is_no_line_of_metrics_is_left_out_and_said(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "loss": 2.0, "grad_norm": null}\n'
    path.write_text(good + '{"step": 2, "lo')
    assert [x for x, _ in read_lines(path)] == [good] and not caplog.records  # torn by a kill
    junk = ["5", "[1]", "{}", '{"step": "2"}', '{"step": true}', '{"step": 3, "loss": "x"}',
            '{"step": 3, "loss": [1]}', '{"step": 3, "loss": NaN}', "\udcff", "[" * 99_999,
            ""]  # fmt: skip
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as f:
        f.write("\n".join([*junk, good]))
    assert [x for x, _ in read_lines(path)] == [good]
    assert "11 lines are damaged and left out, first line 1" in caplog.text
    with closing(Writer(tmp_path, 10, tensorboard=False, start_step=1)):
        pass
    assert path.read_text() == good
    path.unlink()
    path.mkdir()
    with pytest.raises(MetricError, match="metrics.jsonl is a folder, expected a regular file"):
        list(read_lines(path))


def test_only_process_0_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with closing(Writer(tmp_path / "run", 10)) as writer:
        writer.write(1, {"loss": 0.5})
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_tensorboard_has_the_values(tmp_path):
    with closing(Writer(tmp_path, 10)) as writer:
        writer.write(3, {"val/loss": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"val/loss" in events.read_bytes()


def test_plain_lines_when_stderr_is_no_terminal(tmp_path, capsys):
    with closing(Writer(tmp_path, 200, tensorboard=False)) as writer:
        writer.write(10, {"loss": 1.25, "lr": 1e-4, "tokens_per_s": 12345.6, "grad_norm": 1})
        writer.write(10, {"val/loss": 1.5, "val/accuracy": 0.25})
        writer.write(200, {"loss": 1.0})
    out, err = capsys.readouterr()
    first, second, third = err.splitlines()
    assert out == ""
    assert first.startswith("step 10/200  loss 1.2500  lr 1.00e-04  tok/s 12,346  eta 00:")
    assert second.startswith("step 10/200  val/loss 1.5  val/accuracy 0.25  eta")
    assert third == "step 200/200  loss 1.0000"


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with closing(Writer(tmp_path, 200, tensorboard=False, start_step=100)) as writer:
        writer.write(110, {"loss": 1.25})
    shown = terminal.getvalue()
    assert "step 110/200 |" in shown and "loss 1.2500" in shown


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459),
        ("TPU v6 lite", 918), ("TPU7x", 1153.5), ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H200", 989), ("NVIDIA B200", 2250), ("cpu", None),
    ],
)  # fmt: skip
def test_mfu_knows_the_device(kind, tflops):
    if tflops is None:
        assert mfu(1e12, 1.0, kind, 8) is None
    else:
        assert mfu(tflops * 1e12, 0.5, kind, 4) == pytest.approx(0.5)


def test_peak_memory_says_what_it_measured(monkeypatch):
    size, source = peak_memory()
    assert source == "process" and 50e6 < size < 100e9

    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(metrics.jax, "local_devices", lambda: [Device(5), Device(7)])
    assert peak_memory() == (7, "device")


def test_peak_bytes_counts_donated_memory_once():
    x = jax.ShapeDtypeStruct((1024, 256), jnp.float32)
    size = 1024 * 256 * 4
    kept = jax.jit(lambda x: x + 1).lower(x).compile()
    donated = jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile()
    assert metrics.peak_bytes(kept) == 2 * size and metrics.peak_bytes(donated) == size


KILLED = """
import os, signal, sys
from sftjax.training.metrics import Writer
writer = Writer(sys.argv[1], 99, start_step=int(sys.argv[2]))
for step in range(int(sys.argv[2]) + 1, int(sys.argv[3]) + 1):
    writer.write(step, {"loss": step / 8})
writer.flush()  # as at a checkpoint
writer.write(98, {"loss": 7})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_tensorboard_has_all_points_before_a_checkpoint_when_the_run_is_killed(tmp_path):
    for first, last in ((0, 30), (30, 41)):
        code = [sys.executable, "-c", KILLED, str(tmp_path), str(first), str(last)]
        assert subprocess.run(code).returncode == -9
    points, starts = {}, []
    for file in sorted((tmp_path / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime):
        for event in events_of(file):
            if event.HasField("session_log"):
                starts.append(event.step)
                points = {step: x for step, x in points.items() if step < event.step}
            for value in event.summary.value:
                points[event.step] = value.simple_value
    assert starts == [1, 31]
    assert points.items() >= {step: step / 8 for step in range(1, 42)}.items()


def events_of(file):
    """The whole events of a file: a length, its checksum, the event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    data, at = file.read_bytes(), 0
    while at + 12 <= len(data):
        n = int.from_bytes(data[at : at + 8], "little")
        yield Event.FromString(data[at + 12 : at + 12 + n])
        at += 16 + n


@pytest.mark.parametrize("junk", [b"\xff\xfe\x00junk\n", b"[]\n", b"5\n", b'{"loss": 1}\n', b'{"step": "x"}\n', b"\n"])
def test_junk_in_metrics_jsonl_is_left_out_and_said(tmp_path, caplog, junk):
    with closing(Writer(tmp_path, 10, tensorboard=False)) as writer:
        writer.write(1, {"loss": 1})
    with open(tmp_path / "metrics.jsonl", "ab") as f:
        f.write(junk + junk + b'{"step": 2, "loss": 2}\n{"step": 3, "lo')
    with closing(Writer(tmp_path, 10, tensorboard=False, start_step=2)) as writer:
        writer.write(3, {"loss": 3})
    assert [x["step"] for x in read(tmp_path)] == [1, 2, 3]
    assert "metrics.jsonl: 2 lines are damaged and left out" in caplog.text
