"""Config: typed overrides, near names, durations, and a reader for every key."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sftjax import config as config_lib
from sftjax.config import ConfigError, duration

REPO = Path(__file__).resolve().parents[1]
CONFIGS = sorted(p.name for p in (REPO / "configs").glob("*.py"))


def parse(*argv, **flags):
    return config_lib.parse(["--config=configs/quickstart.py", *argv], **flags)


@pytest.fixture(autouse=True)
def in_repo(monkeypatch):
    monkeypatch.chdir(REPO)


def test_overrides_are_cast_to_the_type_of_the_default():
    config, flags = parse(
        "--config.optim.lr=1",
        "--config.train.batch_size", "8",
        "--config.model.scan=false",
        "--config.model.split=(1,2)",
        "--config.train.duration=300",
        "--workdir=x",
        workdir=None,
    )  # fmt: skip
    assert config.optim.lr == 1.0 and isinstance(config.optim.lr, float)
    assert config.train.batch_size == 8 and config.model.scan is False
    assert config.model.split == (1, 2) and config.train.duration == "300"
    assert flags.workdir == "x"


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.optim.lrr=1", r"config.optim has no key 'lrr'; did you mean lr\?"),
        ("--config.optimm.lr=1", r"config has no key 'optimm'; did you mean optim\?"),
        ("--config.optim.lr.x=1", r"config.optim.lr has no key 'x'"),
        ("--config.optim.lr=fast", r"--config.optim.lr=fast: expected float, like 0.00"),
        ("--config.train.batch_size=1.5", r"expected int"),
        ("--config.model.scan=3", r"expected bool"),
        ("--config.optim=3", r"is a group"),
        ("--workdirr=x", r"unknown option --workdirr=x"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse(argument)


def test_wrong_files_say_what_is_wrong(tmp_path):
    with pytest.raises(ConfigError, match="absent.py does not exist"):
        config_lib.load("absent.py")
    bad = tmp_path / "bad.py"
    bad.write_text("x = 1\n")
    with pytest.raises(ConfigError, match="no function get_config"):
        config_lib.load(str(bad))
    bad.write_text(
        "from sftjax.config import get_default\n"
        "def get_config(arg=''):\n  c = get_default()\n  c.optim.lrr = 1\n  return c\n"
    )
    with pytest.raises(ConfigError, match='Did you mean "lr" instead of "lrr"'):
        config_lib.load(str(bad))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_short_and_says_how_to_run_it(name):
    text = (REPO / "configs" / name).read_text()
    config = config_lib.load(f"configs/{name}")
    assert set(config_lib.to_dict(config)) == set(config_lib.to_dict(config_lib.get_default()))
    assert len(text.splitlines()) < 40
    assert f"--config=configs/{name}" in text.split('"""')[1]


def test_at_least_the_promised_configs():
    assert {"quickstart.py", "chat.py", "freeze.py", "llama3_8b.py"} <= set(CONFIGS)
    for argument in ("tpu", "gpu"):
        config_lib.load(f"configs/llama3_8b.py:{argument}")


def test_every_key_is_read_by_something():
    """Each leaf key occurs as an attribute in the package, outside its definition."""
    sources = {p: p.read_text() for p in (REPO / "sftjax").rglob("*.py") if p.name != "config.py"}
    code = "\n".join(sources.values())
    whole_groups = {"generate": "g.to_dict()", "loss": "config.loss.to_dict()"}
    unread = []
    for group, keys in config_lib.get_default().items():
        for key in [group] if not hasattr(keys, "items") else keys:
            if group in whole_groups:
                assert whole_groups[group] in code
                continue
            if not re.search(rf"\.{key}\b(?!\()", code) and key not in ("data", "fsdp", "context"):
                unread.append(f"{group}.{key}")
    assert not [k for k in unread if not k.startswith("mesh.")]


def test_durations():
    known = dict(total=1000, batch=8, epoch_rows=100, per_row=(2.0, 500.0))
    for text, steps in {
        "300": 300, "300 steps": 300, "1 step": 1, "10%": 100, "2 epochs": 25, "1 epoch": 13,
        "1600 examples": 100, "2e6 tokens": 500, "0": 0,
    }.items():  # fmt: skip
        assert duration(text, "x", **known) == steps, text
    for text in ("soon", "3 days", "", "10 % of it", "-3"):
        with pytest.raises(ConfigError, match="train.duration=.* is no duration"):
            duration(text, "train.duration", **known)
    with pytest.raises(ConfigError, match="% has no meaning here"):
        duration("10%", "train.duration", batch=8)
    amount = lambda text: config_lib.amount(text, "x")  # noqa: E731
    assert amount("4epochs") == amount("4 epoch") == (4, "epochs")
    assert amount("1.5 epochs") == (1.5, "epochs") and amount("15 steps") == (15, "steps")


HANGS = """
import threading, time
from sftjax import exits
from sftjax.errors import CheckpointError, ConfigError

def main(argv):
    threading.Thread(target=time.sleep, args=(float(argv[0]),)).start()
    raise (CheckpointError if argv[1] == "c" else ConfigError)("the disk is gone")

exits.LEAVE = 0.2
exits.run(main)
"""


@pytest.mark.parametrize("seconds, kind", [("300", "c"), ("0", "c"), ("1", "other")])
def test_a_thread_that_hangs_does_not_keep_a_failed_checkpoint_from_ending_the_run(seconds, kind):
    code = [sys.executable, "-c", HANGS, seconds, kind]
    done = subprocess.run(code, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.count("Error: the disk is gone") == 1
    assert "Traceback" not in done.stderr
