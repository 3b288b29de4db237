"""What readers make of files that have two forms, and of what a format adds of its own."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_chat import make_tokenizer

from sftjax.data import encode, open_source
from sftjax.data.mixing.stream import sample

QUOTED = [
    ('q\ta\n"She wrote ""stop""."\t"""stop"" it was"\nplain\tfine\n', 'She wrote "stop".'),
    ('q\ta\r\n"two\ttabs"\tb\r\n', "two\ttabs"),
    ('q\ta\n"two\nlines"\tb\n', "two\nlines"),
    ('"q"\t"a"\n"every field"\t"in quotes"\n', "every field"),
    ('\ufeffq\ta\n"a ""b"""\tc', 'a "b"'),
]
LITERAL = [
    ('q\ta\n" lone quote\tb\n', '" lone quote'),
    ('q\ta\n"begins here\tb\nand ends "\tc\n', '"begins here'),
    ('q\ta\nsay "a" twice\t"b ""c"""\n', 'say "a" twice'),
    ('q\ta\n"one of a few"\tb\n', '"one of a few"'),
]


@pytest.mark.parametrize("text, first", QUOTED)
def test_quotes_of_a_tsv_that_has_them_as_csv_does(tmp_path, caplog, text, first):
    (tmp_path / "a.tsv").write_bytes(text.encode())
    assert open_source(tmp_path / "a.tsv")[0]["q"] == first
    assert not caplog.records


@pytest.mark.parametrize("text, first", LITERAL)
def test_quotes_of_a_tsv_that_are_its_text(tmp_path, caplog, text, first):
    (tmp_path / "a.tsv").write_bytes(text.encode())
    assert open_source(tmp_path / "a.tsv")[0]["q"] == first
    wrapped = any(f[:1] == f[-1:] == '"' for line in text.split("\n") for f in line.split("\t"))
    assert [r.getMessage() for r in caplog.records] == [
        "fields that are wrapped in quotes are read with their quotes, as others have quotes of "
        f"their own: in 1 row, first in {tmp_path}/a.tsv:2"
    ] * wrapped


CALLS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    for call in (
        {"function": {"name": "depth", "arguments": {"lake": "Orel", "units": ["m", None]}}},
        {"function": {"name": "height", "arguments": {"tower": "Vask"}}},
    )
]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_nulls_that_arrow_fills_structs_with_are_none_of_the_file(tmp_path, suffix):
    rows = [row | {"note": None} for row in CALLS]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert list(open_source(path)) == rows
    assert list(sample(str(path))) == rows


def test_a_null_that_a_file_of_json_holds_is_kept(tmp_path):
    arguments = {"lake": "Orel", "unit": None}
    call = {"function": {"name": "depth", "arguments": arguments}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}
    row["messages"][1]["tool_calls"] = [call]
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    [read] = open_source(tmp_path / "a.jsonl")
    assert read == row
    template = "{% for m in messages %}{{ m | tojson }}</s>{% endfor %}"
    text = encode(read, make_tokenizer(template)).text
    assert '"arguments": {"lake": "Orel", "unit": null}' in text


def test_json_gz_holds_lines(tmp_path):
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'{"x": 1}\n{"x": 2}\n'))
    assert list(open_source(tmp_path / "a.json.gz")) == [{"x": 1}, {"x": 2}]
    assert len(sample(str(tmp_path / "a.json.gz"))) == 2
