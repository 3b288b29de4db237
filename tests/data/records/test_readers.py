"""What readers make of files that have two forms, and of what a format adds of its own."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_chat import make_tokenizer

from sftjax.data import DataError, encode, open_source
from sftjax.data.mixing.stream import sample
from sftjax.data.records import readers

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


def test_a_damaged_part_of_arrow_is_refused(tmp_path):
    """Offsets that point outside of their texts, and bytes that are no UTF-8."""
    offsets = pa.py_buffer(np.array([0, 1, 2, 10**6, 4], np.int32))
    far = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"abcd"))
    offsets = pa.py_buffer(np.array([0, 1, 2, 3, 4], np.int32))
    bytes_ = pa.StringArray.from_buffers(4, offsets, pa.py_buffer(b"ab\xffd"))
    for name, column in {"far": far, "bytes": bytes_}.items():
        table, path = pa.table({"text": column}), tmp_path / f"{name}.arrow"
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        source = open_source(path)
        assert [source[i]["text"] for i in (0, 1)] == ["a", "b"]
        with pytest.raises(DataError, match=rf"{name}.arrow:3: damaged: .*") as error:
            source[2]
        assert error.value.where == source.where(2)
        with pytest.raises(DataError, match=f"{name}.arrow: damaged: "):
            list(readers.Arrow.stream(path, 0))


def test_a_date_that_python_has_not(tmp_path):
    pq.write_table(pa.table({"at": pa.array([0, 2**60], pa.timestamp("us"))}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert source[0]["at"].year == 1970
    with pytest.raises(DataError, match=r"a.parquet:2: not read: "):
        source[1]


def test_a_column_whose_name_is_no_text(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"prompt": ["a"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"prompt", b"prom\xfft"))
    with pytest.raises(DataError, match="a.parquet: not a readable Parquet file: 'utf-8' codec"):
        open_source(path)
