"""What the README says is true: its loop runs, its keys, files and commands exist."""

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import vision
import vision_language
from families import ALL

from sftjax import config as config_lib
from sftjax import data, losses, optim
from sftjax.cli import COMMANDS
from sftjax.errors import Stopped
from sftjax.hf import FAMILIES
from sftjax.ops import rope
from sftjax.training import lock, stops

REPO = Path(__file__).resolve().parents[1]
PAGES = [
    REPO / "README.md",
    REPO / "docs" / "architecture.md",
    REPO / "docs" / "models.md",
    REPO / "docs" / "data.md",
    REPO / "docs" / "plan.md",
    REPO / "docs" / "runs.md",
    REPO / "docs" / "adapters.md",
    REPO / "experiments" / "README.md",
]
TEXT = PAGES[0].read_text()


def test_the_loop_is_short_and_runs(monkeypatch, capsys, tmp_path):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert len([x for x in code.splitlines() if x.strip()]) <= 20
    monkeypatch.chdir(REPO)
    code = code.replace('"runs/loop"', repr(str(tmp_path)))
    exec(compile(code, "README.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 3.0  # about 4.7 before training
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_files_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"--config=([\w/]+\.py)", text):
        assert (REPO / file).exists(), file


def test_keys_and_modules_exist():
    for key in re.findall(r"--config\.([\w.]+)", TEXT):
        node = config_lib.get_default()
        for part in key.split("."):
            assert part in node, key
            node = node[part]
    for module in re.findall(r"python -m (sftjax\.\w+)", TEXT):
        assert find_spec(f"{module}.__main__" if is_package(module) else module), module
    for module, _ in COMMANDS.values():
        assert callable(importlib.import_module(module).main), module


def is_package(module):
    return find_spec(module).submodule_search_locations is not None


def test_every_family_and_rope_variant_is_in_the_page_of_models():
    page = (REPO / "docs" / "models.md").read_text()
    assert set(re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)) == set(FAMILIES)
    cases = [
        *ALL.values(),
        *vision.CASES.values(),
        *vision_language.CASES.values(),
        vision.TIMM | {"model_type": "timm"},
    ]
    assert {c["model_type"] for c in cases} == set(FAMILIES)  # and each is tested
    for name in rope.FREQUENCIES:
        assert f"`{name}`" in page


def test_the_table_of_features_is_the_tables_of_the_code():
    rows = {r[0]: r[1] for r in re.findall(r"^\| (\w+) \| (.*) \|$", TEXT, re.MULTILINE)}
    for name in optim.OPTIMIZERS:
        assert name in rows["optimizers"]
    names = rows["schedules"].replace("inverse square root", "inverse_sqrt")
    for name in optim.SCHEDULES:
        assert name in names.replace("warmup-stable-decay", "wsd")
    for strategy in ("bfd", "bfd_split", "wrapped", "none"):
        assert f"`{strategy}`" in rows["lengths"] and data.pack([1], 4, strategy)
    assert losses.causal_lm


def test_the_table_of_commands_is_that_of_the_code():
    assert re.findall(r"^\| `sftjax (\w+).*?` \|", TEXT, re.MULTILINE) == list(COMMANDS)


def test_the_page_of_runs_says_what_the_code_does():
    page = (REPO / "docs" / "runs.md").read_text()
    assert f"| {Stopped.status} | it was asked to stop" in page
    assert f"`train.grace` seconds ({config_lib.get_default().train.grace:g})" in page
    assert f"more than {stops._SAME:g} s after the first" in page
    assert f"renewed every {lock.RENEW:g} s" in page and f"up to {lock.STALE:g} s" in page
