import json
import re
import subprocess
import sys

import pytest
from inspecting import inspect
from test_chat import make_tokenizer
from test_reports import check_self_contained

from sftjax.config import get_default
from sftjax.data import DataError
from sftjax.inspect_data import main
from sftjax.inspect_data.views import GREEN, PLAIN

ROWS = [
    {"prompt": "what is two?", "completion": "two <script>alert(1)</script> & four"},
    {"prompt": "x", "completion": "{{ y }} {0}"},
    {"prompt": "long " * 100, "completion": "lost"},
    {"prompt": "z", "completion": "four"},
]
SHORT = [{"prompt": "the cat sat on the mat " * 3, "completion": "a"}, {"prompt": "b"}]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def config(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = get_default()
    config.model.path = config.data.tokenizer = str(tmp_path / "tokenizer")
    config.data.train = write(tmp_path / "d.jsonl", ROWS)
    config.data.max_length = 128
    config.data.cache_dir = str(tmp_path / "cache")
    return config


@pytest.fixture
def two_sources(config, tmp_path):
    entries = (
        dict(path=config.data.train, name="first"),
        dict(path=write(tmp_path / "e.jsonl", SHORT), name="second", on_error="skip")
        | dict(max_skipped=1.0, overlong="drop"),
    )
    config.data.train, config.data.sources = "", entries
    return config


def examples(config, n=9, **options):
    return json.loads(inspect(config, n, "json", **options))["examples"]


def lines(config, n=9, **options):
    return [int(e["where"].rsplit(":", 1)[1]) for e in examples(config, n, **options)]


# --- what is shown ------------------------------------------------------------------------------


def test_terminal(config):
    page = inspect(config, 3)
    assert f"assistant\n{GREEN}two <script>alert(1)</script> & four<|im_end|>{PLAIN}\n" in page
    assert re.search(r"d.jsonl:1, \d+ tokens, \d+% trained\n", page)
    assert re.search(r"d.jsonl:3, \d+ tokens, \d% trained, dropped: no_trained_token_left\n", page)
    assert re.search(rf"{re.escape(GREEN)} +3 +1 +1 +\d+  <\|im_end\|>{re.escape(PLAIN)}\n", page)
    assert re.search(r" +2 +0 +2 +0  <\|im_start\|>\n", page)  # the second document of the row
    assert re.search(r" +2 +0 +- +-  <\|im_start\|>\n", page)  # of the row that is dropped
    assert "examples    4, 3 documents kept" in page
    assert "dropped     1 no_trained_token_left" in page
    assert "stop token  trained: yes, <|im_end|>" in page
    assert re.search(r"trained     \d+ tokens, \d+\.\d%", page)
    assert re.search(r"packing     \d+ rows of 128, \d+\.\d% full", page)


def test_without_colour(config):
    page = inspect(config, 1, color=False)
    assert "⟦two <script>" in page and "\033" not in page


def test_a_text_drives_no_terminal(config, tmp_path):
    config.data.train = write(tmp_path / "w.jsonl", [{"prompt": "q", "completion": "日本\n\x1b[31mnot\tred"}])
    page = inspect(config, 1)
    assert "assistant\n" + GREEN + "日本\n\\x1b[31mnot\\tred<|im_end|>" + PLAIN in page
    assert page.count("\033[31m") == 0


def test_json(config):
    report = json.loads(inspect(config, 2, "json"))
    assert report["totals"]["examples"] == 4
    first = report["examples"][0]
    words = [t["token"] for t in first["tokens"] if t["weight"]]
    (start, stop), = first["spans"]  # fmt: skip
    assert "".join(words) == first["text"][start:stop]
    assert [t["position"] for t in first["tokens"]] == list(range(first["length"]))
    assert {t["segment"] for t in report["examples"][1]["tokens"]} != {None}
    assert first["trained"] == round(len(words) / (first["length"] - 1), 4)


@pytest.mark.parametrize("overlong", ["truncate_end", "truncate_prompt", "split"])
def test_tokens_that_are_cut_have_no_place(config, overlong):
    config.data.max_length, config.data.overlong = 20, overlong
    for example in examples(config):
        kept = [t for t in example["tokens"] if t["segment"] is not None]
        assert len(kept) == example["kept"] and bool(kept) != bool(example["dropped"])
        assert all((t["position"] is None) == (t["segment"] is None) for t in example["tokens"])
    answer = examples(config)[2]["tokens"][-7:]
    assert "".join(t["token"] for t in answer).endswith("lost<|im_end|>\n")
    places = {t["position"] is None for t in answer[:-1]}
    assert places == {overlong == "truncate_end"}


def test_a_cut_prompt_keeps_the_token_that_begins_a_text(config, tmp_path):
    make_tokenizer(template=None, bos=True).save_pretrained(tmp_path / "plain")
    config.data.tokenizer = str(tmp_path / "plain")
    config.data.max_length, config.data.overlong = 20, "truncate_prompt"
    long = examples(config)[2]
    places = [t["position"] for t in long["tokens"]]
    assert long["tokens"][0]["token"] == "<s>" and places[:2] == [0, None]
    assert places[-19:] == list(range(1, 20))


def test_html_is_escaped_and_self_contained(config):
    page = inspect(config, 4, "html")
    assert check_self_contained(page).tags.count("script") == 1  # the page's own, at its end
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; four" in page
    assert '<span class="trained">{{ y }} {0}&lt;|im_end|&gt;</span>' in page
    assert "://" not in page
    assert page.count("<article") == page.count("</article>") == 4
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in page


def test_nothing_is_written_where_no_cache_is_named(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    config.data.cache_dir = ""
    inspect(config, 1)
    assert sorted(tmp_path.rglob("*")) == before


# --- which rows ---------------------------------------------------------------------------------


def test_filters(config):
    assert lines(config, 2, start=1) == [2, 3]
    shares = {e["where"][-1]: e["trained"] for e in examples(config)}
    assert len(set(shares.values())) == 4
    middle = sorted(shares.values())[2]
    expected = [int(line) for line, share in shares.items() if share >= middle]
    assert lines(config, min_trained=middle) == expected
    assert lines(config, 1, min_trained=middle) == expected[:1]
    assert lines(config, max_trained=middle - 1e-3) == [n for n in (1, 2, 3, 4) if n not in expected]
    assert lines(config, dropped="any") == lines(config, dropped="no_trained_token_left") == [3]
    assert lines(config, dropped="too_long") == []
    assert "no row is as wanted" in inspect(config, dropped="too_long")
    config.data.overlong = "drop"
    assert lines(config, dropped="too_long") == [3]


def test_rows_that_cleaning_removes(config, tmp_path):
    with open(config.data.train, "a") as file:
        file.write('{"prompt": "no answer"}\n' + json.dumps(ROWS[0]) + "\nnot json\n")
    config.data.clean.rules = ("missing", "markup", "exact_duplicate")
    found = {e["where"][-1]: e for e in examples(config, dropped="any")}
    reasons = {line: e["dropped"] for line, e in found.items()}
    markup, missing = dict.fromkeys("16", "markup"), dict.fromkeys("57", "missing")
    assert reasons == {"3": "no_trained_token_left"} | markup | missing
    assert "HTML tag" in found["1"]["note"] and found["1"]["tokens"]  # would-be tokens
    assert found["1"]["kept"] == 0 and found["1"]["trained"] > 0
    assert "no answer" in found["5"]["text"] and not found["5"]["tokens"]
    assert "JSON" in found["7"]["note"]
    assert lines(config, dropped="missing") == [5, 7]
    assert lines(config) == [2, 3, 4, 1, 5, 6, 7]  # those that cleaning removed come last
    assert lines(config, 2, start=3) == [1, 5]
    assert "cleaned     2 markup, 2 missing" in inspect(config, 1)


def test_a_set_in_which_nothing_is_trained_is_shown_with_the_error(config):
    config.data.train_on = "system"
    assert "\nerror: nothing is trained in any of 4 rows" in inspect(config)
    page = inspect(config, dropped="no_trained_token", format="html")
    assert page.count("<article") == 4
    assert '<p class="problem">nothing is trained in any of 4 rows' in page


def test_sources(two_sources):
    report = json.loads(inspect(two_sources, 9, "json"))
    assert [e["source"] for e in report["examples"]] == ["first"] * 4 + ["second"] * 2
    bad = report["examples"][-1]
    assert bad["dropped"] == "skipped" and "completion" in bad["note"] and bad["text"]
    assert set(report["sources"]) == {"first", "second"}
    assert report["totals"]["examples"] == 5 and report["totals"]["documents"] == 4
    assert len(report["totals"]["skipped"]) == 1
    assert {e["source"] for e in examples(two_sources, source="second")} == {"second"}
    two_sources.data.max_length = 24  # only the second drops what is longer
    (dropped,) = examples(two_sources, dropped="too_long")
    assert dropped["where"].endswith("e.jsonl:1")


def test_totals_of_several_sources(two_sources):
    page = inspect(two_sources)
    assert "== second: " in page
    first, second, both = re.findall(r"== (?:first|second|all)\n\nexamples +(.*)\n", page)
    assert [first, second] == ["4, 3 documents kept", "1, 1 documents kept"]
    assert both == "5, 4 documents kept"
    page = inspect(two_sources, format="html")
    assert all(f"<b>{name}</b><table>" in page for name in ("first", "second", "all"))
    two_sources.data.max_length = 24
    page = inspect(two_sources)
    assert "== first\n" in page and "== second\n" not in page and "== all\n" not in page
    assert "error: nothing is trained in any of 2 rows" in page


def test_of_a_stream_a_sample_is_shown(config):
    config.data.streaming = True
    assert lines(config) == [1, 2, 3, 4]
    assert "d.jsonl (a sample)\n\nexamples    4, 3 documents kept" in inspect(config)


def test_validation_rows_are_named_by_their_file(config, tmp_path):
    rows = [{"prompt": "q", "completion": "kept out"}]
    config.data.validation = write(tmp_path / "held.jsonl", rows) + "," + config.data.train
    assert {e["source"] for e in examples(config, set="validation")} == {"held", "d"}
    assert lines(config, set="validation", source="held") == [1]


def test_bad_arguments(config):
    def fails(message, **options):
        with pytest.raises(DataError, match=re.escape(message)):
            inspect(config, **options)

    fails("--set=other: expected train | validation | test", set="other")
    fails("data.validation is empty", set="validation")
    fails("--source=other: expected train", source="other")
    fails("--dropped=other: expected any | too_long | ", dropped="other")
    fails("--min_trained=0.5 --max_trained=0.2: expected shares", min_trained=0.5, max_trained=0.2)
    fails("--n=-1 --start=0: expected 0 or more", n=-1)


# --- the command --------------------------------------------------------------------------------


def test_command(config, tmp_path, capsys):
    text = (
        "from sftjax.config import get_default\n"
        "def get_config():\n"
        "    c = get_default()\n"
        f"    c.data.train = {config.data.train!r}\n"
        f"    c.data.tokenizer = {config.data.tokenizer!r}\n"
        "    return c\n"
    )
    file, out = tmp_path / "c.py", tmp_path / "page.html"
    file.write_text(text)
    command = [sys.executable, "-m", "sftjax.inspect_data", f"--config={file}", "--n=1"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "examples    4, 4 documents kept" in shown
    main([*command[3:], "--format=html", f"--out={out}"])
    assert out.read_text().startswith("<!doctype html>")
    capsys.readouterr()
    main([*command[3:], "--dropped", "--config.data.max_length=64"])
    assert "d.jsonl:3, " in capsys.readouterr().out
    with pytest.raises(DataError, match=r"--format=pdf: expected terminal \| json \| html"):
        main([*command[3:], "--format=pdf"])
    with pytest.raises(SystemExit, match="1"):
        main([*command[3:], "--config.data.train_on=system"])
    assert "dropped: no_trained_token" in capsys.readouterr().out
    with pytest.raises(DataError, match="nothing is trained in any of 4 rows"):
        main([*command[3:], "--config.data.train_on=system", f"--out={out}"])
    assert "dropped: no_trained_token" in out.read_text()
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        main([*command[3:], "--config.data.train=none.jsonl"])


def test_what_is_not_read_is_counted_once_a_source(config, tmp_path, caplog):
    row = {"instruction": "what?", "context": "two", "output": "four"}
    rows = [row, row | {"category": "qa"}, row | {"category": "qa"}]
    config.data.train = write(tmp_path / "more.jsonl", rows)
    text = inspect(config, format="json")
    words = f"field 'category' is not read: in 2 rows, first in {config.data.train}:2"
    assert json.loads(text)["warnings"] == [words]  # of all rows, also those not shown
    assert caplog.messages.count(words) == 1
    assert json.loads(inspect(config, format="json"))["warnings"] == [words]  # out of the cache
