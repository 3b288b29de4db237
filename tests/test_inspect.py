import json
import re
import subprocess
import sys

import pytest
from test_chat import make_tokenizer

from sftjax.config import get_default
from sftjax.data import DataError
from sftjax.inspect_data import GREEN, PLAIN, inspect, main

ROWS = [
    {"prompt": "what is two?", "completion": "two <script>alert(1)</script> & four"},
    {"prompt": "x", "completion": "{{ y }} {0}"},
    {"prompt": "long " * 100, "completion": "lost"},
    {"prompt": "z", "completion": "four"},
]


@pytest.fixture
def config(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    config = get_default()
    config.model.path = config.data.tokenizer = str(tmp_path / "tokenizer")
    config.data.train = str(tmp_path / "d.jsonl")
    config.data.max_length = 128
    config.data.cache_dir = str(tmp_path / "cache")
    return config


def test_terminal(config):
    page = inspect(config, 3)
    assert f"assistant\n{GREEN}two <script>alert(1)</script> & four<|im_end|>{PLAIN}\n" in page
    assert re.search(r"d.jsonl:1, \d+ tokens\n", page)
    assert re.search(r"d.jsonl:3, \d+ tokens, dropped\n", page)
    assert re.search(rf"{re.escape(GREEN)}<\|im_end\|> +3 +1 +1 +\d+{re.escape(PLAIN)}\n", page)
    assert re.search(r"<\|im_start\|> +2 +0 +2 +0\n", page)  # the second document of the row
    assert "examples    4, 3 documents kept" in page
    assert "dropped     1 no_trained_token_left" in page
    assert "stop token  trained: yes, <|im_end|>" in page
    assert re.search(r"trained     \d+ tokens, \d+\.\d%", page)
    assert re.search(r"packing     \d+ rows of 128, \d+\.\d% full", page)


def test_without_colour(config):
    page = inspect(config, 1, color=False)
    assert "⟦two <script>" in page and "\033" not in page


def test_json(config):
    report = json.loads(inspect(config, 2, "json"))
    assert report["totals"]["examples"] == 4
    first = report["examples"][0]
    words = [t["token"] for t in first["tokens"] if t["weight"]]
    (start, stop), = first["spans"]  # fmt: skip
    assert "".join(words) == first["text"][start:stop]
    assert [t["position"] for t in first["tokens"]] == list(range(first["length"]))
    assert {t["segment"] for t in report["examples"][1]["tokens"]} != {0}


def test_html_is_escaped_and_self_contained(config):
    page = inspect(config, 4, "html")
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; four" in page
    assert '<span class="trained">{{ y }} {0}&lt;|im_end|&gt;</span>' in page
    assert not re.search(r"(src|href|url|@import)\s*[=(]", page) and "http" not in page
    assert page.count("<h2>") == 4 and page.count("<details>") == page.count("</details>") == 4


def test_nothing_is_written_where_no_cache_is_named(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config.data.cache_dir = ""
    inspect(config, 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_arguments(config):
    with pytest.raises(DataError, match="--format=pdf: expected terminal | json | html"):
        inspect(config, 1, "pdf")
    with pytest.raises(DataError, match="--set=other: expected train | validation | test"):
        inspect(config, 1, set="other")
    with pytest.raises(DataError, match="data.validation is empty"):
        inspect(config, 1, set="validation")


def test_command(config, tmp_path):
    file, out = tmp_path / "c.py", tmp_path / "page.html"
    file.write_text(
        "from sftjax.config import get_default\n"
        "def get_config(arg=''):\n"
        "    c = get_default()\n"
        f"    c.data.tokenizer = {config.data.tokenizer!r}\n"
        f"    c.data.train = {config.data.train!r}\n"
        "    return c\n"
    )
    command = [sys.executable, "-m", "sftjax.inspect_data", f"--config={file}", "--n=1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "examples    4, 4 documents kept" in shown
    main([*command[3:], "--format=html", f"--out={out}"])
    assert out.read_text().startswith("<!doctype html>")
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        main([*command[3:], "--config.data.train=none.jsonl"])
