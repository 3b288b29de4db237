"""Encoders and an encoder-decoder compiled for a TPU slice: no scores of a whole row exist.

The sizes are those of benchmarks/tpu_encoders.py made small; a program's layers are one loop, so
what it holds does not depend on their number. No width is a row's length.
"""

import dataclasses
from pathlib import Path

import pytest

from sftjax.plan import compile as plan
from sftjax.plan import hardware as targets

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=640)
CASES = {
    "bert-v5e": SMALL | dict(vocab_size=1024),
    "t5-v5e": dict(
        vocab_size=1024, d_model=256, d_kv=64, d_ff=640, num_heads=4, num_layers=2,
        num_decoder_layers=2,
    ),
    "modernbert-v5e": SMALL | dict(vocab_size=1024, num_hidden_layers=3),
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import tpu_encoders

    return tpu_encoders


@pytest.mark.tpu
@pytest.mark.parametrize("name", CASES)
def test_no_scores_of_a_whole_row(bench, name, tmp_path):
    run = bench.RUNS[name]
    run = dataclasses.replace(run, model=run.model | CASES[name], slice="v5e:2x2", rows=8, length=min(run.length, 1024))
    found = bench.measure(name, run, str(tmp_path))
    text = (tmp_path / f"{name}.hlo").read_text()
    assert found["fits"] and 0 < found["peak_gib"] < 1
    assert not any(found["squares"].values()), found["squares"]
    assert ("tpu_custom_call" in text) == (run.attention == "splash")
    assert f"[{run.rows // 4},{run.length}" in text  # a device's rows are in it, at their length
    assert found["projection"]["step"] > 0 and found["model_tflop"] > 0


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('  %a = f32[8,2,512,512]{3,2,1,0} fusion(%b), metadata={op_name="x/attention/dot"}', True),
        ("  ROOT %a = (bf16[512,4,512], s32[]) fusion(%b)", True),
        ('  %a = pred[8,512,512,2] fusion(%b), metadata={op_name="x/dropout/ge"}', False),
        ("  %a = u32[8,512,512] fusion(%b)", False),
        ("  %a = f32[8,512,512] parameter(0)", False),
        ('  %a = f32[8,512,128] fusion(%b), metadata={op_name="x/attention/dot"}', False),
    ],
)
def test_what_a_square_is(bench, line, found):
    assert bool(bench.squares(line, 512)) == found


def test_every_run_builds(bench, tmp_path):
    """From shapes alone: the tasks take the models, and the batch divides over the slice."""
    for name, run in bench.RUNS.items():
        target = targets.parse(run.slice)
        run = dataclasses.replace(run, attention="blockwise")
        program = plan.build(bench.config_of(run, str(tmp_path)), target)
        assert program.batch["tokens"].shape == (run.rows, run.length), name
        assert ("target_segments" in program.batch) == bool(run.target)
