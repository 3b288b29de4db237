"""The command `sftjax`: its help loads no JAX, and a wrong command is said."""

import subprocess
import sys

import pytest

import sftjax
from sftjax import cli

HELP = """
import sys
from sftjax import cli
sys.argv = ["sftjax", "--help"]
cli.main()
loaded = {"jax", "flax", "transformers", "numpy", "sftjax.step"} & set(sys.modules)
assert not loaded, loaded
"""


def test_the_help_names_every_command_and_loads_no_jax():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)


def test_the_version_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sftjax", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"sftjax {sftjax.__version__}\n"


@pytest.mark.parametrize("argv", [["trian"], []])
def test_no_command_or_a_wrong_one_ends_with_status_2(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sftjax", *argv])
    with pytest.raises(SystemExit) as e:
        cli.main()
    told = capsys.readouterr()
    assert (e.value.code, told.out) == (2, "")
    assert "usage: sftjax" in told.err
    assert all(f"unknown command '{name}'" in told.err for name in argv)


def test_the_public_names_are_loaded_when_they_are_used():
    assert all(getattr(sftjax, name) is not None for name in sftjax.__all__)
    assert set(sftjax.__all__) <= set(dir(sftjax))
    assert sftjax.optim.__name__ == "sftjax.optim"  # a module, without an import of its own
    with pytest.raises(AttributeError, match="has no attribute 'trainstep'"):
        _ = sftjax.trainstep
