"""Paths: a URL is refused and makes no folder; relative ones mean the same on resumption."""

import json
import os
from pathlib import Path

import pytest
from test_chat import make_tokenizer

from sftjax import config as config_lib
from sftjax import hf, tasks, train
from sftjax.clean.command import clean
from sftjax.data import open_source
from sftjax.errors import ConfigError, UserError
from sftjax.files import url_problem
from sftjax.training import workdir as workdir_lib

REPO = Path(__file__).resolve().parents[2]
URLS = ["gs://b/run", "s3://b/run", "hf://org/name", "http://h/x", "https://h/x.jsonl", "az://c/x"]
URLS += ["abfs://c@a/x", "gs:/b/run", "GS://b/run", " gs://b/run", "file:///x", "memory://x"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, which stays without a folder named by a URL."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert not [p for p in folder.iterdir() if ":" in p.name]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("option", ["--workdir", "--out", "--report", "--config"])
def test_options(here, option, url):
    flags = dict(workdir="w", out="o", report="")
    argv = [f"--config={REPO / 'configs/quickstart.py'}", f"{option}={url}"]
    with pytest.raises(ConfigError, match=f"^{option}=.*:// is not read or written, only local"):
        config_lib.parse(argv, **flags)


@pytest.mark.parametrize("key", config_lib.PATHS)
def test_keys(here, key):
    argv = [f"--config={REPO / 'configs/quickstart.py'}", f"--config.{key}=gs://b/x"]
    with pytest.raises(ConfigError, match=f"^{key}=gs://b/x: gs:// is not read or written"):
        config_lib.parse(argv)


def test_keys_that_hold_several(here):
    config = config_lib.get_default()
    config.data.train = "a.jsonl, s3://b/x.jsonl"
    with pytest.raises(ConfigError, match="data.train= s3://b/x.jsonl: s3:// is not"):
        config_lib.check(config)
    config.data.train, config.data.sources = "", (dict(path="a"), dict(path="b,gs://b/x"))
    with pytest.raises(ConfigError, match="data.sources: gs://b/x: gs:// is not"):
        config_lib.check(config)


@pytest.mark.parametrize("url", URLS)
def test_functions(here, url):
    """For those who call them; a Path has lost one of the slashes."""
    config = config_lib.get_default()
    for path in (url, Path(url)):
        for call in (
            lambda: workdir_lib.prepare_workdir(config, path),  # noqa: B023
            lambda: open_source(str(path)),  # noqa: B023
            lambda: hf.resolve(path),  # noqa: B023
            lambda: hf.save_pretrained(path, None, {}),  # noqa: B023
            lambda: clean(config, path),  # noqa: B023
            lambda: train.train(config, path),  # noqa: B023
        ):
            with pytest.raises(UserError, match=":// is not read or written, only local paths"):
                call()


def test_what_is_no_url(here):
    for path in (
        "a/b",
        "org/name",
        "org/name:config/split",
        "c:/x",
        "/a:b/c",
        "./gs:/x",
        "",
        "x:y",
    ):
        assert not url_problem(path), path


# ---- relative paths ----------------------------------------------------------------------------


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A run that began in the folder `first`, has a checkpoint, and goes on in `second`."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "d.jsonl").write_text(json.dumps({"prompt": folder.name, "completion": "x"}))
    make_tokenizer().save_pretrained(first / "model")
    config = config_lib.get_default()
    config.model.path, config.data.train = "model", "d.jsonl"
    monkeypatch.chdir(first)
    workdir = workdir_lib.prepare_workdir(config, "runs/x")
    assert workdir == first / "runs" / "x" and workdir_lib.began_in(workdir) == first
    (workdir / "checkpoints" / "4").mkdir(parents=True)
    monkeypatch.chdir(second)
    return config, workdir, first, second


def test_a_resumed_run_reads_what_it_began_with(begun, monkeypatch, capsys):
    config, _, first, second = begun
    found = []

    def make(config, tokenizer):
        found.append((Path.cwd(), open_source(config.data.train)[0]["prompt"], len(tokenizer) > 0))
        raise InterruptedError

    monkeypatch.setattr(tasks, "make", make)
    for _ in range(2):  # the second time too
        with pytest.raises(InterruptedError):
            train.train(config, "../first/runs/x")
        assert Path.cwd() == second
    assert found == [(first, "first", True)] * 2
    said = f"paths     relative ones are taken from {first}, where this run began"
    assert said in capsys.readouterr().out


def test_a_path_may_be_written_in_another_way(begun):
    config, workdir, first, _ = begun
    config.data.train = str(first / "d.jsonl")
    workdir_lib.prepare_workdir(config, workdir)
    config.data.train = "../first/./d.jsonl"
    workdir_lib.prepare_workdir(config, workdir)
    config.data.train = "../second/d.jsonl"
    with pytest.raises(ConfigError, match="data.train: '../first/./d.jsonl' there, '../second/d."):
        workdir_lib.prepare_workdir(config, workdir)


def test_a_run_that_has_no_checkpoint_begins_here(begun):
    _, workdir, _, second = begun
    os.rename(workdir / "checkpoints" / "4", workdir / "old")
    assert workdir_lib.began_in(workdir) == second


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"directory": 5}', '{"directory": "gone"}', "[" * 100_000]
    + [f'{{"directory": "/{name}"}}' for name in ("a" * 5000, "a\\u0000b")],
)
def test_where_it_began_may_be_unknown_or_gone(begun, text):
    """So are runs of earlier versions, and those that were moved to another machine."""
    _, workdir, _, second = begun
    (workdir / "env.json").write_text(text)
    assert workdir_lib.began_in(workdir) == second


@pytest.mark.parametrize("text", ["{", "[]", "5", "[" * 100_000, "\udcff"])
def test_a_config_that_was_torn_is_named(begun, text):
    config, workdir, _, _ = begun
    (workdir / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match="x/config.json ") as e:
        workdir_lib.prepare_workdir(config, workdir)
    assert len(str(e.value)) < 1000


def test_a_folder_in_the_place_of_a_file_is_set_aside(begun, caplog):
    config, workdir, _, _ = begun
    (workdir / "env.json").unlink()
    (workdir / "env.json").mkdir()
    workdir_lib.prepare_workdir(config, workdir)
    assert (workdir / "env.json").is_file() and (workdir / "env.json.damaged").is_dir()
    assert "env.json is damaged; it is set aside as env.json.damaged" in caplog.text
