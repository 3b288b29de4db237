"""benchmarks/gpu.py at a toy size, and its real cases lowered for CUDA."""

import json
import math

import numpy as np
import pytest

from benchmarks import gpu


def test_batches_are_packed_rows_half_trained():
    case = gpu.CASES["1B-8192"]
    batch, pairs = gpu.make_batch(case)
    assert all(x.shape == (2, 8192) for x in batch.values()) and batch["segments"].min() == 1
    ends = np.diff(batch["segments"], axis=1) != 0
    assert 10 < ends.sum() < 60 and not batch["weights"][:, :-1][ends].any()
    assert np.all(batch["positions"][:, 1:][ends] == 0)
    assert 0.45 < batch["weights"].mean() < 0.55
    assert pairs == (batch["positions"].astype(int) + 1).sum()  # each sees those before it


@pytest.mark.slow
def test_toy_case_trains_what_it_should_and_reports_it(capsys):
    case = gpu.CASES["toy-last1"]
    found = gpu.measure_sftjax(case, 3, "")
    assert found["attention"] == "blockwise" and len(found["seconds"]) == 3
    assert abs(found["losses"][0] - math.log(512)) < 0.1
    assert found["losses"][-1] < found["losses"][0]
    assert gpu.flops_needed(case) < 0.9 * gpu.flops_needed(gpu.CASES["toy"])
    slower = found | {"seconds": [2 * s for s in found["seconds"]], "device": "NVIDIA H100 80GB"}
    other = gpu.summary("torch sdpa", case, [slower, slower], [found, found])
    assert other["sftjax_speed"] == [2, 2, 2] and other["failed"] == 0
    assert 0 < other["mfu"] < 1e-3
    gone = gpu.summary("torch x", case, [{"error": "OutOfMemoryError: 80 GiB"}], [found])
    gpu.show("toy-last1", [other, gone])
    shown = capsys.readouterr().out.splitlines()
    assert "2.00 (2.00..2.00)" in shown[-2] and shown[-1].endswith("OutOfMemoryError: 80 GiB")


def test_a_failing_child_says_why(tmp_path):
    (tmp_path / "child.py").write_text("raise RuntimeError('out of memory')")
    found = gpu.run_child([str(tmp_path / "child.py")], "toy", 1, 60)
    assert found == {"error": "RuntimeError: out of memory"}
    (tmp_path / "child.py").write_text("import time; time.sleep(60)")
    assert gpu.run_child([str(tmp_path / "child.py")], "toy", 1, 1) == {"error": "no result in 1 s"}


@pytest.mark.parametrize("name", ["1B-4096", "8B-last4-8192"])  # no width or row of two sizes alike
def test_real_cases_lower_for_cuda(name):
    """The whole step, from shapes: no score matrix, no logits of every token, three kernels."""
    case = gpu.CASES[name]
    text = gpu.lower(case).as_text()
    tokens, vocab = case.rows * case.length, gpu.SHAPES[case.shape]["vocab"]
    assert f"{case.length}x{case.length}" not in text
    assert not any(f"{x}x{vocab}x" in text for x in (tokens, f"{case.rows}x{case.length}"))
    assert text.count("custom_call @__gpu$xla.gpu.triton") >= 3
    assert "xbf16" in text


@pytest.mark.slow
def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    gpu.main(["--toy", "--cases", "toy", "--rounds=2", "--steps=2", f"--out={tmp_path}/x.json"])
    result = json.loads((tmp_path / "x.json").read_text())["results"]["toy"]
    assert len(result["runs"]["sftjax"]) == 2 and result["variants"][0]["tokens_per_s"] > 0
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parity
def test_torch_side_runs_and_starts_from_the_same_loss():
    pytest.importorskip("torch")
    child = gpu.variants("cpu")["torch sdpa"]
    found = gpu.run_child(child, "toy-last1", 2, 300)
    assert abs(found["losses"][0] - math.log(512)) < 0.1
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.slow
def test_tune_times_the_kernels():
    from benchmarks.triton_attention import Blocks

    rows = gpu.tune(gpu.CASES["toy"], [Blocks(64, 64, 4, 1)], kernels=[0])
    assert {row[0] for row in rows} == {"as in the table", "forward"}
    assert all(row[2] > 0 for row in rows)
