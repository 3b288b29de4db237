"""Checkpoints: what comes back is what was saved, on any mesh, after any kind of end."""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftjax.training.checkpoint import Checkpointer, CheckpointError, disk
from sftjax.training.checkpoint.disk import check_writable
from sftjax.training.checkpoint.table import read_weights


@struct.dataclass
class State:
    step: Any
    params: Any
    frozen: Any
    opt_state: Any
    rng: Any


def make_state(step=3, devices=None, shape=(1,), rng="typed"):
    """A state with every kind of leaf; its values follow from `step`; sharded over `devices`."""
    devices = jax.devices()[:1] if devices is None else devices
    mesh = Mesh(np.array(devices).reshape(shape), ("fsdp", "tensor")[: len(shape)])
    w = jnp.arange(64.0).reshape(16, 4) * 0.1 + step
    params = {"mlp": {"w": w, "b": None}, "norm": (w[0] / 3).astype(jnp.bfloat16)}
    frozen = {"mlp": {"w": None, "b": (w / 7).astype(jnp.bfloat16)}, "norm": None}
    masked = optax.masked(optax.scale(2.0), {"mlp": {"w": True, "b": None}, "norm": False})
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3), masked)
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), tx.init(params))
    key = jax.random.key(step) if rng == "typed" else jax.random.PRNGKey(step)
    state = State(jnp.int32(step), params, frozen, opt_state, key)

    def sharding(x):
        spec = PartitionSpec(*mesh.axis_names) if x.ndim == 2 else PartitionSpec()
        return NamedSharding(mesh, spec)

    # Through jit, since devices may belong to several processes.
    return jax.jit(lambda s: s, out_shardings=jax.tree.map(sharding, state))(state)


def abstract_like(state):
    """The restore target of a concrete state: shapes, dtypes and shardings, no values."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def raw(x):
    key = jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if key else x)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert raw(x).tobytes() == raw(y).tobytes()


@pytest.mark.parametrize("rng", ["typed", "raw"])
def test_every_kind_of_leaf_comes_back_bit_equal(tmp_path, rng):
    state = make_state(rng=rng)
    extra = {"data": {"epoch": 1, "row": 2**40}, "bad": 2, "best": 0.1 + 0.2}
    with closing(Checkpointer(tmp_path)) as ckpt:
        assert ckpt.save(3, state, extra)
        extra["bad"] = 99  # the copy was taken
        got, got_extra = ckpt.restore(abstract_like(state))
    assert_same(got, state)
    assert got_extra == {"data": {"epoch": 1, "row": 2**40}, "bad": 2, "best": 0.1 + 0.2}
    draw = jax.random.normal(got.rng, (3,))
    assert np.array_equal(draw, jax.random.normal(state.rng, (3,)))


def test_key_of_another_generator_and_empty_leaf(tmp_path):
    state = {"rng": jax.random.key(1, impl="rbg"), "none": jnp.zeros((0, 4)), "x": jnp.ones(2)}
    with closing(Checkpointer(tmp_path)) as ckpt:
        ckpt.save(0, state)
        got, _ = ckpt.restore(abstract_like(state))
    assert_same(got, state)


def test_donated_state_is_saved_as_it_was(tmp_path):
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1024, 1024))
    with closing(Checkpointer(tmp_path, keep=10)) as ckpt:
        for step in range(5):
            ckpt.save(step, {"x": x})
            for _ in range(20):
                x = bump(x)
        for step in reversed(range(5)):
            got, _ = ckpt.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
            assert np.all(np.asarray(got["x"]) == 20 * step)
            shutil.rmtree(tmp_path / str(step))


ON_ONE_DEVICE = """
import sys, jax
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, abstract_like, assert_same, make_state
assert jax.device_count() == 1
state = make_state(5)
got, extra = Checkpointer({path!r}).restore(abstract_like(state))
assert_same(got, state)
assert extra == {{"row": 7}}
print("same")
"""


def test_restores_on_another_mesh_and_another_device_count(tmp_path):
    state = make_state(5, jax.devices(), (8,))
    assert len(state.params["mlp"]["w"].addressable_shards) == 8
    with closing(Checkpointer(tmp_path)) as ckpt:
        ckpt.save(5, state, {"row": 7})
        target = abstract_like(make_state(0, jax.devices(), (2, 4)))
        got, _ = ckpt.restore(target)
    assert_same(got, state)
    want = [x.sharding for x in jax.tree.leaves(target)]
    assert all(x.sharding == s for x, s in zip(jax.tree.leaves(got), want, strict=True))
    code = ON_ONE_DEVICE.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    assert run_python(code, XLA_FLAGS="").stdout == "same\n"


def run_python(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done


# ---- which are kept ------------------------------------------------------------------------


@pytest.mark.parametrize("mode, losses, kept", [("min", [5, 1, 4, 3, 2], [1, 3, 4]), ("max", [1, 2, 3, 9, 4], [3, 4])])
def test_keeps_the_newest_and_the_best(tmp_path, mode, losses, kept):
    with closing(Checkpointer(tmp_path, keep=2, best_metric="val/loss", lower=mode == "min")) as ckpt:
        for step, loss in enumerate(losses):
            ckpt.save(step, {"x": jnp.float32(step)}, {}, {"val/loss": loss, "other": 0})
    assert ckpt.all_steps() == kept
    assert disk.best(tmp_path, kept, "val/loss", mode == "min") == kept[0]


def test_the_best_outlives_a_resume_nan_and_saves_without_evaluation(tmp_path):
    def save(ckpt, step, metrics):
        ckpt.save(step, {"x": jnp.float32(step)}, {}, metrics)

    with closing(Checkpointer(tmp_path, keep=1, best_metric="loss")) as ckpt:
        save(ckpt, 0, {"loss": 2.0})
        save(ckpt, 1, {"loss": 1.0})
        save(ckpt, 2, {"loss": float("nan")})
    with closing(Checkpointer(tmp_path, keep=1, best_metric="loss")) as ckpt:
        assert disk.best(tmp_path, ckpt.all_steps(), "loss", True) == 1
        save(ckpt, 3, None)
        save(ckpt, 4, {"loss": 3.0})
    assert ckpt.all_steps() == [1, 4]


def test_the_old_one_is_deleted_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    with closing(Checkpointer(tmp_path, keep=1)) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
        ckpt.wait()
        seen, delete = [], disk.remove

        def remove(directory, steps):
            sealed = disk.damage(tmp_path / "2") == ""
            seen.append((steps, ckpt.all_steps(), sealed, synced[-1]))
            delete(directory, steps)

        synced, sync = [], disk.sync
        monkeypatch.setattr(disk, "sync", lambda path: (synced.append(path), sync(path)))
        monkeypatch.setattr(disk, "remove", remove)
        ckpt.save(2, {"x": jnp.ones(3)})
    assert seen == [([1], [1, 2], True, tmp_path)]  # the name 2 is on the disk too
    assert ckpt.all_steps() == [2]


def test_same_step_is_saved_once_and_an_earlier_one_refused(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        assert ckpt.save(4, {"x": jnp.ones(3)})
        assert not ckpt.save(4, {"x": jnp.ones(3)})
        with pytest.raises(CheckpointError, match="step 3 .* later step 4.*another workdir"):
            ckpt.save(3, {"x": jnp.ones(3)})


def test_incomplete_directories_are_ignored(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        ckpt.save(4, {"x": jnp.ones(3)})
    (tmp_path / "9.orbax-checkpoint-tmp-123" / "state").mkdir(parents=True)
    (tmp_path / "7" / "state").mkdir(parents=True)
    with closing(Checkpointer(tmp_path)) as ckpt:
        assert ckpt.latest_step() == 4
        ckpt.save(7, {"x": jnp.ones(3)})
        ckpt.wait()
        assert ckpt.all_steps() == [4, 7]


# ---- clear errors --------------------------------------------------------------------------


def test_a_target_that_does_not_fit_names_the_leaves(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        ckpt.save(1, {"params": {"w": jnp.ones((4, 2)), "b": jnp.ones(2), "s": jnp.ones(3)}})
        shape = jax.ShapeDtypeStruct
        target = {
            "params": {
                "w": shape((4, 3), jnp.float32),
                "s": shape((3,), jnp.bfloat16),
                "lora": shape((1,), jnp.float32),
            }
        }
        with pytest.raises(CheckpointError) as e:
            ckpt.restore(target)
    text = str(e.value)
    assert "params/w: float32[4,2] in the checkpoint, float32[4,3] in this run" in text
    assert "params/s: float32[3] in the checkpoint, bfloat16[3] in this run" in text
    assert "params/b: float32[2] in the checkpoint, absent in this run" in text
    assert "params/lora: absent in the checkpoint, float32[1] in this run" in text


def test_missing_step_and_bad_extra(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        with pytest.raises(FileNotFoundError, match="complete steps there: none"):
            ckpt.restore({})
        with pytest.raises(TypeError, match="not JSON serializable"):
            ckpt.save(1, {"x": jnp.ones(3)}, {"rng": np.ones(3)})


def spoiled(folder, how):
    """Damage a checkpoint in one way; returns what has to be said of it."""
    data = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    name = data.relative_to(folder)
    if how == "a bit":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 4
        data.write_bytes(content)
        return f"{name} has another checksum"
    if how == "truncated":
        size = data.stat().st_size
        os.truncate(data, 5)
        return f"{name} has 5 bytes instead of {size:,}"
    if how == "missing":
        data.unlink()
        return f"{name} is missing"
    if how == "extra":
        (folder / "state" / "d" / "more").write_text("")
        return "state/d/more does not belong there"
    if how == "torn list":
        os.truncate(folder / "files.json", 20)
        return "files.json is damaged"
    if how == "no list":
        (folder / "files.json").unlink()
        return "files.json is missing"
    (folder / "files.json").write_text('{"files": {"a": 3}}')
    return "files.json is damaged"


WAYS = ["a bit", "truncated", "missing", "extra", "torn list", "no list", "junk list"]


@pytest.mark.parametrize("how", WAYS)
def test_of_damaged_checkpoints_the_newest_intact_one_is_taken(tmp_path, caplog, how):
    with closing(Checkpointer(tmp_path, keep=3)) as ckpt:
        for step in (1, 5, 8):
            ckpt.save(step, make_state(step), {"row": step})
    words = {step: spoiled(tmp_path / str(step), how) for step in (5, 8)}
    with closing(Checkpointer(tmp_path, keep=3)) as ckpt:
        assert ckpt.latest_step() == 8
        got, extra = ckpt.restore(abstract_like(make_state()))
        assert_same(got, make_state(1))
        assert extra == {"row": 1} and ckpt.latest_step() == 1
        said = [m for m in caplog.messages if "damaged" in m]
        assert [m.count("\n") for m in said] == [0, 0]
        for step, line in zip((5, 8), said, strict=True):
            assert words[step] in line and f"set aside as {step}.damaged" in line
            assert f"of step 1, is taken: {step - 1} steps are repeated" in line
        assert (tmp_path / "8.damaged").is_dir()  # never deleted
        ckpt.save(5, make_state(5))
        ckpt.save(8, make_state(8))
    assert ckpt.all_steps() == [1, 5, 8]


def test_where_none_is_intact_nothing_begins_anew(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make_state(step))
    words = [spoiled(tmp_path / "1", "a bit"), spoiled(tmp_path / "2", "missing")]
    for _ in range(2):  # the second start says it too
        with closing(Checkpointer(tmp_path)) as ckpt, pytest.raises(CheckpointError) as e:
            ckpt.restore(abstract_like(make_state()))
        for step, text in zip((1, 2), words, strict=True):
            assert f"step {step}: {text}" in str(e.value)
        assert "Put back intact copies" in str(e.value)
    for step in (1, 2):
        (tmp_path / str(step) / "state" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="step 1: state/_METADATA is missing(.|\n)*step 2"):
        Checkpointer(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_a_damaged_one_that_is_asked_for_is_named(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make_state(step))
    text, state = spoiled(tmp_path / "2", "truncated"), make_state(1)
    target = {"params": abstract_like(state.params), "frozen": abstract_like(state.frozen)}
    with pytest.raises(CheckpointError, match=f"2 is damaged: {text}"):
        read_weights(tmp_path / "2", target)
    assert_same(read_weights(tmp_path / "1", target), {k: getattr(state, k) for k in target})


def test_what_does_not_fit_is_no_damage(tmp_path):
    with closing(Checkpointer(tmp_path)) as ckpt:
        for step in (1, 2):
            ckpt.save(step, make_state(step))
    # An older one would not fit either.
    with (
        closing(Checkpointer(tmp_path)) as ckpt,
        pytest.raises(CheckpointError, match="not fit"),
    ):
        ckpt.restore({"x": jax.ShapeDtypeStruct((1,), jnp.float32)})
    assert ckpt.all_steps() == [1, 2]


def test_its_json_has_no_number_that_json_has_not(tmp_path):
    checkpoints = Checkpointer(tmp_path, best_metric="loss")
    extra = {"before": {"loss": math.nan, "all": [1.0, -math.inf]}}
    for step, loss in ((1, math.nan), (2, 3.0), (3, -math.inf)):
        checkpoints.save(step, {"x": jnp.ones(2)}, extra, {"loss": loss})
    checkpoints.close()

    def refused(word):
        raise ValueError(word)

    for path in tmp_path.glob("3/*/*"):
        if path.name in ("metadata", "metrics"):
            found = json.loads(path.read_text(), parse_constant=refused)
            assert found == {"loss": None} or found["before"] == {"loss": None, "all": [1.0, None]}
    assert disk.best(tmp_path, checkpoints.all_steps(), "loss", True) == 2


def test_directory_of_another_run(tmp_path):
    first = {"identity": {"model": "a", "tokenizer": "t"}}
    with closing(Checkpointer(tmp_path, manifest=first)) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
        _, extra = ckpt.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert extra["manifest"] == first
    # Settings outside the identity may change, such as the learning rate.
    Checkpointer(tmp_path, manifest=first | {"steps": 9}).close()
    with pytest.raises(CheckpointError) as e:
        Checkpointer(tmp_path, manifest={"identity": {"model": "b", "tokenizer": "t"}})
    assert "model: 'a' there, 'b' now" in str(e.value) and "tokenizer" not in str(e.value)
    assert "another workdir" in str(e.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": 5}', "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_damaged(tmp_path, text):
    manifest = {"identity": {"model": "a"}}
    Checkpointer(tmp_path, manifest=manifest).close()
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="manifest.json") as e:
        Checkpointer(tmp_path, manifest=manifest)
    assert len(str(e.value)) < 1000


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot write to .*Choose a workdir"):
            Checkpointer(path)
    if os.path.isdir("/proc"):
        with pytest.raises(CheckpointError, match="cannot write to /proc"):
            check_writable("/proc")


def test_the_space_needed_is_compared_with_what_is_free(tmp_path, monkeypatch, caplog):
    state = {"params": {"w": jnp.ones(1 << 20)}, "opt": jnp.ones(1 << 20)}  # 8 MiB; 4 of a model
    free = [0]
    usage = lambda path: shutil._ntuple_diskusage(0, 0, int(free[0] * 2**20))  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with closing(Checkpointer(tmp_path, keep=2)) as ckpt:
        free[0] = 7.9
        with pytest.raises(CheckpointError, match=r"has 0.01 GB free, and a checkpoint of this"):
            ckpt.check_space(state, export=True)
        free[0] = 27.9  # three checkpoints at a time, and the export
        ckpt.check_space(state, export=True)
        assert "3 checkpoints of up to 0.01 GB" in caplog.text and "train.keep" in caplog.text
        caplog.clear()
        ckpt.check_space(state, export=False)
        free[0] = 28
        ckpt.check_space(state, export=True)
        ckpt.save(1, state)
        ckpt.wait()
        free[0] = 20  # one lies there already
        ckpt.check_space(state, export=True)
        assert not caplog.text
