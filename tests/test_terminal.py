"""What is printed drives no terminal, whoever's text it is."""

import ast
import json
import re
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest
from inspecting import inspect
from test_chat import make_tokenizer

import sftjax
from sftjax import config as config_lib
from sftjax import exits
from sftjax.data.masking.question import Question
from sftjax.errors import DataError
from sftjax.hf import heads
from sftjax.reports import run as report
from sftjax.tasks.causal_lm import CausalLM
from sftjax.terminal import columns, in_json, json_text, printable, show
from sftjax.training import log, metrics

PACKAGE = Path(sftjax.__file__).parent
# Colour, the clipboard, a title, one byte of C1, a carriage return, marks of direction.
EVIL = "a\x1b[31mb\x1b]52;c;ZXZpbA==\x07c\x9b2Jd\re\u202ef\u2066g\u200fh\x00i\x7fj\u2028k\u200bl"
GOOD = "line\n\ttab, wörld, 你好, שלום, 👩\u200d👩\u200d👧, e\u0301, ﷽"


def drives(text):
    """What in a text a terminal would obey: written another way than `printable` is."""
    known = "\n\t\u200c\u200d\xad"
    bad = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return [c for c in text if c not in known and unicodedata.category(c) in bad]


def test_every_character_is_shown_or_escaped():
    everything = "".join(map(chr, range(0x110000)))
    shown = printable(everything)
    # A few letters of old scripts are formats in name only: they have a shape of their own.
    left = {c for c in drives(shown) if not 0x600 <= ord(c) <= 0x8E2 and ord(c) < 0x11000}
    assert not left
    assert len(shown) < len(everything) + 30_000 and printable(GOOD) == GOOD
    assert printable("\x1b\r\u202e\ud800\U000e0041") == r"\x1b\r\u202e\ud800\U000e0041"
    assert printable(None) == "None"
    assert json.loads(printable(json.dumps(EVIL, ensure_ascii=False), in_json)) == EVIL
    assert len(printable("\x1b" * 10_000)) == 40_000


def test_columns_are_aligned_and_json_is_printable():
    rows = [("name", "count", ""), ("a", 1, "x"), ("bc", 10_000, "y z")]
    assert columns(rows, right=(1,)) == "name  count\na         1  x\nbc    10000  y z"
    assert columns([]) == "" and columns([()]) == ""
    shown = json_text([EVIL, "\x7f"])
    assert json.loads(shown) == [EVIL, "\x7f"] and "\x7f" not in shown


def test_only_one_file_prints():
    """Else a text finds its way to a terminal as it is; the view of inspect escapes by pieces."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name == "print" or re.search(r"std(out|err)\.write$", name):
                found.append(f"{file.relative_to(PACKAGE)}: {name}")
            if re.search(r"(\.warning|\.write|set_postfix_str|\.info|\.error)$", name):
                logs = re.search(r"logger|getLogger|_bar", name)
                assert not logs or "printable" in ast.unparse(node), f"{file}:{node.lineno}"
    # The others write what their own protocols say, to processes of ours.
    assert set(found) - {
        "data/masking/sandbox_worker.py: sys.stdout.buffer.write",
        "parallel/service_worker.py: print",
    } == {"inspect_data/__init__.py: sys.stdout.write", "terminal.py: print"}


def test_errors(capsys):
    def main(argv):
        raise DataError(f"the chat template failed: {EVIL}", where=f"{EVIL}.jsonl:1")

    with pytest.raises(SystemExit) as caught:
        exits.run(main, [])
    assert not drives(caught.value.code) and r"\x1b]52;c;" in caught.value.code


def test_lines_of_a_run(capsys, caplog, tmp_path):
    log.say("data", EVIL)
    show(EVIL)
    heads.report(tmp_path / EVIL.replace("\0", ""), [EVIL], [], 0)
    writer = metrics.Writer(tmp_path, 3, False)
    writer.write(1, {EVIL: 1.0})
    writer.close()
    out = capsys.readouterr()
    assert out.out.count(r"\x1b]52") == 2 and r"\x1b]52" in out.err
    assert not drives(out.out + out.err + "".join(r.getMessage() for r in caplog.records))


def test_samples_and_names_of_sets(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sftjax.reports.page.write_page", lambda *args: None)  # is no terminal
    tokenizer = make_tokenizer()
    task = CausalLM(tokenizer)
    ids = tokenizer(EVIL).input_ids
    feed = SimpleNamespace(questions=[Question(ids, EVIL, EVIL, EVIL, 0)], sets={"x": 1}, tests=(), config=None)
    scores = dict(exact_match=0.0, answers=[EVIL], losses={f"{EVIL}/loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("")
    report.finish(tmp_path, task, feed, dict(before=scores, after=scores, steps=1), 3)
    out = capsys.readouterr().out
    assert not drives(out) and out.count(r"\x1b]52;c;") >= 4
    row = (tmp_path / "samples" / "test.jsonl").read_text(encoding="utf-8")
    assert json.loads(row)["before"] == EVIL  # a file holds what the model said


@pytest.mark.parametrize("color", [True, False])
def test_inspect(tmp_path, color):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    config = config_lib.get_default()
    config.data.tokenizer = str(tmp_path / "tokenizer")
    path = tmp_path / "d\x1b[31m\u202e.jsonl"
    path.write_text(json.dumps({"prompt": EVIL, "completion": EVIL}) + "\n")
    config.data.train = str(path)
    config.data.max_length = 512
    text = inspect(config, color=color)
    ours = re.sub(r"\x1b\[(0|32)m", "", text) if color else text
    assert not drives(ours) and r"\x1b]52;c;" in text.replace("\n", "")
    assert text.count("\x1b[31m") == 0  # nothing of ours is red here
    value = inspect(config, format="json")
    assert not drives(value)
    [example] = json.loads(value)["examples"]
    assert EVIL in example["text"] and str(path) in example["where"]
