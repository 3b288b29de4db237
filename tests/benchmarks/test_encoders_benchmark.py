"""benchmarks/encoders.py: the same sentences on both sides, and its quick mode beside torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    import encoders

    return encoders


@pytest.fixture
def sentences(bench, fixtures):
    data = str(fixtures / "sst2" / "train.tsv")
    return bench.examples(str(fixtures / "minilm-l6"), data, 60)


@pytest.mark.parametrize("width", [64, 128])
def test_rows_hold_the_sentences_of_the_padded_batches(bench, sentences, width):
    task, docs = sentences
    rows = bench.packed(task, docs, width, 3)
    assert {b["tokens"].shape[1] for b in rows} == {width} and len(rows) == 3
    ours = sorted(
        tuple(batch["tokens"][r][batch["segments"][r] == n].tolist())
        for batch in rows
        for r in range(len(batch["tokens"]))
        for n in range(1, batch["segments"][r].max() + 1)
    )
    labels = sum(b["targets"][b["weights"] > 0].sum() for b in rows)
    for by_length in (False, True):
        batches = bench.padded(docs, 3, 0 if by_length else bench.FIXED, by_length)
        theirs = sorted(
            tuple(ids[mask > 0].tolist())
            for b in batches
            for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
        )
        assert theirs == ours and sum(b["labels"].sum() for b in batches) == labels


def test_batches_by_length_have_less_padding(bench, sentences):
    _, docs = sentences
    cells = lambda some: sum(b["input_ids"].size for b in some)  # noqa: E731
    longest = cells(bench.padded(docs, 6))
    assert cells(bench.padded(docs, 6, by_length=True)) < longest < 60 * bench.FIXED


@pytest.mark.parity
def test_quick_mode_has_both_sides_agree(bench, fixtures, tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "encoders.json"
    command = [sys.executable, str(BENCHMARKS / "encoders.py"), "--quick", "--threads=1"]
    command += [f"--model={fixtures / 'minilm-l6'}", f"--data={fixtures / 'sst2' / 'train.tsv'}"]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "XLA_FLAGS": ""}
    done = subprocess.run([*command, f"--out={out}"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    toy = json.loads(out.read_text())["results"]["toy"]
    theirs, ours = np.array(toy["losses"])
    np.testing.assert_allclose(ours, theirs, rtol=bench.ALLOWED)
    assert (np.diff(toy["losses"]) < 0).all()
    for way in ("padded", "sorted"):
        low, middle, high = toy[way]["processor time"]
        assert 0 < low <= middle <= high and toy[way]["sftjax_sentences_per_s"] > 0


@pytest.mark.parity
def test_other_work_is_an_error(bench, sentences, fixtures, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    task, docs = sentences
    bench.write_body(tmp_path, str(fixtures / "minilm-l6"), bench.TOY, 0.0)
    assert len(bench.same_losses(tmp_path, task, docs[:8])) == 2
    other = bench.packed
    monkeypatch.setattr(bench, "packed", lambda task, docs, *a: other(task, docs[:4], *a))
    with pytest.raises(ValueError, match="not the same work"):
        bench.same_losses(tmp_path, task, docs[:8])
