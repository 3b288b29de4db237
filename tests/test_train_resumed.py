"""Whole runs whose checkpoints fail or are damaged, and their resumption with other settings."""
# ruff: noqa: F811 (fixtures of another file)

import json
import re
import shutil
import subprocess
import time

import pytest
from test_train import REPO, files, losses, make, run_command, straight  # noqa: F401 (fixtures)

from sftjax import train as train_lib


@pytest.fixture
def stopped(straight, tmp_path):
    """A copy of the uninterrupted run, as it was after step 9; and that run's losses."""
    workdir, *_ = straight
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    return tmp_path / "run", losses(workdir)


@pytest.mark.slow
def test_a_damaged_checkpoint_costs_its_steps_and_nothing_else(
    straight,
    files,
    tmp_path,
    caplog,
    capsys,
):
    workdir, config, _ = straight
    shutil.copytree(workdir, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "12"
    data = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 3] ^= 1
    data.write_bytes(content)
    train_lib.train(config, tmp_path / "run")
    assert "12 is damaged: state/" in caplog.text and "has another checksum" in caplog.text
    assert "of step 9, is taken: 3 steps are repeated" in caplog.text
    assert "resumed   step 9 of" in capsys.readouterr().out
    assert losses(tmp_path / "run") == losses(workdir)
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["12", "12.damaged", "9", "manifest.json"]


@pytest.mark.slow
def test_a_longer_run_and_other_evaluation_go_on_from_the_checkpoint(
    stopped,
    files,
    tmp_path,
    caplog,
):
    workdir, before = stopped
    other = tmp_path / "other"
    other.mkdir()
    for name in ("validation", "test"):
        text = (files / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (other / f"{name}.jsonl").write_text("".join(text[:-1]))
    changes = dict(
        train__duration="14 steps",
        eval__every="2 steps",
        data__validation=other / "validation.jsonl",
        data__test=other / "test.jsonl",
    )
    result = train_lib.train(make(files, **changes), workdir)
    assert "the duration is another from now on" in caplog.text and "optim.schedule=cosine" in caplog.text
    assert "evaluation is by other rows from now on" in caplog.text
    assert re.search(r"(\d+) rows instead of (\d+), the first difference at row \2", caplog.text)
    after = losses(workdir)
    assert sorted(after) == list(range(1, 15)) and result["steps"] == 14
    assert all(after[step] == before[step] for step in range(1, 10))
    assert after[10][0] == before[10][0]  # of the same batch; then the rates differ
    rows = (workdir / "samples" / "test.jsonl").read_text().splitlines()
    assert len(rows) == 5 and json.loads(rows[0])["before"] == "(the test set was another)"
    assert "validation/loss" not in result["before"]["losses"]
    with pytest.raises(RuntimeError, match="run of 14 steps, and this one has 7"):
        train_lib.train(make(files, **changes | dict(train__duration="0.5 epochs")), workdir)


@pytest.mark.slow
def test_a_last_save_that_fails_is_an_error_but_takes_neither_export_nor_report(
    files,
    tmp_path,
    monkeypatch,
    caplog,
):
    from sftjax.training.checkpoint import disk

    good, tried = disk.seal, []

    def full(folder):
        tried.append(folder.name)
        if len(tried) in (2, 4):
            raise OSError(28, "No space left on device")
        good(folder)

    monkeypatch.setattr(disk, "seal", full)
    with pytest.raises(RuntimeError, match=r"step 12 in .*: No space left on device\n.*: step 9"):
        train_lib.train(make(files, data__test=""), tmp_path / "run")
    assert "checkpoint of step 6" in caplog.text and "Training goes on" in caplog.text
    run = tmp_path / "run"
    assert (run / "export" / "config.json").exists() and (run / "result.json").exists()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["3", "9", "manifest.json"]
    monkeypatch.undo()
    assert train_lib.train(make(files, data__test=""), run)["steps"] == 12
    assert (run / "checkpoints" / "12").is_dir()


@pytest.mark.slow
def test_a_workdir_that_is_deleted_midway_ends_the_run_with_a_message(files, tmp_path):
    command = run_command(files, tmp_path, tmp_path / "run")
    command += ["--config.train.duration=100000 steps", "--config.train.checkpoint_every=2 steps"]
    command += ["--config.eval.every=0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                          cwd=REPO) as process:  # fmt: skip
        while not (tmp_path / "run" / "checkpoints" / "4").exists():
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        (tmp_path / "run").rename(tmp_path / "gone")  # in one moment
        _, err = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "CheckpointError: " in err and "the directory is gone: it was deleted" in err
    assert "Traceback" not in err
