"""benchmarks/chaos.py, with few kills."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "chaos.py"


@pytest.mark.slow
def test_runs_that_are_killed_lose_nothing(tmp_path):
    command = [sys.executable, str(SCRIPT), "--kills=3", "--case=packing", "--seed=1"]
    done = subprocess.run([*command, f"--out={tmp_path / 'out.json'}"], capture_output=True)
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["runs that differ"] == 0 and found["kills"] == 3
