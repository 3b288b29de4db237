"""What a run is: differences of data, by file and row; manifests that are torn."""

import json
import re

import numpy as np
import pytest
from test_chat import make_tokenizer

from sftjax.data import build_store, open_source
from sftjax.data.token_store import facts_of
from sftjax.errors import CheckpointError
from sftjax.tasks.causal_lm import CausalLM
from sftjax.training.checkpoint import Checkpointer
from sftjax.training.identity import check_manifest, compare, compare_rows

TASK = CausalLM(make_tokenizer())
ROWS = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(30)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def facts(tmp_path, spec, cached=True):
    source = open_source(spec)
    store = build_store(source, TASK, 0, "truncate_end", tmp_path / "cache")
    assert len(np.load(store.folder / "rows.npy")) == len(source)
    return facts_of(source, store if cached else None)


def edited(rows, *places):
    return [row | {"completion": "new"} if i in places else row for i, row in enumerate(rows)]


CHANGES = [
    (ROWS + ROWS[:12], "42 rows instead of 30, the first difference at row 31"),
    (ROWS[:5] + ROWS[:1] + ROWS[5:], "31 rows instead of 30, the first difference at row 6"),
    (ROWS[1:], "29 rows instead of 30, the first difference at row 1"),
    (ROWS[:25], "25 rows instead of 30, the first difference at row 26"),
    (edited(ROWS, 16), "the first difference at row 17"),
    (edited(ROWS, 3, 20), "the first difference at row 4"),
    (ROWS[:3] + ROWS[3:8][::-1] + ROWS[8:], "the first difference at row 4"),
    (edited(ROWS, 2)[:9], "9 rows instead of 30, the first difference at row 3"),
]


@pytest.mark.parametrize("rows, text", CHANGES, ids=str)
def test_what_became_of_a_files_rows(tmp_path, rows, text):
    path = tmp_path / "train.jsonl"
    write(path, ROWS)
    old = json.loads(json.dumps(facts(tmp_path, path)))
    assert not compare(old, facts(tmp_path, path))
    write(path, rows)
    new = facts(tmp_path, path)
    assert re.fullmatch(f"train.jsonl: {text}", compare(old, new))
    # Without the cache, by sizes and hashes of the files.
    less = compare(old | {"store": ""}, new)
    if len(rows) == len(ROWS):
        assert re.fullmatch(r"train.jsonl was edited \([\d,]+ bytes there, [\d,]+ now\)", less)
    else:
        assert less == f"train.jsonl has {len(rows)} rows instead of 30"


def test_which_of_several_files_differs(tmp_path):
    a, b, c = (tmp_path / f"{name}.jsonl" for name in "abc")
    write(a, ROWS)
    write(b, ROWS[:7])
    old = facts(tmp_path, f"{a},{b}")
    write(b, edited(ROWS[:7], 4))
    assert compare(old, facts(tmp_path, f"{a},{b}")) == ("b.jsonl: the first difference at row 5")
    write(b, ROWS[:7])
    assert compare(old, facts(tmp_path, f"{b},{a}")) == "the same files in another order"
    write(c, ROWS[:2])
    assert compare(old, facts(tmp_path, f"{a},{c}")) == ("c.jsonl is new; b.jsonl is not there any more")


def test_rows_that_are_a_part_of_their_files(tmp_path):
    """Of a limit, a split or cleaning, whose rows have other numbers than the file's."""
    path = tmp_path / "d.jsonl"
    write(path, ROWS)
    source = open_source(path, 10)
    old = facts_of(source, build_store(source, TASK, 0, "truncate_end", tmp_path / "cache"))
    source = open_source(path, 20)
    new = facts_of(source, build_store(source, TASK, 0, "truncate_end", tmp_path / "cache"))
    assert compare(old, new) == "d.jsonl: 20 rows instead of 10, the first difference at row 11"
    assert compare(old | {"store": "gone"}, new) == "other rows of the same files"


def test_rows_by_their_hashes():
    a = np.arange(100, dtype=np.uint32)
    assert compare_rows(a, a) == "" == compare_rows(a[:0], a[:0])
    assert compare_rows(a[:0], a) == "100 rows instead of 0, the first difference at row 1"
    assert compare_rows(a, a[:0]) == "0 rows instead of 100, the first difference at row 1"


def manifest(identity=None, **facts):
    return dict(identity=identity or {"tokenised data": "a"}, **facts)


def source(rows=3, sha="x"):
    entry = dict(name="t.jsonl", bytes=10, rows=rows, sha256=sha)
    return {"rows": rows, "files": [entry], "store": ""}


def test_the_refusal_names_sources_and_what_else_differs(tmp_path):
    hashes = {"the tokenizer": "1", "the model's config.json": "1"}
    old = manifest({"tokenised data": "a", "model": "1"}, data={"train": source()}, hashes=hashes)
    check_manifest(tmp_path, old)
    check_manifest(tmp_path, old)
    new = manifest(
        {"tokenised data": "b", "model": "2"},
        data={"train": source(5), "more": source()},
        hashes={"the tokenizer": "1", "the model's config.json": "2"},
    )
    with pytest.raises(CheckpointError) as e:
        check_manifest(tmp_path, new)
    assert str(e.value).splitlines()[1:] == [
        "  more: new",
        "  train: t.jsonl has 5 rows instead of 3",
        "  the model's config.json is another",
        "Use another workdir, or put back what differs to resume that run.",
    ]
    with pytest.raises(CheckpointError, match=r"tokenised data: 'a' there, 'b' now\n.*this ver"):
        check_manifest(tmp_path, manifest({"tokenised data": "b", "model": "1"}, data={"train": source()}))


def test_evaluation_sets_may_differ_and_it_is_said(tmp_path, caplog):
    check_manifest(tmp_path, manifest(evaluation={"validation": source(), "test": source()}))
    assert not caplog.text
    check_manifest(tmp_path, manifest(evaluation={"validation": source(4), "test": source()}))
    assert "validation: t.jsonl has 4 rows instead of 3" in caplog.text
    caplog.clear()
    check_manifest(tmp_path, manifest(evaluation={"validation": source(4), "test": source()}))
    assert not caplog.text  # said once


def test_the_number_of_steps_may_grow_only(tmp_path):
    for steps in (10, 10, 12):
        check_manifest(tmp_path, manifest(steps=steps))
    with pytest.raises(CheckpointError, match="run of 12 steps, and this one has 11: train.durat"):
        check_manifest(tmp_path, manifest(steps=11))


def test_a_manifest_of_an_older_version_is_completed(tmp_path):
    old = {"identity": {"tokenised data": "a"}, "config_sha256": ""}
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    new = manifest({"tokenised data": "a", "model": "m"}, data={"train": source()}, steps=3)
    check_manifest(tmp_path, new)
    found = json.loads((tmp_path / "manifest.json").read_text())
    assert found == new


TORN = [b"", b"{", b'{"identity": {"tokenised', b"\xff\xfe\x00", b"[]", b"5", b"{}", b"null"]
TORN += [b'{"identity": 3}', b"[" * 100_000]


@pytest.mark.parametrize("content", TORN, ids=lambda x: repr(x[:20]))
def test_a_torn_manifest_is_an_error_with_a_fix(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"manifest.json .*Put back an intact copy.*anew"):
        Checkpointer(tmp_path, manifest=manifest())
    (tmp_path / "manifest.json").unlink()
    Checkpointer(tmp_path, manifest=manifest()).close()


JUNK = [None, 3, [], {"train": 3}, {"train": {}}, {"train": {"files": 3, "rows": 1, "store": ""}}]
JUNK += [{"train": {"files": [3], "rows": "x", "store": 5}}, {"train": None}]


@pytest.mark.parametrize("junk", JUNK, ids=str)
def test_junk_in_what_explains_a_difference_does_no_harm(tmp_path, junk):
    old = manifest(data=junk, evaluation=junk, hashes=junk, steps=junk)
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    new = dict(data={"train": source()}, evaluation={"train": source()}, hashes={"a": "b"})
    with pytest.raises(CheckpointError, match="another run"):
        check_manifest(tmp_path, manifest({"tokenised data": "b"}, **new))
    check_manifest(tmp_path, manifest(**new, steps=3))
