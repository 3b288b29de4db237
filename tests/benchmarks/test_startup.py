"""benchmarks/startup.py: two starts that share a compile cache."""

import jax
import pytest

from benchmarks import startup

TINY = dict(vocab=64, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp=64, tied=True)


@pytest.mark.slow
def test_the_second_start_takes_its_program_from_the_cache(capsys):
    both = startup.starts(1, TINY, 2, 32)
    for found in both.values():
        assert 0 < found["second"][0] < 0.7 * found["first"][0] and found["imported"][0] > 0
        assert 0 < found["step"][0] < found["second"][0]
        assert found["ratio_less_step"][0] < found["ratio"][0]
    startup.show_starts(both)
    assert "second / first" in capsys.readouterr().out


def test_a_start_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="a start failed: .*unexpected keyword argument 'depth'"):
        startup.start(tmp_path, dict(depth=2), 2, 32)


@pytest.mark.slow
def test_depth_counts_lines_that_do_not_grow(monkeypatch):
    monkeypatch.setattr(startup, "KINDS", {"one kind": {}})
    try:
        rows = startup.depth([1, 2], 1)
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert [r["layers"] for r in rows] == [1, 2] and rows[0]["ratio"] == 1
    assert rows[0]["lines"] == rows[1]["lines"] > 100
