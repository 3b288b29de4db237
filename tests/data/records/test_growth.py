"""Files that are not what their size says: compressed ones that grow, and ones without an end."""

import gzip
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftjax.data import DataError, open_source
from sftjax.data.records import readers
from sftjax.data.records.readers import JsonLines, Parquet

ROW = json.dumps({"prompt": "a", "completion": "b"}).encode() + b"\n"


def write(path, data, times=1):
    """`data` many times, compressed by the name's end; written in pieces."""
    if path.suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=6) as file:
            for _ in range(times):
                file.write(data)
    else:
        with pa.output_stream(path, compression="zstd") as file:
            for _ in range(times):
                file.write(data)
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("streamed", [True, False])
def test_a_file_that_grows_without_bounds(tmp_path, suffix, streamed):
    """Of 400 MB no more is held than the limit says, and a long line ends no later."""
    path = write(tmp_path / f"d.jsonl{suffix}", b" " * 2**20, times=400)
    tracemalloc.start()
    with pytest.raises(DataError) as caught:
        list(JsonLines.stream(path, 0)) if streamed else open_source(str(path))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * (readers.GROWTH_BYTES + readers.GROWTH * path.stat().st_size)
    tool = "gunzip -k" if suffix == ".gz" else "zstd -d"
    assert str(caught.value).startswith(f"{path}: unpacked, the file has more than ")
    assert f"unpack it first ({tool} d.jsonl{suffix}) and name d.jsonl" in str(caught.value)
    assert caught.value.kind == "grown"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_grows_as_text_does_is_read(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(readers, "GROWTH_BYTES", 0)
    path = tmp_path / f"d.jsonl{suffix}"
    write(path, b"".join(json.dumps({"text": os.urandom(40).hex()}).encode() + b"\n"
                         for _ in range(1000)))  # fmt: skip
    assert len(open_source(str(path))) == len(list(JsonLines.stream(path, 0))) == 1000
    write(path, ROW * 10_000)
    with pytest.raises(DataError, match="over 100 times its size"):
        open_source(str(path))
    monkeypatch.undo()  # a small file may grow as it likes
    assert len(open_source(str(path))) == 10_000


def test_parquet_that_grows_without_bounds(tmp_path, monkeypatch):
    path = tmp_path / "d.parquet"
    table = pa.table({"text": ["a" * 10**6] * 20})
    pq.write_table(table, path, compression="zstd", use_dictionary=False)
    assert len(open_source(str(path))) == 20
    monkeypatch.setattr(readers, "GROWTH_BYTES", 0)
    for read in (lambda: open_source(str(path)), lambda: list(Parquet.stream(path, 0))):
        with pytest.raises(DataError, match="over 1000 times its size; if it is meant to, unpack"):
            read()


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_without_an_end(tmp_path, name, kind):
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    for spec in (path, tmp_path):  # by its name, and as a file of a folder
        with pytest.raises(DataError, match=rf"{name} is a .*, expected a regular file"):
            open_source(str(spec))
