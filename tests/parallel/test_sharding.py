"""The mesh, its rules and its errors; which rows a process reads; what loading on a mesh costs."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import sftjax
from sftjax import hf as hf_lib
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.parallel import MeshError, batches, make_mesh
from sftjax.parallel import mesh as mesh_lib
from sftjax.params import Param

# ---- the mesh ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"fsdp": -1}, (1, 8, 1, 1, 1)),
        ({"data": -1, "tensor": 2}, (4, 1, 1, 2, 1)),
        ({"data": 2, "fsdp": 2, "context": 2}, (2, 2, 2, 1, 1)),
        ({"tensor": 8, "fsdp": -1}, (1, 1, 1, 8, 1)),
    ],
    ids=str,
)
def test_a_mesh_always_has_all_five_axes(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor", "expert")
    assert mesh.devices.shape == shape
    assert mesh.devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"fsdp": 3},
            "mesh data=1, fsdp=3, .* needs 3 devices, found 8; set .* product is 8, or one",
        ),
        ({"fsdp": -1, "tensor": 3}, "fsdp=-1, .*tensor=3.* needs a multiple of 3 devices, found 8"),
        ({"data": 2, "tensor": 2}, "needs 4 devices, found 8; set mesh"),
        ({"data": 16, "fsdp": -1}, "needs a multiple of 16 devices, found 8"),
        (
            {"model": 8},
            r"unknown mesh axis \['model'\]; the axes are data, fsdp, context, tensor, exp",
        ),
        (
            {"data": -1, "fsdp": -1},
            "data=-1, fsdp=-1.* sizes must be positive, and at most one .* -1",
        ),
        ({"data": 0, "fsdp": -1}, "data=0.* sizes must be positive"),
        ({"data": -2}, "data=-2.* sizes must be positive"),
    ],
    ids=str,
)
def test_meshes_that_cannot_be(sizes, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(sizes)


def fakes(slices, platform):
    """Devices of several slices, 2 x 2 chips each, in no helpful order."""
    devices = [
        types.SimpleNamespace(
            id=4 * s + i, slice_index=s, process_index=s, coords=(i % 2, i // 2, 0),
            core_on_chip=0, platform=platform, device_kind="TPU v5 lite",
        )
        for i in range(4)
        for s in range(slices)
    ]  # fmt: skip
    return devices if platform == "tpu" else sorted(devices, key=lambda d: d.id)


def test_only_the_data_axis_crosses_slices():
    devices = mesh_lib._arrange([4, 2, 1, 1, 1], fakes(2, "tpu"))
    assert devices.shape == (4, 2, 1, 1, 1)
    slices = np.vectorize(lambda d: d.slice_index)(devices).reshape(4, 2)
    assert slices.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert len({d.id for d in devices.ravel()}) == 8
    message = "mesh data=1 does not divide over 2 slices; only the data axis may cross slices"
    with pytest.raises(MeshError, match=message):
        mesh_lib._arrange([1, 8, 1, 1, 1], fakes(2, "tpu"))


def test_gpu_hosts_are_no_slices():
    """Each GPU host has a slice_index of its own, yet fsdp may span hosts."""
    devices = mesh_lib._arrange([1, 8, 1, 1, 1], fakes(2, "gpu"))
    assert [d.id for d in devices.ravel()] == list(range(8))


# ---- rules ---------------------------------------------------------------------------------


def test_logical_axes_become_mesh_axes():
    assert parallel.spec(("layers", "embed", "heads", "head_dim")) == P(None, "fsdp", "tensor", None)
    assert parallel.spec(("batch", "seq", None)) == P(("data", "fsdp", "expert"), "context", None)
    message = "logical axes 'heads' and 'mlp' of one array both map to mesh axis 'tensor'"
    with pytest.raises(MeshError, match=message):
        parallel.spec(("heads", "mlp"))
    with pytest.raises(MeshError, match="'batch' and 'embed' of one array both map to .* 'fsdp'"):
        parallel.spec(("batch", "embed"))
    with pytest.raises(MeshError, match="unknown logical axis 'haeds'; the table has batch, seq"):
        parallel.spec(("embed", "haeds"))


def test_every_parameter_of_a_model_has_a_layout():
    model = tiny.model(qkv_bias=True, out_bias=True, mlp_bias=True, tied=False)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    found = params_lib.flatten(parallel.param_shardings(mesh, model.abstract))
    assert found.keys() == params_lib.flatten(model.abstract).keys()
    assert found["embed/w"].spec == P("tensor", "fsdp")
    assert found["layers/0-3/attn/o/w"].spec == P(None, "tensor", None, "fsdp")
    assert found["norm/scale"].spec == P(None)


def test_a_parameter_that_does_not_divide_is_named():
    mesh = make_mesh({"tensor": 8})
    tree = {"head": {"w": Param((64, 16), ("vocab", "embed"))}}
    parallel.param_shardings(mesh, tree)
    tree["layers"] = {"0-3": {"k": {"w": Param((4, 16, 2, 8), ("layers", "embed", "kv_heads", None))}}}
    message = (
        "parameter layers/0-3/k/w: dimension kv_heads=2 does not divide over mesh axis tensor=8;"
        " choose a size of mesh.tensor that divides 2"
    )
    with pytest.raises(MeshError, match=message):
        parallel.param_shardings(mesh, tree)


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((8, 4))
    assert parallel.constrain(x, "batch", "seq") is x
    assert jax.jit(lambda x: parallel.constrain(x, "batch", "seq"))(x).sharding.is_fully_replicated
    mesh = make_mesh({"data": 4, "fsdp": 2})
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: parallel.constrain(x, "batch", None))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), None)), 2)


# ---- batches -------------------------------------------------------------------------------


def test_batches_that_do_not_divide():
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    parallel.check_batch(mesh, 16, 4, 32)
    with pytest.raises(MeshError, match="batch_size=16 does not divide into 3 micro-batches"):
        parallel.check_batch(mesh, 16, 3, 32)
    with pytest.raises(MeshError, match="batch_size=16 does not divide into 0 micro-batches"):
        parallel.check_batch(mesh, 16, 0, 32)
    message = (
        r"a micro-batch of 2 rows \(train.batch_size=16, micro_batches=8\) does not divide over"
        r" the 4 batch shards of the mesh \(data x fsdp x expert\)"
    )
    with pytest.raises(MeshError, match=message):
        parallel.check_batch(mesh, 16, 8, 32)
    with pytest.raises(MeshError, match="data.max_length=31 does not divide into twice mesh.cont"):
        parallel.check_batch(mesh, 16, 4, 31)


def test_a_single_process_reads_every_row():
    for sizes in ({"data": 8}, {"fsdp": 4, "tensor": 2}, {"context": 8}, {"expert": 8}):
        assert parallel.local_rows(make_mesh(sizes), 24) == list(range(24))


def test_put_batch_keeps_the_values_and_lays_out_rows():
    mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
    batch = tiny.batch(rows=8, length=32) | {"extra": np.arange(8), "image": np.ones((8, 4, 3))}
    placed = parallel.put_batch(mesh, batch, 8)
    assert placed.keys() == batch.keys()
    for key, value in batch.items():
        np.testing.assert_array_equal(placed[key], value)
    assert placed["tokens"].sharding.shard_shape((8, 32)) == (2, 16)
    assert placed["extra"].sharding.shard_shape((8,)) == (2,)


# ---- host memory while loading on a mesh ---------------------------------------------------

MEMORY = """
import json, sys
import jax, jax.numpy as jnp
import sftjax
from sftjax import params, parallel

def megabytes(key):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(key)) / 1024

mesh = parallel.make_mesh({"fsdp": 4, "tensor": 2}) if sys.argv[2] == "mesh" else None
jnp.ones(8).sum().block_until_ready()
before = megabytes("VmRSS")
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")  # the high-water mark starts here
_, tree = sftjax.load_pretrained(sys.argv[1], dtype=sys.argv[3], mesh=mesh)
peak = megabytes("VmHWM") - before
leaves = [x.nbytes / 2**20 for x in jax.tree.leaves(jax.block_until_ready(tree))]
print(json.dumps({"peak": peak, "own": sum(leaves), "largest": max(leaves)}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """About 200 MB in bf16; the largest tensor, the head, is read last."""
    path = tmp_path_factory.mktemp("large")
    config = dict(model_type="llama", vocab_size=28672, hidden_size=1024, num_hidden_layers=5)
    config |= dict(num_attention_heads=16, num_key_value_heads=8, intermediate_size=2048)
    (path / "config.json").write_text(json.dumps(config))
    model = hf_lib.load_model(path)
    block = np.random.default_rng(0).normal(size=1 << 20).astype(ml_dtypes.bfloat16)
    params = params_lib.map_named(lambda _, p: jnp.asarray(np.resize(block, p.shape)), model.abstract)
    sftjax.save_pretrained(path, model, params, max_shard_bytes=50 * 2**20)
    return path


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["one", "mesh"])
def test_loading_needs_its_own_shards_and_little_more_than_the_largest_tensor(large, where, dtype):
    """Peak resident memory <= own shards + 1.2 x the largest (stacked) parameter.

    What is counted: all resident pages, those of mapped files too, above what the process had
    after importing jax and running a small operation. On a CPU a device's memory is host memory,
    so the loaded parameters (own shards) are in the peak; what a TPU or GPU host would hold is the
    rest: the parameter in flight, and a block. The high-water mark is VmHWM, reset just before;
    ru_maxrss would begin with the parent's. glibc keeps freed blocks of up to 32 MB for itself once
    one was freed; the environment fixes that threshold, since a real model's blocks are larger.
    """
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    env["PYTHONPATH"] = str(Path(sftjax.__file__).parents[1])
    command = [sys.executable, "-c", MEMORY, str(large), where, dtype]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    m = json.loads(out.splitlines()[-1])
    size = sum(f.stat().st_size for f in large.glob("*.safetensors")) / 2**20
    assert size > 190 and m["own"] > size * (1.9 if dtype == "float32" else 0.99)
    assert m["own"] * 0.95 < m["peak"] < m["own"] + 1.2 * m["largest"], m


class Device(NamedTuple):
    id: int
    process_index: int


def test_local_rows_of_hosts_that_alternate_along_the_mesh(monkeypatch):
    """On a TPU slice the mesh order is not the order of hosts; each reads exactly its own rows."""
    mesh = make_mesh({"fsdp": 8})
    whole = parallel.named(mesh, "batch", None).devices_indices_map((16, 1))

    class Layout:  # as if every other device were another host's
        def devices_indices_map(self, shape):
            devices = enumerate(mesh.devices.reshape(-1))
            return {Device(n, process_index=n % 2): whole[d] for n, d in devices}

    monkeypatch.setattr(batches, "named", lambda *_: Layout())
    assert parallel.local_rows(mesh, 16) == [0, 1, 4, 5, 8, 9, 12, 13]
