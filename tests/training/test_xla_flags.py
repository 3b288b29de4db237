"""The table of XLA's options: XLA knows them all, and the user's own stay."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sftjax import parallel
from sftjax.plan import hardware as targets
from sftjax.training import xla_flags


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    jax.devices()  # which reads the variables, among them how many devices the tests need
    for variable in xla_flags.VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    yield
    xla_flags.known.cache_clear()  # of tables that a test has changed


def compile_with(options, sharding=None):
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
    return jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()


@pytest.mark.parametrize("name", xla_flags.TABLE["gpu"])
def test_xla_knows_the_options_for_gpus(name):
    """Its options are the same on every platform but a TPU's, whichever reads them."""
    here, value = xla_flags.known("gpu")[name]
    compile_with({here: value})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with({name + "_not": True})


def test_what_xla_does_not_know_is_left_out_and_said(monkeypatch):
    """In a mesh too, whatever its devices: a run asks inside its own."""
    known = xla_flags.options("gpu")
    monkeypatch.setitem(xla_flags.TABLE, "gpu", {"xla_no_such": 7} | xla_flags.TABLE["gpu"])
    xla_flags.known.cache_clear()
    with jax.set_mesh(parallel.make_mesh({"fsdp": 8})):
        assert xla_flags.options("gpu") == known
        compile_with(xla_flags.options("gpu"))
    last = xla_flags.text("gpu").splitlines()[-1]
    assert last == "xla_no_such=7 is left out: this XLA does not know it"


def test_a_value_that_xla_does_not_take_is_no_unknown_option(monkeypatch):
    monkeypatch.setitem(xla_flags.TABLE, "gpu", {"xla_gpu_enable_latency_hiding_scheduler": "x"})
    xla_flags.known.cache_clear()
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_enable_latency_hiding_scheduler"):
        xla_flags.options("gpu")


@pytest.mark.tpu
def test_the_tpu_compiler_knows_its_options():
    device = targets.resolve("v5e:2x2").devices[0]
    here = jax.sharding.SingleDeviceSharding(device)
    for name, value in xla_flags.TABLE["tpu"].items():
        compile_with({name: value}, here)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compile_with({"xla_tpu_no_such_option": True}, here)


def test_a_cpu_sums_bfloat16_over_some_axes():
    """Without the table's option XLA ends the process here."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    total = jax.shard_map(
        lambda x: jax.lax.psum(x, "a"),
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P(),
        axis_names={"a"},
        check_vma=False,
    )
    x = jnp.arange(64, dtype=jnp.bfloat16).reshape(8, 8)
    out = jax.jit(total, compiler_options=xla_flags.options("cpu"))(x)
    assert jnp.array_equal(out, x.reshape(4, 2, 8).sum(0))


def test_what_the_user_set_stays_and_is_said(monkeypatch):
    name = "xla_gpu_enable_latency_hiding_scheduler"
    table = xla_flags.options("gpu")
    assert len(table) == len(xla_flags.TABLE["gpu"]) and "left out" not in xla_flags.text("gpu")
    assert f"{name}=true" in xla_flags.text("gpu").splitlines()
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x --{name}=false")
    assert xla_flags.options("gpu") == {k: v for k, v in table.items() if k != name}
    assert f"{name}=false is yours, and stays (here: true)" in xla_flags.text("gpu").splitlines()
    name = "xla_enable_async_all_gather"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{name}")
    assert set(xla_flags.TABLE["tpu"]) - set(xla_flags.options("tpu")) == {name}
    assert f"{name}=true is yours" in xla_flags.text("tpu")
    assert xla_flags.text("cpu") == "xla_disable_hlo_passes=all-reduce-promotion"


def test_an_option_is_yours_by_its_older_and_its_newer_name(monkeypatch):
    table, name = xla_flags.options("gpu"), "xla_gpu_enable_pipelined_all_gather"
    here, _ = xla_flags.known("gpu")[name]
    for yours in {name, here}:
        monkeypatch.setenv("XLA_FLAGS", f"--{yours}=off")
        assert xla_flags.options("gpu") == {k: v for k, v in table.items() if k != here}
        assert f"{yours}=off is yours, and stays (here: " in xla_flags.text("gpu")


def test_what_is_read_from_the_environment_alone_is_set_there(monkeypatch):
    xla_flags.settle()
    own = f"--{xla_flags.RACES}=false" if jax.__version_info__ < (0, 12) else ""
    assert os.environ.get("XLA_FLAGS", "") == own
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=/tmp/x --{xla_flags.RACES}=true")
    xla_flags.settle()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/tmp/x --{xla_flags.RACES}=true"


@pytest.mark.parametrize(("devices", "own", "threads"), [(1, None, None), (4, None, "64"), (4, "3", "3")])
def test_cpu_devices_have_threads_enough_for_their_collectives(monkeypatch, devices, own, threads):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_force_host_platform_device_count={devices}")
    monkeypatch.setenv(xla_flags.THREADS, own or "")
    if own is None:
        monkeypatch.delenv(xla_flags.THREADS)
    xla_flags.settle()
    assert os.environ.get(xla_flags.THREADS) == threads
