"""The loss curve: what is drawn holds each series, and the file is one readable SVG."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from sftjax.reports import curves
from sftjax.reports.curves import COLOURS, loss_figure, read_losses, running_mean, save


def drawn(figure):
    """{colour: its lines}, and the texts of the legend."""
    (axes,) = figure.axes
    lines = {}
    for line in axes.lines:
        lines.setdefault(line.get_color(), []).append(line)
    legend = [text.get_text() for one in figure.legends for text in one.get_texts()]
    return lines, legend


def test_each_series_is_drawn_with_its_last_value():
    validation = [(0, 9.5), (2, 7.0)]  # step 0 is the model before it is trained
    series = {"b/loss": validation, "loss": [(1, 9.0), (2, 8.12345)], "a/loss": [(2, 7.5)]}
    figure = loss_figure(series, "a & b")
    (axes,) = figure.axes
    assert [axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel()] == [
        "a & b", "step", "loss"
    ]  # fmt: skip
    lines, legend = drawn(figure)
    assert legend == ["train 8.123", "a 7.5", "b 7"]
    for colour, name in zip(COLOURS, ("loss", "a/loss", "b/loss"), strict=False):
        (line,) = lines[colour]
        assert line.get_xydata().tolist() == [list(point) for point in series[name]]
        assert (line.get_marker() != "") == (name != "loss")
    low, high = axes.get_ylim()
    assert 6 < low < 7 and 9.5 < high < 10  # not from zero
    assert axes.get_xlim()[0] < 0  # the point at step 0 is not cut by the axis


def test_a_long_train_loss_is_faint_under_its_mean():
    losses = np.random.default_rng(0).normal(2, 0.1, 500)
    lines, legend = drawn(loss_figure({"loss": list(enumerate(losses, 1))}, "t"))
    faint, mean = lines[COLOURS[0]]
    assert faint.get_alpha() < 0.5 and mean.get_alpha() is None
    np.testing.assert_array_equal(faint.get_ydata(), losses)
    np.testing.assert_array_equal(mean.get_ydata(), running_mean(losses, 10))
    assert len(legend) == 1


def test_running_mean():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    np.testing.assert_allclose(running_mean(values, 1), [3 / 2, 7 / 3, 14 / 3, 28 / 3, 12], rtol=1e-12)
    np.testing.assert_allclose(running_mean(values, 9), [31 / 5] * 5, rtol=1e-12)


@pytest.mark.parametrize("n", [0, 1, 3, 500])
def test_the_file_is_one_svg_the_same_each_time(tmp_path, n):
    sets = ["val<1>", "_hidden", "$x$ & 日本", "train"]  # names as they are, whatever they hold
    lines = [{"step": i + 1, "loss": 3 / (i + 1)} for i in range(n)]
    lines += [{"step": n} | {f"{s}/loss": 1.0 for s in sets} | {"val<1>/perplexity": 9}]
    lines += [{"step": n, "loss": None}]
    path, out = tmp_path / "metrics.jsonl", tmp_path / "curve.svg"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if n))
    save(loss_figure(read_losses(path), "a & b"), out, "a & b")
    first = out.read_bytes()
    save(loss_figure(read_losses(path), "a & b"), out, "a & b")
    assert out.read_bytes() == first and b"date" not in first
    root = ElementTree.fromstring(first)
    assert root.find("{*}title").text == "a & b"
    texts = [e.text for e in root.findall(".//{*}text")]
    assert {"a & b", "step", "loss"} <= set(texts)
    for name in sets:
        assert (f"{name} 1" in texts) == (n > 0)
    assert (f"train {3 / max(n, 1):.4g}" in texts) == (n > 0)
    assert ("no loss was logged" in texts) == (n == 0)


def test_lines_that_hold_no_loss_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": null, "lr": 1}\n{"step": 2, "loss": 3, "v/loss": 4}\n{"st')
    assert read_losses(path) == {"loss": [(2, 3)], "v/loss": [(2, 4)]}


def test_one_step_has_whole_numbers_on_its_axis():
    figure = loss_figure({"loss": [(7, 1.0)]}, "t")
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())


PROGRAM = """
import sys
import sftjax
import sftjax.cli
import sftjax.train
loaded = [name for name in ("matplotlib", "sklearn") if name in sys.modules]
assert not loaded, loaded
from sftjax.reports import curves
figure = curves.loss_figure({"loss": [(1, 2.0)], "日本/loss": [(1, 2.0)]}, "t")
curves.save(figure, sys.argv[1], "t")
assert "matplotlib.pyplot" not in sys.modules
"""


def test_matplotlib_comes_late_and_says_nothing(tmp_path, monkeypatch):
    """Also where it builds its cache of fonts for the first time, and can keep it nowhere."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "file"))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "curve.svg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "svg" in (tmp_path / "curve.svg").read_text()
    told = [line for line in done.stderr.splitlines() if "[transformers]" not in line]
    assert (done.stdout, told) == ("", [])


def test_the_user_s_own_style_is_left_alone(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 9, "svg.fonttype": "path"}):
        figure = loss_figure({"loss": [(1, 2.0), (2, 1.0)]}, "t")
        curves.save(figure, tmp_path / "curve.svg", "t")
        assert matplotlib.rcParams["lines.linewidth"] == 9
    assert figure.axes[0].lines[0].get_linewidth() < 3
    assert "<text" in (tmp_path / "curve.svg").read_text()


def test_a_reliability_picture_has_a_point_a_bin():
    bins = [
        dict(share=0.25, confidence=0.6, accuracy=0.5),
        dict(share=0.75, confidence=0.9, accuracy=1.0),
    ]
    [axes] = curves.reliability_figure(bins, "Reliability").axes
    points = axes.collections[0].get_offsets()
    assert points.tolist() == [[0.6, 0.5], [0.9, 1.0]] and axes.get_title("left") == "Reliability"
    assert axes.collections[0].get_sizes().tolist() == [120.0, 320.0]


def test_an_overlay_has_a_line_for_each_loss_of_each_run():
    runs = {"A": {"loss": [(1, 2.0), (2, 1.0)], "dev/loss": [(2, 1.5)]}, "B": {"loss": [(1, 3.0)]}}
    figure = curves.overlay_figure(runs, "Loss")
    lines = figure.axes[0].lines
    assert [text.get_text() for text in figure.legends[0].texts] == ["A train 1", "A dev 1.5", "B train 3"]
    assert [line.get_linestyle() for line in lines] == ["-", "--", "-"]
    assert lines[0].get_color() == lines[1].get_color() != lines[2].get_color()
