import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftjax.data import DataError, open_source
from sftjax.data.records import sources as sources_lib


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def records(source):
    return [source[i] for i in range(len(source))]


def test_jsonl_skips_blank_lines_and_counts_them(tmp_path):
    path = write(tmp_path / "a.jsonl", '\ufeff{"x": 1}\r\n\n   \n{"x": "zwei ✓"}\n\t\n{"x": 3}')
    source = open_source(path)
    assert records(source) == [{"x": 1}, {"x": "zwei ✓"}, {"x": 3}]
    assert [source.where(i) for i in range(3)] == [f"{path}:{n}" for n in (1, 4, 6)]
    assert source[-1] == {"x": 3} and source[1:] == [{"x": "zwei ✓"}, {"x": 3}]
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.parametrize(
    "text", ['[{"x": 1}, {"x": 2}]', '{"data": [{"x": 1}, {"x": 2}], "v": 3}', '{"x":1}\n{"x":2}\n']
)
def test_json(tmp_path, text):
    assert records(open_source(write(tmp_path / "a.json", text))) == [{"x": 1}, {"x": 2}]


def test_parquet_csv_tsv(tmp_path):
    rows = [{"q": "a", "n": [1, 2]}, {"q": None, "n": []}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    assert records(open_source(tmp_path / "a.parquet")) == rows
    csv = open_source(write(tmp_path / "a.csv", 'q,a\n"two\nlines, ""x""",b\n\nc,d\n'))
    assert records(csv) == [{"q": 'two\nlines, "x"', "a": "b"}, {"q": "c", "a": "d"}]
    tsv = open_source(write(tmp_path / "a.tsv", 'q\ta\n" lone quote\tb\n'))
    assert records(tsv) == [{"q": '" lone quote', "a": "b"}]
    assert tsv.where(0).endswith("a.tsv:2")


def test_many_files_globs_folders_and_limit(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, f'{{"x": "{name}"}}\n' * 2)
    a, b = {"x": "a.jsonl"}, {"x": "b.jsonl"}
    assert records(open_source(f"{tmp_path}/b.jsonl, {tmp_path}/a.jsonl")) == [b, b, a, a]
    assert records(open_source(f"{tmp_path}/*.jsonl")) == [a, a, b, b]
    assert records(open_source(tmp_path)) == [a, a, b, b]
    source = open_source(tmp_path, limit=3)
    assert records(source) == [a, a, b]
    assert source.where(2).endswith("b.jsonl:1")
    assert len(open_source(tmp_path, limit=9)) == 4


def test_fingerprint_follows_the_content(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", '{"x": 1}')
    first = open_source(path).fingerprint()
    assert open_source(path).fingerprint() == first
    write(tmp_path / "a.jsonl", '{"x": 2}')
    assert open_source(path).fingerprint() != first
    monkeypatch.setattr(sources_lib, "BIG_FILE", 1)  # then by path, size and time
    assert open_source(path).fingerprint() == open_source(path).fingerprint() != first


BAD_FILES = [
    ("a.jsonl", "", "a.jsonl: the file is empty"),
    ("a.jsonl", "\n \n", "a.jsonl: the file holds no row"),
    ("a.jsonl", '{"x": 1}\n{"x": 2,}\n', "a.jsonl:2: malformed JSON at column "),
    ("a.jsonl", '{"x": 1}\n{"x": ', "a.jsonl:2: malformed JSON at column 7"),
    ("a.jsonl", '{"prompt": "one" "x": 2}', """near '{"prompt": "one" "x": 2}'"""),
    ("a.jsonl", "[1, 2]\n", r"a.jsonl:1: the row is '[1, 2]' (list), expected an object such as"),
    ("a.jsonl", '"text"\n', "a.jsonl:1: the row is 'text' (str), expected an object"),
    ("a.jsonl", b'{"x": "\xff"}\n', "a.jsonl:1: not UTF-8 at byte 7; save the file as UTF-8"),
    ("a.json", '{"x": 1', "a.json:1: malformed JSON at column 8"),
    (
        "a.json",
        '{"x": 1, "y": 2}',
        "a.json: expected a list of objects, or an object with one list",
    ),
    ("a.json", "[1]", "a.json:1: the row is '1' (int), expected an object"),
    ("a.json", "[]", "a.json: the file holds no row"),
    ("a.csv", "q,a\n", "a.csv: the file holds no row"),
    ("a.csv", "q,a\n1,2,3\n", "a.csv:2: 3 fields, but the header has 2 (q, a); the row begins '1'"),
    ("a.csv", 'q,a\n"x,1\n', "a.csv:2: malformed: unexpected end of data"),
    ("a.tsv", "q\ta\nonly\n", "a.tsv:2: 1 fields, but the header has 2"),
    ("a.parquet", "PAR", "a.parquet: not a readable Parquet file"),
    ("a.txt", "x", "a.txt: unknown kind of file '.txt'; known: .jsonl, .ndjson, .json, .parquet"),
]


@pytest.mark.parametrize("name, text, message", BAD_FILES)
def test_bad_file(tmp_path, name, text, message):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError) as error:
        records(open_source(path))
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_absent(tmp_path):
    for spec in ("data/none.jsonl", f"{tmp_path}/none.jsonl", "none.parquet", f"{tmp_path}/*.csv"):
        with pytest.raises(DataError, match="no such file; check data.train"):
            open_source(spec)
    with pytest.raises(DataError, match="no data file is named; set data.train=FILE"):
        open_source("")
    with pytest.raises(DataError, match="no data file in this folder"):
        open_source(tmp_path)


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train.jsonl", "test.jsonl"):
        write(tmp_path / name, "{}\n")
    with pytest.raises(DataError, match=r"several splits \(test.jsonl, train.jsonl\); name the"):
        open_source(tmp_path)


def test_a_record_for_each_element_of_nested_lists(tmp_path):
    rows = [
        {"title": "t", "parts": [{"context": "c", "qas": [{"q": 1}, {"q": 2}]}]},
        {"title": "u", "parts": []},
        {"title": "v", "parts": [{"context": "d", "qas": []}, {"context": "e", "qas": [{"q": 3}]}]},
    ]
    path = tmp_path / "a.jsonl"
    write(path, "\n".join(map(json.dumps, rows)))
    source = open_source(f"{path}#parts.qas")
    assert records(source) == [
        {"title": "t", "context": "c", "q": 1},
        {"title": "t", "context": "c", "q": 2},
        {"title": "v", "context": "e", "q": 3},
    ]
    assert source.where(2) == f"{path}:3#parts.1.qas.0"
    assert [len(open_source(f"{path}{lists}")) for lists in ("", "#parts")] == [3, 3]
    prints = {open_source(f"{path}{lists}").fingerprint() for lists in ("", "#parts", "#parts.qas")}
    assert len(prints) == 3
    with pytest.raises(DataError, match=r"a.jsonl:1: #part is 'null', expected a list of objects"):
        open_source(f"{path}#part")
    with pytest.raises(DataError, match="a.jsonl:1: 't' is no object|#title is 't', expected a l"):
        open_source(f"{path}#title")
    write(tmp_path / "empty.jsonl", json.dumps({"parts": []}))
    with pytest.raises(DataError, match="empty.jsonl: #parts holds no element in any row"):
        open_source(f"{tmp_path / 'empty.jsonl'}#parts")
    named = tmp_path / "b#parts.jsonl"  # a file's own name counts first
    write(named, json.dumps(rows[0]))
    assert records(open_source(named)) == rows[:1]


def hub(tmp_path, monkeypatch, names):
    import huggingface_hub

    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, json.dumps({"x": name}) + "\n")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(tmp_path))


def test_hub_id(tmp_path, monkeypatch):
    hub(tmp_path, monkeypatch, ["data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl"])
    assert [r["x"][5:12] for r in records(open_source("org/name"))] == ["train-0", "train-1"]
    assert [r["x"][5:11] for r in records(open_source("org/name:test"))] == ["test-0"]
    with pytest.raises(DataError, match="org/name: no file of split 'dev'; it holds: data/test-0"):
        open_source("org/name:dev")


def test_hub_that_can_not_be_reached(monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="org/name: no such local file, and as a hub data set"):
        open_source("org/name")


def test_real_files(fixtures):
    gsm8k = open_source(fixtures / "gsm8k" / "train.jsonl")
    assert len(gsm8k) == 6473 and set(gsm8k[6472]) == {"question", "answer"}
    sst2 = open_source(fixtures / "sst2" / "train.tsv")
    assert len(sst2) == 60000 and {r["label"] for r in records(sst2)} == {"0", "1"}
    assert len(open_source(fixtures / "oasst-en-100" / "en_100_tree.jsonl")) == 80
