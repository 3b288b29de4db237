"""Cleaning: planted defects are found, exactly; what is removed is told; a run uses it."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from test_reports import check_self_contained

from sftjax.clean import rules as clean_lib
from sftjax.clean.report import summary, write_records, write_rejects, write_report
from sftjax.clean.rules import RULES, find, find_once
from sftjax.data import DataError, open_source

REPO = Path(__file__).resolve().parents[2]


class Records(list):
    def where(self, i):
        return f"r:{i}"

    def fingerprint(self):
        return json.dumps(list(self))


def sentence(rng, least=12, most=30):
    """Random words of a made-up language: no two of them are alike by chance."""
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    word = lambda: "".join(rng.choices(syllables, k=rng.randint(1, 4)))  # noqa: E731
    return " ".join(word() for _ in range(rng.randint(least, most)))


def good(n, seed=0):
    rng = random.Random(seed)
    return [{"prompt": sentence(rng), "completion": sentence(rng, 3, 12)} for _ in range(n)]


def places(findings, rule):
    return [f.row for f in findings.found if f.rule == rule]


def removed(records, rules=("all",), **options):
    """{row: rule} of what is removed from plain records."""
    findings = find(Records(records), rules, **options)
    return {i: f.rule for i, f in findings.removed.items()}


# --- planted defects ---


def planted(tmp_path, n=300):
    """Files of good rows with exact defects, of evaluation rows, and {row: its defect}."""
    rng, base, bad = random.Random(1), good(n), []
    evaluation = good(40, seed=7)
    for i in range(5):
        bad.append(("missing", {"prompt": sentence(rng)}))
        bad.append(("missing", {"prompt": sentence(rng), "completion": None}))
        bad.append(("missing", {"prompt": sentence(rng), "completion": float("nan")}))
        bad.append(("empty", {"prompt": sentence(rng), "completion": " \n"}))
        bad.append(("empty", {"prompt": "\t", "completion": sentence(rng)}))
        bad.append(("exact_duplicate", dict(base[i])))
        bad.append(("exact_duplicate", {k: f" {v.upper()}\u00a0" for k, v in base[i + 5].items()}))
        bad.append(("contamination", dict(evaluation[i])))
        words = evaluation[i + 5]["prompt"].split()
        inside = f"{sentence(rng)} {' '.join(words[:13])} {sentence(rng)}"
        bad.append(("contamination", {"prompt": inside, "completion": "yes"}))
        bad.append(("too_long", {"prompt": sentence(rng, 90, 120), "completion": "no"}))
        bad.append(("markup", {"prompt": sentence(rng) + "<br>", "completion": "caf\u00e9"}))
        bad.append(("markup", {"prompt": sentence(rng), "completion": "it\u00e2\u20ac\u2122s"}))
        pair = sentence(rng)
        bad += [("conflict", {"prompt": pair, "completion": a}) for a in ("good", "bad")]
    lines = [("", json.dumps(r)) for r in base] + [(rule, json.dumps(r)) for rule, r in bad]
    lines += [("missing", '{"prompt": "broken'), ("missing", "[1, 2]")]
    first, rest = lines[:10], lines[10:]  # a duplicate's first row stays before it
    rng.shuffle(rest)
    path, other = tmp_path / "d.jsonl", tmp_path / "test.jsonl"
    path.write_text("".join(text + "\n" for _, text in first + rest))
    other.write_text("".join(json.dumps(r) + "\n" for r in evaluation))
    return path, other, {i: rule for i, (rule, _) in enumerate(first + rest) if rule}


def test_planted_defects_are_found_exactly(tmp_path):
    path, test, expected = planted(tmp_path)
    source = open_source(str(path))
    findings = find(
        source,
        evaluation=[open_source(str(test))],
        max_tokens=80,
        count_tokens=lambda records, wheres: [len(r["prompt"].split()) for r in records],
    )
    assert {i: f.rule for i, f in findings.removed.items()} == expected
    assert findings.counts() == Counter(expected.values()) == {
        "missing": 17, "empty": 10, "too_long": 5, "markup": 10,
        "contamination": 10, "conflict": 10, "exact_duplicate": 10,
    }  # fmt: skip
    assert findings.kept == [i for i in range(len(source)) if i not in expected]
    by_row = findings.removed
    broken = next(f.note for f in by_row.values() if "malformed JSON" in f.note)
    assert re.search(r"d.jsonl:\d+: malformed JSON at column", broken)
    contaminated = [f.other for f in by_row.values() if f.rule == "contamination"]
    assert sorted({f.rsplit(":")[-1] for f in contaminated}, key=int) == [str(i) for i in range(1, 11)]


def edits(text, rng):
    """Ways in which a copy of a text may differ a little."""
    w = text.split()
    at = rng.randrange(1, len(w) - 1)
    return [
        [*w[:at], sentence(rng, 1, 1), *w[at + 1 :]],
        w[:at] + w[at + 1 :],
        [*w[:at], sentence(rng, 1, 1), *w[at:]],
        [*w[: at - 1], w[at], w[at - 1], *w[at + 1 :]],
        ["please", *w],
        [*w, "!"],
    ]


def near_duplicates_score(base, count, seed):
    """(recall, precision) of near_duplicate with its default threshold on planted copies."""
    rng, records = random.Random(seed), [(r, i) for i, r in enumerate(base)]
    for i in rng.sample(range(len(base)), count):
        new = " ".join(rng.choice(edits(base[i]["prompt"], rng)))
        records.append(({"prompt": new, "completion": base[i]["completion"]}, i))
    rng.shuffle(records)
    findings = find(Records(r for r, _ in records), ("near_duplicate",))
    family = Counter(i for _, i in records)
    hits = places(findings, "near_duplicate")
    right = [i for i in hits if family[records[i][1]] > 1]
    others = [int(f.other[2:]) for f in findings.found]
    assert not set(others) & set(hits)  # a row is removed for one that stays
    return len({records[i][1] for i in right}) / count, len(right) / max(len(hits), 1)


def test_near_duplicates_of_prose():
    recall, precision = near_duplicates_score(good(1000), 200, seed=2)
    assert recall >= 0.9 and precision >= 0.95


def test_near_duplicates_of_templates():
    """Long common wording, other numbers, other labels: these rows are not alike."""
    rng = random.Random(3)
    task = "Classify the following review of a customer by its sentiment, and answer in one word. "
    base = [{"prompt": task + r["prompt"], "completion": "good"} for r in good(400, seed=4)]
    recall, precision = near_duplicates_score(base, 80, seed=5)
    assert recall >= 0.9 and precision >= 0.95
    sums = []
    for _ in range(300):
        a, b = rng.randint(10, 999), rng.randint(10, 999)
        story = f"Tom has {a} apples in his basket and his sister gives him {b}. How many has he?"
        sums.append({"prompt": story, "completion": f"He has {a} + {b} = {a + b} apples."})
    sums = list({r["prompt"]: r for r in sums}.values())
    labels = []
    for r in good(50, seed=6):
        labels.append({"prompt": r["prompt"], "completion": "terrible"})
        labels.append({"prompt": r["prompt"] + ".", "completion": "good"})
    assert removed(sums + labels, ("near_duplicate",)) == {}


def test_near_duplicates_of_real_questions(fixtures):
    source = open_source(str(fixtures / "gsm8k" / "train.jsonl"), 1500)
    base = [{"prompt": r["question"], "completion": r["answer"]} for r in source]
    assert removed(base, ("near_duplicate", "markup", "conflict")) == {}
    rng, records = random.Random(0), list(base)
    for i in rng.sample(range(len(base)), 150):
        words = base[i]["prompt"].split()
        at = rng.choice([k for k, w in enumerate(words) if w.isalpha()])
        new = " ".join([*words[:at], "perhaps", *words[at + 1 :]])
        records.append(base[i] | {"prompt": new})
    found = removed(records, ("near_duplicate",))
    assert min(found) >= 1500 and len(found) >= 0.9 * 150


# --- single rules ---


def test_conflicts_and_majorities():
    def row(prompt, completion, **more):
        return {"prompt": prompt, "completion": completion, **more}

    records = [
        row("What is it?", "a cat"), row("what is  it?", "A cat"), row("What is it?", "a dog"),
        row("Is it so?", "yes"), row("Is it so?", "no"),
        row("And this?", "one"), row("And this?", "one"),
        row("Same?", "yes"), row("Same?", "no", tools=[{"name": "f"}]),
    ]  # fmt: skip
    findings = find(Records(records), ("conflict",))
    assert places(findings, "conflict") == [2, 3, 4]
    assert findings.found[0].other == "r:0" and "2 different answers" in findings.found[0].note
    both = removed(records, ("exact_duplicate", "conflict"))
    assert both == dict.fromkeys((2, 3, 4), "conflict") | dict.fromkeys((1, 6), "exact_duplicate")


DAMAGED = [
    "a <p>b", "x</div>", '<a href="x">', "<br/>", "a &nbsp; b", "&#39;", "a<|im_end|>", "[INST] a",
    "<<SYS>>", "end</s>", "cafÃ©", "â€œquoteâ€\x9d", "ðŸ˜€", "\ufffd", "a\x00b", "a\x85b",
    "\ufeffa", "bad \ud800", "caf\\u00e9", "Ð¿Ñ\x80Ð¸", "Â°C", "<start_of_turn>",
]  # fmt: skip
SOUND = [
    "a < b and c > d", "vector<int> x", "<<48/2=24>>24", "`<br>` breaks a line", "R&D; AT&T",
    "```html\n<p>x</p>\n```", "```\n<p>never closed", "ÂME, ÃO, CAFÉ”", "naïve – “quoted”…",
    "日本語 русский", "a\tb\r\nc", "x <- [1, 2]", "😀 🇫🇷", "<think>so</think>", "C:\\users",
    "p<0.05 and q>1",
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_damage(text):
    found = find(Records([{"prompt": "x", "completion": text}]), ("markup",)).found
    assert [f.row for f in found] == [0] and found[0].note.isascii()
    assert removed([{"prompt": text, "completion": "x"}], ("markup",)) == {0: "markup"}


@pytest.mark.parametrize("text", SOUND)
def test_no_damage(text):
    assert removed([{"prompt": text, "completion": text}], ("markup",)) == {}


def contaminated(train, evaluation, **options):
    pair = lambda p, c="yes": {"prompt": p, "completion": c}  # noqa: E731
    sets = [Records(pair(*(e if isinstance(e, tuple) else (e,))) for e in evaluation)]
    return removed([pair(t) for t in train], ("contamination",), evaluation=sets, **options)


def test_contamination():
    rng = random.Random(0)
    text = sentence(rng, 20, 20)
    words = text.split()
    thirteen, twelve = " ".join(words[3:16]), " ".join(words[3:15])
    assert list(contaminated([f"a {thirteen} b", f"a {twelve} b", text.upper()], [text])) == [0, 2]
    assert list(contaminated([f"a {twelve} b"], [text], ngram=8)) == [0]
    answer = [(sentence(rng), text)]  # an evaluation answer in a training prompt
    assert list(contaminated([f"so {thirteen}"], answer)) == [0]
    # Short ones: whole prompts; within others only from eight words on.
    short, eight = "What is the capital of France?", "who wrote the long book about the sea"
    train = ["what is the CAPITAL of france", "so what is the capital of france", f"and {eight}?"]
    assert list(contaminated(train, [short, eight])) == [0, 2]
    assert contaminated(["???", "yes"], ["!!!"]) == {}
    # The wording of the task is in every row and proves nothing.
    task = "read the text and say in one word what the author of it thinks of the matter: "
    train = [task + sentence(rng) for _ in range(5)]
    held = [task + sentence(rng) for _ in range(20)]
    assert list(contaminated([*train, held[3]], held)) == [5]
    japanese = "昨日の夜に友達と一緒に映画を見に行きました"
    assert list(contaminated([f"x{japanese}"], [japanese + "か"])) == [0]


def test_forms_of_records():
    """Rules see conversations, whatever the record's form; tools and turns count."""

    def chat(*texts, **more):
        roles = ("user", "assistant")
        turns = [{"role": roles[i % 2], "content": t} for i, t in enumerate(texts)]
        return {"messages": turns, **more}

    records = [
        chat("a", "b", "c", "d"), {"prompt": "a", "completion": "b"}, {"text": "x y"},
        {"instruction": "A", "output": "B"}, chat("A", "b", "c", "D "), {"text": "X  y"},
        chat("a", "b", "c", "d", tools=[{"name": "f"}]), chat("a", "b", " ", "d"),
    ]  # fmt: skip
    assert removed(records, ("empty", "exact_duplicate", "conflict")) == {
        3: "exact_duplicate", 4: "exact_duplicate", 5: "exact_duplicate", 7: "empty",
    }  # fmt: skip
    named = [{"q": "a", "a": "b"}, {"q": "a", "a": ""}, {"q": "a"}]
    form = dict(fields=dict(prompt="q", completion="a"))
    assert removed(named, form=form) == {1: "empty", 2: "missing"}


def test_rows_that_no_rule_was_asked_about_stay():
    records = [{"x": 1}, {"prompt": "a", "completion": ""}, *good(2)]
    assert removed(records, ("exact_duplicate", "near_duplicate", "conflict", "markup")) == {}
    assert removed(records, ("missing",)) == {0: "missing"}


def test_bad_rules():
    with pytest.raises(DataError, match="unknown rule 'dedup'; known: all, missing, empty"):
        find(Records(good(2)), ("dedup",))
    for rule, message in clean_lib.NEEDS.items():
        with pytest.raises(DataError, match=f"data.clean.rules: {rule} {re.escape(message)}"):
            find(Records(good(2)), ("all", rule))
    for wrong in ({"near": 1.0}, {"near": 0}, {"ngram": 0}, {"suspects": 2}):
        with pytest.raises(DataError, match=f"data.clean.*{next(iter(wrong))}=.*expected"):
            find(Records(good(2)), **wrong)
    assert set(find(Records(good(2))).rules) == set(RULES) - set(clean_lib.NEEDS)


# --- what is left behind ---


def test_every_removed_row_is_told(tmp_path):
    path, test, _ = planted(tmp_path)
    source = open_source(str(path))
    findings = find(source, evaluation=[open_source(str(test))])
    write_rejects(tmp_path / "rejects.jsonl", source, findings)
    write_report(tmp_path / "report.html", source, findings, "a & b")
    rejects = [json.loads(x) for x in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    page = (tmp_path / "report.html").read_text()
    gone = findings.removed
    assert [r["where"] for r in rejects] == [source.where(i) for i in gone]
    assert [r["reason"] for r in rejects] == [f.rule for f in gone.values()]
    for reject in rejects:
        assert f"<td>{reject['where']}</td>" in page
    i, reject = next((i, r) for i, r in zip(gone, rejects, strict=True) if r["reason"] == "conflict")
    assert reject["record"] == source[i] and reject["other"].startswith(str(path))
    assert sum(r["record"] is None for r in rejects) == 2  # the malformed ones
    assert "<h1>a &amp; b</h1>" in page and "<br>" not in page and "&lt;br&gt;" in page
    assert "script" not in check_self_contained(page).tags and "://" not in page
    counts = findings.counts()
    assert summary(findings).startswith(f"{len(gone)} of {len(source)} rows removed (17 missing, ")
    assert sum(counts.values()) == len(gone) == len(rejects)
    assert "conflict: 10</h2>" in page


def test_written_records_are_read_again(tmp_path):
    records = Records([
        {"prompt": "a ✓", "completion": "b", "n": 1},
        {"prompt": "c", "completion": "d", "more": [1]},
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ])  # fmt: skip
    for name in ("out.jsonl", "out.parquet"):
        write_records(tmp_path / name, records, [0, 2, 1])
        again = open_source(str(tmp_path / name))
        kept = [{k: v for k, v in r.items() if v is not None} for r in again]
        assert kept == [records[0], records[2], records[1]]
    with pytest.raises(DataError, match="--out=.*out.csv: expected a name that ends in .parquet"):
        write_records(tmp_path / "out.csv", records, [0])
    with pytest.raises(DataError, match="fit no Parquet table.*write them to a .jsonl file"):
        write_records(tmp_path / "o.parquet", Records([{"x": 1}, {"x": [1]}]), [0, 1])


def test_a_lone_surrogate_is_reported_not_raised(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "bad \\ud800 half", "completion": "x"}\n')
    source = open_source(str(path))
    findings = find(source)
    assert [f.rule for f in findings.found] == ["markup"]
    write_rejects(tmp_path / "r.jsonl", source, findings)
    write_report(tmp_path / "r.html", source, findings, "t")
    assert json.loads((tmp_path / "r.jsonl").read_text())["record"] == source[0]
    assert "bad \\ud800 half" in (tmp_path / "r.html").read_text()


def test_the_same_in_every_process(tmp_path):
    """Python's own hashes differ between processes; what is found does not."""
    path, test, _ = planted(tmp_path, n=60)
    code = (
        "import sys; from sftjax.data import open_source; from sftjax.clean.rules import find\n"
        "print(find(open_source(sys.argv[1]), evaluation=[open_source(sys.argv[2])]))"
    )
    outputs = set()
    for seed in ("1", "2"):
        env = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPO)}
        run = [sys.executable, "-c", code, str(path), str(test)]
        outputs.add(subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1 and "contamination" in outputs.pop()


def test_once_per_data_and_settings(tmp_path, monkeypatch):
    source, sets = Records(good(20) + good(5)), [Records(good(3, seed=9))]
    first = find_once(tmp_path, "key", source, ("all",), evaluation=sets)
    assert first == find(source, evaluation=sets) and len(first.removed) == 5

    class Looked(Exception):
        pass

    def look(*args, **options):
        raise Looked

    monkeypatch.setattr(clean_lib, "find", look)
    assert find_once(tmp_path, "key", source, ("all",), evaluation=sets) == first
    for key, rules, options in [
        ("other", ("all",), {}), ("key", ("conflict",), {}), ("key", ("all",), {"near": 0.9}),
        ("key", ("all",), {"evaluation": [Records(good(4))]}),
    ]:  # fmt: skip
        with pytest.raises(Looked):
            find_once(tmp_path, key, source, rules, **dict(evaluation=sets) | options)
    monkeypatch.setitem(RULES, "conflict", lambda texts, rows, **_: iter(()))
    with pytest.raises(Looked):
        find_once(tmp_path, "key", source, ("all",), evaluation=sets)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.cache_dir=.*file: can't be written"):
        find_once(tmp_path / "file", "key", source, ("missing",))
