"""The whole job on a tiny model: what it leaves behind, resumption, refusals."""

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

import sftjax
from sftjax import config as config_lib
from sftjax import train as train_lib
from sftjax.tasks.answering import Answering

REPO = Path(__file__).resolve().parents[1]
QUICKSTART = tiny.QUICKSTART


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny random model's directory, and small data files."""
    where = tmp_path_factory.mktemp("files")
    tiny.directory(where / "model")
    for name, n in {"train": 200, "validation": 21, "test": 6}.items():
        lines = (QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines()[:n]
        (where / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return where


def make(files, **overrides):
    c = config_lib.get_default()
    c.model.path, c.model.init, c.model.dtype = str(files / "model"), "random", "float32"
    for name in ("train", "validation", "test"):
        c.data[name] = str(files / f"{name}.jsonl")
    c.data.max_length, c.train.batch_size, c.eval.batch_size = 96, 8, 8
    c.train.duration, c.train.log_every, c.train.checkpoint_every = "12 steps", "1", "3 steps"
    c.optim.lr, c.eval.every = 3e-3, "6 steps"
    c.generate.max_new_tokens, c.generate.batch_size = 4, 8
    for key, value in overrides.items():
        config_lib.override(c, key.replace("__", "."), str(value))
    return c


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return {x["step"]: (x["loss"], x["grad_norm"]) for x in lines(workdir) if "loss" in x}


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    """One uninterrupted run, its config and result."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    config = make(files)
    return workdir, config, train_lib.train(config, workdir)


def test_a_run_leaves_what_it_promises(straight):
    workdir, config, result = straight
    assert sorted(p.name for p in workdir.iterdir()) == [
        "cache", "checkpoints", "config.json", "curve.svg", "env.json", "export",
        "metrics.jsonl", "report.html", "result.json", "rows.json", "run.json", "samples",
        "tensorboard",
    ]  # fmt: skip
    assert json.loads((workdir / "config.json").read_text()) == config_lib.to_dict(config)
    env = json.loads((workdir / "env.json").read_text())
    assert env["packages"]["jax"] and len(env["devices"]) == 8
    assert list(losses(workdir)) == list(range(1, 13))
    first, last = losses(workdir)[1][0], losses(workdir)[12][0]
    assert last < first
    named = {k for x in lines(workdir) for k in x}
    assert named >= {
        "loss", "lr", "grad_norm", "update_ratio", "cells_per_s", "tokens_per_s",
        "trained_tokens_per_s", "step_time", "data_wait", "peak_memory",
        "validation/loss", "validation/perplexity", "validation/accuracy",
    }  # fmt: skip
    assert list((workdir / "tensorboard").iterdir())
    assert "<svg" in (workdir / "curve.svg").read_text()
    answers = (workdir / "samples" / "test.jsonl").read_text().splitlines()
    assert len(answers) == 6 and set(json.loads(answers[0])) == {
        "prompt", "reference", "before", "after",
    }  # fmt: skip
    assert result["steps"] == 12
    assert result["after"]["losses"]["validation/loss"] < result["before"]["losses"]["validation/loss"]
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == [9, 12]


def test_the_export_is_the_trained_model(straight, files):
    from transformers import AutoTokenizer

    from sftjax.evaluation.evaluator import measure

    workdir, _, result = straight
    model, params = sftjax.load_pretrained(workdir / "export")
    tokenizer = AutoTokenizer.from_pretrained(workdir / "export")
    source = sftjax.data.open_source(str(files / "validation.jsonl"))
    docs = [sftjax.data.encode(source[i], tokenizer) for i in range(len(source))]
    batch = sftjax.data.make_batch(docs, 96)
    loss_fn = sftjax.losses.causal_lm(model, accuracy=True)
    value, _ = measure(lambda p, b: sftjax.eval_step(p, b, loss_fn=loss_fn), params, [batch])
    for k in ("loss", "accuracy"):  # unpacked, on one device: the same number
        v = value[k]
        np.testing.assert_allclose(result["after"]["losses"][f"validation/{k}"], v, rtol=1e-5)
    generation = json.loads((workdir / "export" / "generation_config.json").read_text())
    assert set(sftjax.data.stop_ids(tokenizer)) <= set(generation["eos_token_id"])
    assert (workdir / "export" / "chat_template.jinja").exists()


def run_command(files, tmp_path, workdir):
    """The command line of the run that `make` describes."""
    config_file = tmp_path / "config.py"
    config_file.write_text(
        f"import sys\nsys.path[:0] = {[str(REPO / 'tests'), str(REPO / 'tests' / 'helpers')]!r}\n"
        f"import pathlib, test_train\n"
        f"def get_config(arg=''):\n  return test_train.make(pathlib.Path({str(files)!r}))\n"
    )
    python = [sys.executable, "-m", "sftjax.train"]
    return [*python, f"--config={config_file}", f"--workdir={workdir}"]


def test_the_printed_command_asks_the_exported_model(straight, capsys):
    from sftjax import generate

    workdir, _, result = straight
    prompt = json.loads((QUICKSTART / "data" / "test.jsonl").read_text().splitlines()[0])["prompt"]
    generate.main([f"--model={workdir / 'export'}", f"--prompt={prompt}", "--max_new_tokens=4"])
    assert capsys.readouterr().out.strip() == result["after"]["answers"][0].strip()


def test_a_killed_run_resumes_with_bit_equal_losses_and_weights(straight, files, tmp_path):
    """kill -9 at some step, then the same command again."""
    workdir = tmp_path / "run"
    command = run_command(files, tmp_path, workdir)
    env = os.environ | {"PYTHONPATH": str(REPO)}
    run = subprocess.Popen(
        command, env=env, cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / "3").exists() and time.monotonic() < deadline:
        assert run.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed" in done.stdout
    assert losses(workdir) == losses(straight[0])
    a, b = (w / "export" / "model.safetensors" for w in (workdir, straight[0]))
    assert a.read_bytes() == b.read_bytes()
    before = json.loads((workdir / "result.json").read_text())["before"]
    assert before == json.loads((straight[0] / "result.json").read_text())["before"]


@pytest.mark.slow
def test_one_device_gives_the_losses_of_eight(straight, files, tmp_path):
    done = subprocess.run(
        run_command(files, tmp_path, tmp_path / "run"),
        cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 x cpu, mesh of one device" in done.stdout
    one, eight = losses(tmp_path / "run"), losses(straight[0])
    assert one.keys() == eight.keys()
    np.testing.assert_allclose(list(one.values()), list(eight.values()), rtol=1e-5)


def test_a_finished_run_started_again_trains_no_further(straight):
    workdir, config, result = straight
    before = (workdir / "metrics.jsonl").read_text()
    again = train_lib.train(config, workdir)
    assert again["after"]["losses"] == result["after"]["losses"]
    assert (workdir / "metrics.jsonl").read_text() == before


def test_the_step_is_traced_once_and_every_config_key_is_read(files, tmp_path, monkeypatch):
    """Runs of different settings together read every key; each run traces its step once."""
    read, paths, quiet = set(), {}, []
    original = ConfigDict.__getattr__

    def recording(self, key):
        if not quiet and id(self) in paths:
            read.add(paths[id(self)] + key)
        return original(self, key)

    def no_recording(fn):
        def inner(*args):
            quiet.append(1)
            try:
                return fn(*args)
            finally:
                quiet.pop()

        return inner

    traces = []
    causal_lm = sftjax.losses.causal_lm

    def counting(model, **kwargs):
        loss_fn = causal_lm(model, **kwargs)
        read.update(f"loss.{k}" for k in kwargs)

        def traced(*args):
            traces.append("accuracy" in kwargs)
            return loss_fn(*args)

        return traced

    from sftjax.evaluation import generation as generate_lib

    monkeypatch.setattr(sftjax.losses, "causal_lm", counting)  # of the evaluation
    monkeypatch.setattr(Answering, "loss", staticmethod(counting))
    monkeypatch.setattr(config_lib, "to_dict", no_recording(config_lib.to_dict))
    generate = generate_lib.generate

    def reading_options(*args, **options):
        read.update(f"generate.{k}" for k in options)
        return generate(*args, **options)

    monkeypatch.setattr(generate_lib, "generate", reading_options)
    variants = [
        {
            "optim__weight_decay": 0.1,
            "optim__schedule": "wsd",
            "optim__trainable": "(('embed/w', False), ('.*', True))",
        },
        {
            "optim__name": "muon",
            "adapter__kind": "lora",
            "adapter__rank": 4,
            "eval__best": "validation/loss",
            "eval__patience": 1,
        },
    ]
    for i, overrides in enumerate(variants):
        config = make(files, train__duration="2 steps", **overrides)
        paths.clear()
        paths[id(config)] = ""
        keep = []  # sub-dicts stay alive, so that their ids stay theirs
        for group, value in config.items():
            if isinstance(value, ConfigDict):
                paths[id(value)] = f"{group}."
                keep.append(value)
        monkeypatch.setattr(ConfigDict, "__getattr__", recording)
        traces.clear()
        train_lib.train(config, tmp_path / str(i))
        monkeypatch.setattr(ConfigDict, "__getattr__", original)
        assert traces.count(False) == 1, "the training step must be traced exactly once"
        assert traces.count(True) == 1, "and the evaluation step"
    keys = set()
    for group, value in config_lib.get_default().items():
        keys |= {f"{group}.{k}" for k in value} if isinstance(value, ConfigDict) else {group}
    # The mesh's sizes are read by name (m[axis]).
    keys -= {f"mesh.{a}" for a in sftjax.parallel.AXES}
    keys.remove("data.shuffle_window")  # of a stream, which none of these is
    assert keys <= read, f"never read: {sorted(keys - read)}"


@pytest.mark.slow
def test_early_stopping_stops_and_the_best_checkpoint_is_kept(files, tmp_path):
    config = make(
        files, eval__best="validation/loss", eval__patience=2, eval__every=1, optim__lr=30.0,
        optim__warmup=0, optim__schedule="constant", train__keep=1, optim__clip=0.0,
    )  # fmt: skip
    result = train_lib.train(config, tmp_path / "run")
    values = {x["step"]: x["validation/loss"] for x in lines(tmp_path / "run") if "validation/loss" in x}
    assert result["steps"] < 12
    best = min(values, key=values.get)
    assert result["steps"] == best + 2
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {best, result["steps"]}


def test_early_stop_by_a_scripted_series():
    from sftjax.evaluation.evaluator import EarlyStop

    stop = EarlyStop("v/loss", 2, True)
    for value, stopped in [
        (3, False),
        (2, False),
        (2.5, False),
        (1.9, False),
        (2, False),
        (2, True),
    ]:
        stop.update({"v/loss": value})
        assert stop.stop is stopped
    resumed = EarlyStop("v/loss", 2, True, stop.state)
    assert resumed.stop
    higher = EarlyStop("v/accuracy", 1, False)
    higher.update({"v/accuracy": 0.5})
    higher.update({"v/accuracy": 0.6})
    assert not higher.stop
    with pytest.raises(ValueError, match="eval.best='v/acc' is not measured"):
        EarlyStop("v/acc", 1, False).update({"v/loss": 1.0})
    with pytest.raises(ValueError, match="eval.patience needs eval.best"):
        EarlyStop("", 1, False)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mesh__fsdp": 3}, "fsdp=3.* needs 3 devices, found 8"),
        ({"train__batch_size": 6}, "micro-batch of 6 rows .* does not divide over the 8 batch"),
        ({"train__batch_size": 8, "train__micro_batches": 3}, "does not divide into 3 micro"),
        ({"data__train": ""}, "data.train is empty"),
        ({"data__train": "absent.jsonl"}, "absent.jsonl"),
        ({"model__path": ""}, "model.path is empty|no tokenizer"),
        ({"model__path": "no/such/dir/here"}, "does not exist"),
        ({"model__init": "zeros"}, "model.init='zeros': expected pretrained . random"),
        ({"optim__name": "adamx"}, "optim.name='adamx': expected adamw"),
        ({"optim__schedule": "cos"}, "optim.schedule='cos': expected constant"),
        ({"train__duration": "soon"}, "train.duration='soon' is no duration"),
        ({"model__attention": "flash"}, "model.attention='flash' is unknown"),
        ({"data__overlong": "cut"}, "data.overlong='cut'"),
        ({"data__packing": "tight"}, "tight"),
        (
            {"mesh__tensor": 8, "mesh__fsdp": 1},
            "kv_heads=2 does not divide over mesh axis tensor=8",
        ),
        ({"data__validation": "a/x.jsonl,b/x.jsonl"}, "two sets have the same file name"),
        (
            {"eval__best": "val/loss"},
            "eval.best='val/loss' is not measured; there is validation/loss",
        ),
        ({"eval__best": "validation/loss", "eval__every": 0}, "but eval.every is 0"),
        ({"train__log_every": 0}, "train.log_every is 0"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_a_wrong_setting_is_refused_before_training(files, tmp_path, overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_lib.train(make(files, **overrides), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["chat.py", pytest.param("freeze.py:1", marks=pytest.mark.long)])
def test_the_shipped_configs_train_a_users_model_on_a_users_data(files, tmp_path, name):
    exported = tmp_path / "model"
    config = make(files, train__duration="1 step", data__test="", data__validation="")
    train_lib.train(config, tmp_path / "made")
    (tmp_path / "made" / "export").rename(exported)
    c = config_lib.load(f"{REPO}/configs/{name}")
    for key, value in {
        "model.path": exported, "data.train": files / "train.jsonl", "data.max_length": "128",
        "train.batch_size": "8", "train.duration": "2 steps", "optim.lr": "0.01",
        "optim.warmup": "0", "optim.schedule": "constant",
    }.items():  # fmt: skip
        config_lib.override(c, key, str(value))
    train_lib.train(c, tmp_path / "run")
    before, after = (
        sftjax.params.flatten(sftjax.load_pretrained(d, split=(1,))[1]) for d in (exported, tmp_path / "run" / "export")
    )
    changed = {k for k in before if (before[k] != after[k]).any()}
    expected = {k for k in before if k.startswith(("layers/1-1", "norm"))}
    assert changed == (expected if "freeze" in name else set(before))


@pytest.mark.slow
def test_a_template_of_the_config_goes_into_the_export(files, tmp_path):
    template = tmp_path / "mine.jinja"
    text = (files / "model" / "chat_template.jinja").read_text()
    template.write_text("{# mine #}" + text)
    config = make(files, train__duration="1 step", data__template=template, data__test="",
                  data__validation="")  # fmt: skip
    train_lib.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "export" / "chat_template.jinja").read_text() == "{# mine #}" + text
    with pytest.raises(ValueError, match="data.template='absent.jinja' does not exist"):
        train_lib.train(make(files, data__template="absent.jinja"), tmp_path / "other")


def test_the_workdir_of_another_config_is_refused(straight, files):
    workdir, *_ = straight
    with pytest.raises(ValueError, match=r"another config:\n  optim.lr: 0.003 there, 0.01 now"):
        train_lib.train(make(files, optim__lr=0.01), workdir)


def test_other_data_under_the_same_name_is_refused(files, tmp_path):
    data = tmp_path / "train.jsonl"
    text = (files / "train.jsonl").read_text()
    data.write_text(text)
    config = make(files, data__train=data, train__duration="2 steps", data__test="")
    train_lib.train(config, tmp_path / "run")
    data.write_text(text + text.splitlines()[3].replace("a", "b") + "\n")
    refused = r"another run:\n  train: train.jsonl: (\d+) rows instead of \d+, the first difference at row \1\nUse ano"
    with pytest.raises(RuntimeError, match=refused):
        train_lib.train(config, tmp_path / "run")


def test_a_failed_first_start_does_not_bind_its_workdir(files, tmp_path):
    quick = dict(train__duration="1 step", data__test="", data__validation="", data__prefetch=0)
    with pytest.raises(ValueError, match="absent.jsonl"):
        train_lib.train(make(files, data__train="absent.jsonl", **quick), tmp_path / "run")
    assert train_lib.train(make(files, **quick), tmp_path / "run")["steps"] == 1


def test_a_workdir_that_cannot_be_written_is_an_error(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="--workdir=.*file/run cannot be written"):
        train_lib.train(make(files), tmp_path / "file" / "run")


def test_errors_on_the_command_line_are_one_message_without_a_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sftjax.train", "--config=configs/quickstart.py",
         f"--workdir={tmp_path}", "--config.optim.lrr=1"],
        capture_output=True, text=True, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 1
    assert "did you mean lr?" in done.stderr and "Traceback" not in done.stderr


def test_the_command_reaches_the_gradient_in_five_calls(files, tmp_path, monkeypatch):
    """By the call stack at jax.value_and_grad: that call is the fifth."""
    calls, package = [], Path(sftjax.__file__).parent

    class Reached(Exception):
        pass

    def reached(*args, **kwargs):
        frames = (f for f in inspect.stack() if package in Path(f.filename).parents)
        calls.extend(f.function for f in frames if not f.function.startswith("<"))
        raise Reached

    arguments = run_command(files, tmp_path, tmp_path / "run")[3:]
    monkeypatch.setattr(jax, "value_and_grad", reached)
    with pytest.raises(Reached):
        train_lib.main(arguments)
    assert calls[::-1] == ["main", "train", "train_step", "_accumulate", "loss_and_grad"]
