"""Checkpoints: what comes back is what was saved, on any mesh, after any kind of end."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sftjax.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    abstract_like,
    check_writable,
    files_sha256,
    make_manifest,
)


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
    extra = {"data": {"epoch": 1, "row": 2**40}, "bad": 2, "best": float("inf")}
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.save(3, state, extra)
        extra["bad"] = 99  # the copy was taken
        got, got_extra = ckpt.restore(abstract_like(state))
    assert_same(got, state)
    assert got_extra == {"data": {"epoch": 1, "row": 2**40}, "bad": 2, "best": float("inf")}
    draw = jax.random.normal(got.rng, (3,))
    assert np.array_equal(draw, jax.random.normal(state.rng, (3,)))


def test_key_of_another_generator_and_empty_leaf(tmp_path):
    state = {"rng": jax.random.key(1, impl="rbg"), "none": jnp.zeros((0, 4)), "x": jnp.ones(2)}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(0, state)
        got, _ = ckpt.restore(abstract_like(state))
    assert_same(got, state)


def test_donated_state_is_saved_as_it_was(tmp_path):
    bump = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((1024, 1024))
    with Checkpointer(tmp_path, keep=10) as ckpt:
        for step in range(5):
            ckpt.save(step, {"x": x})
            for _ in range(20):
                x = bump(x)
        for step in range(5):
            got, _ = ckpt.restore({"x": jax.ShapeDtypeStruct(x.shape, x.dtype)}, step)
            assert np.all(np.asarray(got["x"]) == 20 * step)


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
    with Checkpointer(tmp_path) as ckpt:
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


@pytest.mark.parametrize(
    "mode, losses, kept", [("min", [5, 1, 4, 3, 2], [1, 3, 4]), ("max", [1, 2, 3, 9, 4], [3, 4])]
)
def test_keeps_the_newest_and_the_best(tmp_path, mode, losses, kept):
    with Checkpointer(tmp_path, keep=2, best_metric="val/loss", best_mode=mode) as ckpt:
        for step, loss in enumerate(losses):
            ckpt.save(step, {"x": jnp.float32(step)}, {}, {"val/loss": loss, "other": 0})
        best = ckpt.best_step()
    assert ckpt.all_steps() == kept
    assert best == kept[0]


def test_the_best_outlives_a_resume_nan_and_saves_without_evaluation(tmp_path):
    def save(ckpt, step, metrics):
        ckpt.save(step, {"x": jnp.float32(step)}, {}, metrics)

    with Checkpointer(tmp_path, keep=1, best_metric="loss") as ckpt:
        save(ckpt, 0, {"loss": 2.0})
        save(ckpt, 1, {"loss": 1.0})
        save(ckpt, 2, {"loss": float("nan")})
    with Checkpointer(tmp_path, keep=1, best_metric="loss") as ckpt:
        assert ckpt.best_step() == 1
        save(ckpt, 3, None)
        save(ckpt, 4, {"loss": 3.0})
    assert ckpt.all_steps() == [1, 4]


def test_the_old_one_is_deleted_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    with Checkpointer(tmp_path, keep=1) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
        ckpt.wait()
        seen, delete = [], ckpt._manager._checkpoint_deleter.delete_steps
        monkeypatch.setattr(
            ckpt._manager._checkpoint_deleter,
            "delete_steps",
            lambda steps: (seen.append((steps, ckpt.all_steps())), delete(steps)),
        )
        ckpt.save(2, {"x": jnp.ones(3)})
    assert seen == [([1], [1, 2])]
    assert ckpt.all_steps() == [2]


def test_same_step_is_saved_once_and_an_earlier_one_refused(tmp_path):
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.save(4, {"x": jnp.ones(3)})
        assert not ckpt.save(4, {"x": jnp.ones(3)})
        with pytest.raises(CheckpointError, match="step 3 .* later step 4.*another workdir"):
            ckpt.save(3, {"x": jnp.ones(3)})


def test_incomplete_directories_are_ignored(tmp_path):
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(4, {"x": jnp.ones(3)})
    (tmp_path / "9.orbax-checkpoint-tmp-123" / "state").mkdir(parents=True)
    (tmp_path / "7" / "state").mkdir(parents=True)
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.latest_step() == 4
        ckpt.save(7, {"x": jnp.ones(3)})
        ckpt.wait()
        assert ckpt.all_steps() == [4, 7]


# ---- clear errors --------------------------------------------------------------------------


def test_a_target_that_does_not_fit_names_the_leaves(tmp_path):
    with Checkpointer(tmp_path) as ckpt:
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


def test_missing_step_bad_extra_and_bad_metric(tmp_path):
    with Checkpointer(tmp_path, best_metric="val/loss") as ckpt:
        with pytest.raises(FileNotFoundError, match="complete steps there: none"):
            ckpt.restore({})
        with pytest.raises(TypeError, match=r"extra\['rng'\].*not JSON serializable"):
            ckpt.save(1, {"x": jnp.ones(3)}, {"rng": np.ones(3)})
        with pytest.raises(CheckpointError, match=r"'val/loss' is not among.*\['val/los'\]"):
            ckpt.save(1, {"x": jnp.ones(3)}, {}, {"val/los": 1.0})
        ckpt.save(1, {"x": jnp.ones(3)})
        with pytest.raises(FileNotFoundError, match=r"of step 2 in .*: \[1\]"):
            ckpt.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}, 2)


def test_a_damaged_checkpoint_is_named(tmp_path):
    state = {"x": jnp.ones(3)}
    with Checkpointer(tmp_path) as ckpt:
        ckpt.save(1, state)
        ckpt.save(2, state)
        ckpt.wait()
        for f in (tmp_path / "2" / "state").rglob("*"):
            if f.is_file() and "ocdbt" in str(f):
                f.write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"2 cannot be read(.|\n)*other.*\[1\]"):
            ckpt.restore(abstract_like(state))
        assert_same(ckpt.restore(abstract_like(state), 1)[0], state)


def test_directory_of_another_run(tmp_path):
    first = make_manifest({"lr": 1}, {"model": "a", "tokenizer": "t"})
    with Checkpointer(tmp_path, manifest=first) as ckpt:
        ckpt.save(1, {"x": jnp.ones(3)})
        _, extra = ckpt.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)})
    assert extra["manifest"] == json.loads(json.dumps(first))
    # Settings outside the identity may change, such as the learning rate.
    Checkpointer(tmp_path, manifest=make_manifest({"lr": 2}, first["identity"])).close()
    with pytest.raises(CheckpointError) as e:
        Checkpointer(tmp_path, manifest=make_manifest({}, {"model": "b", "tokenizer": "t"}))
    assert "model: 'a' there, 'b' now" in str(e.value) and "tokenizer" not in str(e.value)
    assert "another workdir" in str(e.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"identity": 5}', "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_damaged(tmp_path, text):
    manifest = make_manifest({"lr": 1}, {"model": "a"})
    Checkpointer(tmp_path, manifest=manifest).close()
    (tmp_path / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="manifest.json") as e:
        Checkpointer(tmp_path, manifest=manifest)
    assert len(str(e.value)) < 1000


def test_files_sha256_follows_names_and_contents(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("1")
    b.write_text("2")
    one = files_sha256([a, b])
    assert one == files_sha256([b, a])
    b.write_text("3")
    assert one != files_sha256([a, b])


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match="cannot write to .*Choose a workdir"):
            Checkpointer(path)
    if os.path.isdir("/proc"):
        with pytest.raises(CheckpointError, match="cannot write to /proc"):
            check_writable("/proc")
    with pytest.raises(CheckpointError, match=r"GB free, 1000000000.00 GB are needed"):
        check_writable(tmp_path, need_bytes=10**18)


# ---- ends of every kind --------------------------------------------------------------------

FULL_DISK = """
import resource, signal, sys, time
import jax.numpy as jnp, numpy as np
from sftjax.training.checkpoint import Checkpointer, CheckpointError
noise = jnp.asarray(np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32))
ckpt = Checkpointer({path!r}, keep=1)
ckpt.save(1, {{"x": noise}})
ckpt.wait()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
ckpt.save(2, {{"x": noise + 1}})
try:
    {then}
except CheckpointError as e:
    print(e)
ckpt.close()
"""

ENDS = {
    "close": "ckpt.close()",
    "next save": 'ckpt.save(3, {"x": noise})',
    "check": "[(time.sleep(0.1), ckpt.check()) for _ in range(100)]",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_full_disk_is_reported_and_the_good_checkpoint_stays(tmp_path, end):
    # A limit on the size of files stands for a disk that fills while the save runs.
    done = run_python(FULL_DISK.format(path=str(tmp_path), then=ENDS[end]))
    assert "checkpoint of step 2" in done.stdout and "was not written" in done.stdout
    assert "newest complete one there is of step 1" in done.stdout
    with Checkpointer(tmp_path) as ckpt:
        assert ckpt.all_steps() == [1]
        got, _ = ckpt.restore({"x": jax.ShapeDtypeStruct((1024, 1024), jnp.float32)})
    assert np.array_equal(
        got["x"], np.random.default_rng(0).normal(size=(1024, 1024)).astype(np.float32)
    )


SAVE_FOREVER = """
import sys, itertools
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, make_state
ckpt = Checkpointer({path!r}, keep=2)
for step in itertools.count((ckpt.latest_step() or 0) + 1):
    ckpt.save(step, make_state(step), {{"row": step * 10}})
"""


def test_kill_9_leaves_complete_checkpoints(tmp_path):
    code = SAVE_FOREVER.format(tests=str(Path(__file__).parent), path=str(tmp_path))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    reached = 0
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", code], env=env)
        wait_for_step(tmp_path, reached + 3, process)
        time.sleep(random.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Checkpointer(tmp_path) as ckpt:
            reached, steps = ckpt.latest_step(), ckpt.all_steps()
            for step in steps:
                got, extra = ckpt.restore(abstract_like(make_state()), step)
                assert_same(got, make_state(step))
                assert extra == {"row": step * 10}


def wait_for_step(path, step, process, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if any(d.name.isdecimal() and int(d.name) >= step for d in path.iterdir()):
            return
        time.sleep(0.01)
    pytest.fail(f"no step {step} after {seconds} s; the saving process: {process.poll()}")


TWO_PROCESSES = """
import sys, jax
jax.distributed.initialize({address!r}, 2, int(sys.argv[1]))
sys.path.insert(0, {tests!r})
from test_checkpoint import Checkpointer, abstract_like, assert_same_here, make_state, make_manifest
assert jax.device_count() == 4 and jax.local_device_count() == 2
state = make_state(3, jax.devices(), (4,))
with Checkpointer({path!r}, keep=1, manifest=make_manifest({{}}, {{"model": "a"}})) as ckpt:
    ckpt.save(2, state, {{"row": 1}})
    ckpt.save(3, state, {{"row": 2}})
    ckpt.wait()
    target = abstract_like(make_state(0, jax.devices(), (2, 2)))
    got, extra = ckpt.restore(target)
    assert extra["row"] == 2 and ckpt.all_steps() == [3]
    assert_same_here(got, make_state(3, jax.devices(), (2, 2)))
print("same")
"""


def assert_same_here(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        for s, t in zip(x.addressable_shards, y.addressable_shards, strict=True):
            assert s.index == t.index and raw(s.data).tobytes() == raw(t.data).tobytes()


@pytest.mark.multiprocess
def test_two_processes_save_one_checkpoint_that_one_process_restores(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    code = TWO_PROCESSES.format(
        address=address, tests=str(Path(__file__).parent), path=str(tmp_path)
    )
    env = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(i)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.endswith("same\n"), err
    with Checkpointer(tmp_path) as ckpt:
        got, extra = ckpt.restore(abstract_like(make_state()))
    assert_same(got, make_state(3))
    assert extra["row"] == 2 and extra["manifest"]["identity"] == {"model": "a"}
