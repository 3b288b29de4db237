"""`sftjax compare`: settings that differ, and differences of the same rows."""

import base64
import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from sftjax.errors import DataError, NotFoundError
from sftjax.reports import compare
from sftjax.reports.compare import Measured, differences, paired


def run(folder, lr, right, loss, records=None):
    """A finished run's files."""
    folder.mkdir()
    n = len(right)
    after = {"losses": {"dev/accuracy": float(np.mean(right)), "dev/loss": float(np.mean(loss))}}
    rows = {"record": records or list(range(n)), "accuracy": list(right), "loss": list(loss)}
    config = {"optim": {"lr": lr}, "task": "classification", "seed": 0}
    for name, value in {
        "result.json": {"before": after, "after": after, "steps": 3},
        "rows.json": {"dev": rows},
        "config.json": config,
    }.items():
        (folder / name).write_text(json.dumps(value))
    return folder


@pytest.fixture
def pair(tmp_path):
    rng = np.random.default_rng(0)
    loss = rng.gamma(1.0, 1.0, 200)
    right = (np.arange(200) % 2).astype(float)
    better = np.maximum(right, (np.arange(200) % 10 == 0).astype(float))
    return run(tmp_path / "a", 1e-4, right, loss), run(tmp_path / "b", 2e-4, better, loss * 0.9)


def test_rows_are_compared_with_rows(pair):
    [a], [b] = map(compare.read, pair)
    found = {one.metric: one for one in differences(a, b)}
    accuracy, loss = found["dev/accuracy"], found["dev/loss"]
    assert (accuracy.n, accuracy.mean, accuracy.better) == (200, pytest.approx(0.1), "b")
    assert accuracy.p == pytest.approx(2 * 0.5**20)  # McNemar: 20 rows changed, all to the better
    x = 0.9 * np.array(a.rows["dev"]["loss"]) - np.array(a.rows["dev"]["loss"])
    assert loss.p == pytest.approx(stats.ttest_1samp(x, 0).pvalue) and loss.better == "b"
    low, high = stats.t.interval(0.95, 199, x.mean(), stats.sem(x))
    assert (loss.low, loss.high) == pytest.approx((low, high))
    assert [one.better for one in differences(b, a)] == ["a", "a"]


def test_what_is_the_same_is_not_better(pair):
    [a], _ = map(compare.read, pair)
    for one in differences(a, a):
        assert (one.mean, one.p, one.better) == (0, 1, "")
    assert paired([1.0], [0.0])[:2] == (1, -1.0) and paired([1.0], [0.0])[4] == 1.0


def test_a_metric_is_held_to_less_where_there_are_several():
    base = np.zeros(100)
    shift = 0.1 + 0.4 * (-1.0) ** np.arange(100)  # Student's t is 2.5, p 0.014
    rows = lambda values, n: {"record": [0] * 100} | {f"m{i}": values for i in range(n)}  # noqa: E731
    for n, called in ((1, True), (5, False)):
        a, b = (Measured("", {}, {}, {"s": rows(x.tolist(), n)}) for x in (base, shift))
        found = differences(a, b)
        assert 0.025 / 5 < found[0].p < 0.025 and all(bool(d.better) == called for d in found)


def test_a_unanimous_result_is_as_likely_as_its_coin_throws():
    for n in (2, 5, 8):
        rows, mean, low, high, p = paired([0.0] * n, [1.0] * n)
        assert (rows, mean, p) == (n, 1.0, pytest.approx(2 * 0.5**n)) and math.isnan(low + high)
        assert paired([0.0] * n, [0.25] * n)[4] == pytest.approx(2 * 0.5**n)


def test_rows_that_share_a_group_are_not_independent():
    rng, called = np.random.default_rng(0), 0
    groups = np.repeat(np.arange(20), 10).tolist()
    for _ in range(200):
        a, b = (np.repeat(rng.normal(size=20), 10) for _ in range(2))
        called += paired(a, b, groups=groups)[4] < 0.025
    assert called <= 12  # of 200 at 2.5%; 109 without the groups


def test_a_mean_of_tokens_is_compared_as_one():
    weights = np.array([1.0] * 99 + [1000.0])
    a = np.full(100, 1.7) + 0.01 * np.random.default_rng(0).normal(size=100)
    b = a + np.where(weights > 1, -0.1, 0.1)
    mean, low, high = paired(a, b, weights=[weights, weights])[1:4]
    assert mean == pytest.approx((0.1 * 99 - 100) / 1099) and low < mean < high < 0
    assert paired(a, b)[1] > 0  # of documents it would be the other way round


def test_rows_are_of_the_same_files_and_shared(tmp_path, pair):
    other = run(tmp_path / "c", 1e-4, [1.0] * 200, [1.0] * 200, list(range(1, 201)))
    [a], [c] = compare.read(pair[0]), compare.read(other)
    assert [one.n for one in differences(a, c)] == [199, 199]
    apart = run(tmp_path / "d", 1e-4, [1.0] * 200, [1.0] * 200, list(range(200, 400)))
    [d] = compare.read(apart)
    assert differences(a, d) == [] and compare.left_out(a, d) == ["dev: no row in common"]
    assert "B and A have no rows in common" in compare.text([a, d])
    pieces = Measured("", {}, {}, {"dev": c.rows["dev"] | {"record": [0, *range(199)]}})
    assert differences(a, pieces) == []
    assert compare.left_out(a, pieces) == ["dev: rows in other pieces"]
    for side, of in ((a, "1"), (c, "2")):
        side.rows["dev"]["about"] = {"of": of, "lower": ["loss"]}
    assert differences(a, c) == [] and compare.left_out(a, c) == ["dev: measured on other files"]
    assert "dev: measured on other files" in compare.text([a, c])


def test_lower_is_better_where_the_task_says_so_and_nan_is_said():
    side = lambda value: Measured(  # noqa: E731
        "", {}, {}, {"s": {"record": list(range(50)), "brier": [value] * 49 + [value + 0.01],
                           "odd": [1.0] * 49 + [None], "about": {"lower": ["brier"]}}}
    )  # fmt: skip
    [found] = differences(side(0.5), side(0.1))
    assert (found.metric, found.better) == ("s/brier", "b")
    assert compare.left_out(side(0.5), side(0.1)) == ["s/odd: not a number in some rows"]
    assert json.dumps(compare.as_json([side(0.5), side(0.1)]), allow_nan=False)


def test_the_command(pair, capsys):
    compare.main([str(pair[0]), str(pair[1])])
    lines = capsys.readouterr().out.splitlines()
    [setting] = [x.split() for x in lines if "optim.lr" in x]
    assert setting == ["optim.lr", "0.0001", "0.0002"] and not any("seed" in x for x in lines)
    assert any("+10.0 points" in x and "B is better" in x for x in lines)
    compare.main([str(pair[0]), str(pair[1]), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"optim.lr": [1e-4, 2e-4]}
    assert [d["better"] for d in found["differences"][0]] == ["b", "b"]


def test_a_page_lays_the_curves_over_each_other(pair, tmp_path, capsys):
    for n, folder in enumerate(pair):
        lines = [{"step": i, "loss": 2 - i / 10 - n, "dev/loss": 1.5} for i in range(1, 9)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    compare.main([*map(str, pair), f"--html={tmp_path / 'page.html'}"])
    assert "B is better" in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    [data] = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    svg = base64.b64decode(data).decode()
    for name in ("A a train", "A a dev", "B b train", "B b dev"):
        assert re.search(rf">{name} [0-9.]+<", svg)
    assert "<td>optim.lr</td><td>0.0001</td><td>0.0002</td>" in text and "B is better" in text
    assert "img-src data:" in text and "script-src 'none'" in text


def test_files_of_evaluate(tmp_path, capsys):
    one = dict(data="/x/dev.tsv", n=2, metrics={"loss": 1.0}, rows={"dev": {"record": [0, 1]}})
    file = tmp_path / "e.json"
    file.write_text(json.dumps({"results": [one | {"model": "m1"}, one | {"model": "m2"}]}))
    assert [side.name for side in compare.read(file)] == ["m1", "m2"]
    assert compare.read(file)[0].values == {"dev/loss": 1.0}
    compare.main([str(file)])
    assert "  A  m1\n  B  m2\n" in capsys.readouterr().out
    file.write_text("[]")
    with pytest.raises(DataError, match="no result of sftjax evaluate --out"):
        compare.read(file)
    with pytest.raises(NotFoundError, match="is no workdir and no file"):
        compare.read(tmp_path / "none")
    (tmp_path / "w").mkdir()
    with pytest.raises(NotFoundError, match=r"has no result.json"):
        compare.read(tmp_path / "w")
