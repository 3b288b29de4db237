"""Training equals the reference: a reduced benchmarks/loss_curve.py, and what would be found."""

import json
import os

import pytest

if os.environ.get("SFTJAX_REQUIRE_PARITY") != "1":
    pytest.importorskip("torch")
    pytest.importorskip("trl")
import torch

from benchmarks import loss_curve

pytestmark = [pytest.mark.parity, pytest.mark.fixtures]

STEPS = 10
CHEAP = ("no isolation", "mean of row means")  # controls that need no compilation of their own


@pytest.fixture(scope="module")
def result(fixtures):
    controls = {name: loss_curve.CONTROLS[name] for name in CHEAP}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other where the cores are shared
    yield loss_curve.measure("gsm8k", fixtures, STEPS, controls)
    torch.set_num_threads(threads)


def test_every_step_equals_torch_and_trl(result):
    assert list(result["differences"])[:3] == [
        "sftjax - torch", "sftjax - TRL", "sftjax x4 - TRL x4",
    ]  # fmt: skip
    for pair, facts in result["differences"].items():
        assert facts["max"] <= 1e-4 and facts["mean"] <= 1e-5 and facts["passed"], (pair, facts)
    losses = result["curves"]["sftjax"]
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]
    assert result["documents"] > result["rows"] == STEPS * loss_curve.ROWS


def test_a_mistake_is_out_of_bounds(result):
    assert list(result["controls"]) == list(CHEAP)
    for control, facts in result["controls"].items():
        assert facts["max"] > 1e-3 and not facts["passed"], (control, facts)


def test_report(result, capsys, tmp_path):
    loss_curve.show("gsm8k", result)
    shown = capsys.readouterr().out.splitlines()
    row = next(line for line in shown if line.startswith(f"{STEPS:>4} "))
    curves = result["curves"]
    assert row.split()[1:6] == [f"{curves[c][-1]:.6f}" for c in loss_curve.CURVES]
    loss_curve.save(tmp_path, "the command", {"gsm8k": result})
    kept = json.loads((tmp_path / "loss_curve.json").read_text())
    assert kept["command"] == "the command" and kept["results"]["gsm8k"] == result
    drawn = (tmp_path / "loss_curve_gsm8k.svg").read_text()
    for curve in loss_curve.PLOTTED:
        assert f">{curve} {curves[curve][-1]:.4g}</text>" in drawn


@pytest.mark.parametrize("name", loss_curve.DATA)
def test_what_trl_was_given_is_checked(fixtures, name):
    task = loss_curve.Task(name, fixtures, 1)
    (batch,) = task.batches()
    pieces = [(torch.tensor(t), torch.tensor(w > 0)) for t, w in task.pieces(task.steps[0])]
    inputs = dict(
        input_ids=torch.cat([tokens for tokens, _ in pieces])[None],
        position_ids=torch.cat([torch.arange(len(tokens)) for tokens, _ in pieces])[None],
        labels=torch.cat([tokens.masked_fill(~on, -100) for tokens, on in pieces])[None],
    )
    divisor = int((inputs["labels"] != -100).sum())
    loss_curve._check_given("step 1", [(inputs, 0.0, divisor)], batch)
    for key in inputs:
        wrong = inputs | {key: inputs[key].clone()}
        wrong[key][0, -1] += 1
        with pytest.raises(ValueError, match=f"step 1: TRL's {key} differ"):
            loss_curve._check_given("step 1", [(wrong, 0.0, divisor)], batch)
    with pytest.raises(ValueError, match=f"TRL divides by .*, expected {divisor}"):
        loss_curve._check_given("step 1", [(inputs, 0.0, divisor - 1)], batch)


def test_too_many_steps(fixtures):
    with pytest.raises(ValueError, match="set --steps to"):
        loss_curve.Task("oasst", fixtures, 10_000)
