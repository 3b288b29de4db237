"""benchmarks/trace.py and plot.py: what ran is counted exactly, and drawn."""

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import plot, trace
from sftjax.models.decoder import Config


@pytest.mark.slow
def test_a_traced_step_has_the_flops_of_its_model(tmp_path, capsys):
    c = Config(vocab=1024, width=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=256, tied=True)
    rows, length, steps = 4, 128, 2
    program = trace.Program(trace.profile(c, rows, length, steps, str(tmp_path)))
    events, spans = trace.read_trace(tmp_path, "train_step")
    assert len(spans) == steps
    found, idle, seconds = trace.summarise(program, events, spans)
    tokens = rows * length
    weights = c.layers * c.width * (2 * (4 + 2) * 16 + 3 * c.mlp)
    assert found["matmul"]["flops"] == pytest.approx(6 * weights * tokens)
    trained = tokens / 2  # whole chunks of them, in this case
    assert found["vocabulary"]["flops"] == pytest.approx(6 * c.vocab * c.width * trained)
    assert found["attention"]["flops"] > 0 and found["other"]["flops"] == 0
    assert sum(row["share"] for row in found.values()) + idle == pytest.approx(1)
    assert seconds * (1 - idle) == pytest.approx(sum(row["seconds"] for row in found.values()))
    rates = trace.machine_rates("float32", 128, 1)
    trace.show(found, idle, seconds, rates)
    assert "collectives        -" in capsys.readouterr().out
    (axes,) = trace.roofline(found, rates, "x").axes
    assert [text.get_text() for text in axes.texts] == ["roof", "matmul", "attention", "vocabulary"]


HLO = """\
HloModule jit_f, entry_computation_layout={()->f32[8,16]}

%fused (p0: bf16[8,32], p1: bf16[16,32]) -> f32[8,16] {
  %p0 = bf16[8,32]{1,0} parameter(0)
  %p1 = bf16[16,32]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(f)/attention/dot"}
}

ENTRY %main (a: bf16[8,32], b: bf16[16,32]) -> f32[8,16] {
  %a = bf16[8,32]{1,0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %gemm = (f32[8,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/mlp"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %all-gather-start.3 = (bf16[8,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%a), dimensions={0}
  %while.2 = f32[8,16]{1,0} while(%gemm), body=%fused
  ROOT %fusion.7 = f32[8,16]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/attention/dot"}
}
"""  # noqa: E501


def test_kinds_flops_and_bytes_of_a_gpu_program():
    program = trace.Program(HLO)
    names = ["gemm", "all-gather-start.3", "while.2", "fusion.7", "no_such"]
    assert [program.kind(n) for n in names] == [
        "matmul", "collectives", None, "attention", None,
    ]  # fmt: skip
    assert program.flops("gemm") == program.flops("fusion.7") == 2 * 8 * 16 * 32
    assert program.bytes("fusion.7") == 8 * 16 * 4 + 8 * 32 * 2 + 16 * 32 * 2


def test_idle_time_and_the_busiest_device():
    program = trace.Program(HLO)
    events = [("d0", 0, 10, "gemm"), ("d0", 5, 20, "fusion.7"), ("d0", 0, 99, "while.2"),
              ("d1", 0, 5, "gemm"), ("d0", 200, 300, "gemm")]  # fmt: skip
    found, idle, seconds = trace.summarise(program, events, [(0, 50), (50, 100)])
    assert idle == pytest.approx(0.8) and seconds == pytest.approx(50e-9)
    assert found["matmul"]["share"] == pytest.approx(10 / 25 * 0.2)
    assert found["attention"]["share"] == pytest.approx(15 / 25 * 0.2)
    with pytest.raises(ValueError, match="no operation of the compiled step"):
        trace.summarise(program, [("d0", 0, 1, "other")], [(0, 10)])


def test_plot_draws_what_it_knows_and_names_the_rest(tmp_path, capsys):
    speed = [1.5, 2.0, 2.5]
    (tmp_path / "loss.json").write_text(
        json.dumps(
            dict(
                time={"shares": [dict(trained=0.25, speed_vs_chunked=speed)]},
                memory=[dict(vocab=128256, dtype="bfloat16", temp_bytes=dict(plain=800, sftjax=100))],
            )
        )
    )
    rows = [dict(variant="torch sdpa", sftjax_speed=speed), dict(variant="torch x", error="none")]
    (tmp_path / "gpu_h100.json").write_text(json.dumps(dict(results={"1B": dict(variants=rows)})))
    (tmp_path / "unknown.json").write_text("{}")
    plot.main([f"--results={tmp_path}"])
    out = capsys.readouterr().out
    assert "unknown.json: of another form, left out" in out and "gpu_h100.json, loss.json" in out
    drawn = "".join(ET.parse(tmp_path / "results.svg").getroot().itertext())
    for label in ("25% trained, speed", "2.00", "8.00", "1B, torch sdpa"):
        assert label in drawn
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        plot.main([f"--results={tmp_path}/empty"])


def test_plot_draws_the_results_that_are_here(tmp_path):
    results = Path(plot.__file__).parent / "results"
    plot.main([f"--results={results}", f"--out={tmp_path / 'out.svg'}"])
    drawn = "".join(ET.parse(tmp_path / "out.svg").getroot().itertext())
    for label in ("Tunix", "lengths: TRL, packed", "long, many documents, blockwise"):
        assert label in drawn


def test_a_roofline_has_its_names_and_plain_numbers(tmp_path):
    roof = [(0.1, 10), (10, 1000), (1000, 1000)]
    figure = plot.loglog({"roof": roof, "matmul": [(20, 600)]}, "a & b", "FLOP a byte", "GFLOP/s")
    line, point = figure.axes[0].lines
    assert line.get_xydata().tolist() == [list(p) for p in roof] and line.get_marker() == ""
    assert point.get_xydata().tolist() == [[20, 600]] and point.get_marker() == "o"
    plot.curves.save(figure, tmp_path / "out.svg", "a & b")
    texts = [e.text for e in ET.parse(tmp_path / "out.svg").getroot().iter() if e.text]
    assert {"roof", "matmul", "a & b", "FLOP a byte", "GFLOP/s", "0.1", "1000"} <= set(texts)
    assert not any("$" in text for text in texts)
