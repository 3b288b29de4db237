"""benchmarks/gpu_compile.py: what it counts in a program, and what it says without a compiler."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_compile


def test_bytes_are_those_read_and_written_outside_of_loops():
    assert gpu_compile.size("(f32[2,3]{1,0}, bf16[4], pred[5], s32[])") == 24 + 8 + 5 + 4
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)

    def once(x):
        return jnp.exp(x) * 2 + 1

    def loops(x):
        return jax.lax.fori_loop(0, 9, lambda _, y: jnp.sin(y) @ y.T @ y, once(x))

    found = [gpu_compile.moved(jax.jit(f).lower(x).compile().as_text()) for f in (once, loops)]
    assert found[0] == 2 * 2**20 and found[0] <= found[1] < 2 * found[0]


def test_a_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu_compile.py"])
    monkeypatch.setattr(gpu_compile.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        gpu_compile.main()
    assert "pip install 'jax[cuda13]'" in capsys.readouterr().err
