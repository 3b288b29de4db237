"""A small run of benchmarks/fuzz.py, and what it would not let pass."""

import json
import os
import time
from pathlib import Path

import pytest

from sftjax.errors import ConfigError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = {"records": 150, "spans": 40, "safetensors": 150, "models": 60, "config": 60}
KINDS["manifests"] = 20


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import fuzz
    import fuzz_cases

    monkeypatch.setattr(fuzz_cases, "FIXTURES", Path("absent"))
    fuzz_cases.tokenizers.cache_clear()
    fuzz_cases.model_configs.cache_clear()
    yield fuzz
    fuzz_cases.tokenizers.cache_clear()
    fuzz_cases.model_configs.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_mutations_are_read_or_refused(fuzz, kind):
    counts, failures = fuzz.run([kind], range(KINDS[kind]), seed=1)
    assert not failures, json.dumps(failures, indent=1)
    found = counts[kind]
    assert sum(found.values()) == KINDS[kind]
    assert found["ok"] >= 3 and sum(found.values()) - found["ok"] >= 3  # both happen


def test_a_case_is_known_by_its_number(fuzz):
    import fuzz_cases

    seen = []
    one = lambda rng, folder: seen.append(rng.random())  # noqa: E731
    fuzz_cases.KINDS["one"] = one
    try:
        fuzz.run(["one"], range(5), seed=3)
        fuzz.run(["one"], [2], seed=3)
        fuzz.run(["one"], [2], seed=4)
    finally:
        del fuzz_cases.KINDS["one"]
    assert len(set(seen[:5])) == 5 and seen[5] == seen[2] != seen[6]


class Long(ConfigError):
    def __str__(self):
        return "x" * 2000


def long_message(rng, folder):
    raise Long()


def bug(rng, folder):
    raise KeyError("x")


def wrong(rng, folder):
    raise AssertionError("another mask")


def slow(rng, folder):
    time.sleep(5)


def leaves_files(rng, folder):
    (folder / "a").mkdir()
    (folder / "a" / "b").write_text("x" + os.fspath(folder))


def too_big(rng, folder):
    return bytearray(1 << 42)


def deep(rng, folder):
    return deep(rng, folder)


@pytest.mark.parametrize(
    "case, reason",
    [(long_message, "a message of 2,000"), (bug, "KeyError"), (wrong, "another mask"),
     (slow, "TooLong"), (too_big, "MemoryError"), (deep, "RecursionError")],
)  # fmt: skip
def test_what_fails(fuzz, monkeypatch, case, reason, capsys):
    import fuzz_cases

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    monkeypatch.setitem(fuzz_cases.KINDS, "one", case)
    counts, [failure] = fuzz.run(["one"], [7], seed=5)
    assert counts == {"one": {"failed": 1}} and reason in failure["wrong"]
    assert (failure["kind"], failure["seed"], failure["case"]) == ("one", 5, 7)
    assert "--only=one --seed=5 --case=7" in capsys.readouterr().err


def test_masks_that_are_wrong_are_found(fuzz, monkeypatch):
    """A mask that misses its message, and one that trains what the user says."""
    import fuzz_cases

    encode = fuzz_cases.encode
    for change in (lambda e: e._replace(spans=[]), lambda e: e._replace(spans=[(0, len(e.text))])):

        def changed(*args, change=change, **options):
            example = encode(*args, **options)
            other = change(example)
            other.left_out = example.left_out
            return other

        monkeypatch.setattr(fuzz_cases, "encode", changed)
        counts, failures = fuzz.run(["spans"], range(10), seed=1)
        assert counts["spans"]["failed"] == len(failures) > 3


def test_nothing_is_left_behind(fuzz, monkeypatch, tmp_path):
    import fuzz_cases

    monkeypatch.setitem(fuzz_cases.KINDS, "one", leaves_files)
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    assert fuzz.run(["one"], range(3), seed=0) == ({"one": {"ok": 3}}, [])
    assert not list(tmp_path.iterdir())
