"""What six compiled steps need stays within 2% of tests/golden/compiled.json.

A change that is meant: python tests/golden/make_compiled.py, and say in the commit why.
"""

import json
from importlib.metadata import PackageNotFoundError

import pytest
from golden import make_compiled

KNOWN = json.loads(make_compiled.FILE.read_text())


def check(name):
    pinned = dict(KNOWN[name])
    versions = pinned.pop("versions")
    try:
        here = make_compiled.versions(name)
    except PackageNotFoundError as e:
        pytest.skip(f"{e.name} is not installed")
    if here != versions:
        pytest.skip(f"the figures are those of {versions}; here is {here}")
    lines = make_compiled.differences(pinned, make_compiled.measure(name), 0.02)
    assert not lines, "\n".join([name, *lines, "meant? python tests/golden/make_compiled.py"])


def names(platform):
    return [name for name in make_compiled.CASES if name.startswith(platform)]


@pytest.mark.parametrize("name", names("cpu")[:1])
def test_the_cpus_programs(name):
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", names("cpu")[1:])
def test_the_cpus_larger_programs(name):
    check(name)


@pytest.mark.tpu
@pytest.mark.parametrize("name", names("tpu"))
def test_the_tpus_programs(name):
    check(name)


def test_every_case_is_pinned_and_compiled_once():
    assert list(KNOWN) == list(make_compiled.CASES) and len(KNOWN) == 6
    assert {x["compilations"] for x in KNOWN.values()} == {1}


def test_differences_are_found():
    old = {"flops": 100, "collectives": {"all-gather x8": [2, 1000]}}
    same = {"flops": 101, "collectives": {"all-gather x8": [2, 1019]}}
    assert make_compiled.differences(old, old) == []
    assert make_compiled.differences(old, same, 0.02) == []
    assert make_compiled.differences(old, same) == [
        "collectives, all-gather x8, bytes: 1,000 -> 1,019 (+1.9%)",
        "flops: 100 -> 101 (+1.0%)",
    ]
    other = {"flops": 100, "collectives": {"all-reduce x8": [2, 1000]}}
    assert "collectives, all-gather x8, count: 2 -> absent" in make_compiled.differences(old, other)
