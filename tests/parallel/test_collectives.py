"""A compiled step sends over each kind of mesh what it has to, byte for byte, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec as P

import sftjax
from sftjax import parallel
from sftjax import params as params_lib
from sftjax.data.packing.pack import CAUSAL
from sftjax.ops import weight
from sftjax.plan import hlo

ROWS, LENGTH, F32 = 8, 32, 4
TOKENS = ROWS * LENGTH  # of a micro-batch; the loss takes them in one chunk
MODEL = tiny.model(remat="full")
ALL = F32 * params_lib.count(MODEL.abstract)
WEIGHTS = F32 * sum(  # those that fsdp keeps in parts and a layer gathers
    params_lib.count(p)
    for name, p in params_lib.flatten(MODEL.abstract).items()
    if name.startswith("layers/") and "embed" in p.axes
)
HIDDEN = TOKENS * MODEL.config.width * F32  # gathered by the loss, its gradient scattered
IDS = TOKENS * F32
SMALL = 6_000  # norms' gradients, sums of the loss and of the optimizer's norms


def collectives(sizes, micro=1):
    """{(kind, group size): bytes} of a training step, those of one micro-batch's rows times n."""
    mesh, tx = parallel.make_mesh(sizes), optax.sgd(0.1)
    loss_fn = sftjax.losses.causal_lm(MODEL)
    step = functools.partial(sftjax.train_step, loss_fn=loss_fn, tx=tx, micro_batches=micro)
    with jax.set_mesh(mesh):
        layout = parallel.param_shardings(mesh, MODEL.abstract)
        params = params_lib.shapes(MODEL.abstract, jnp.float32, layout)
        state = jax.eval_shape(lambda p: sftjax.TrainState.create(params=p, tx=tx), params)
        state = state.replace(params=params)
        batch = parallel.abstract_batch(mesh, CAUSAL.spec(ROWS * micro, LENGTH))
        out = (jax.tree.map(lambda x: x.sharding, state), None)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=out)
        cost = hlo.analyze(jitted.lower(state, batch).compile().as_text())
    assert all(loop.known for loop in cost.loops if "transpose" in loop.name and loop.trips > 1)
    return {k: c.bytes for k, c in cost.collectives.items()}


def test_fsdp_gathers_weights_twice_and_scatters_gradients_once():
    found = collectives({"fsdp": 8})
    # Of the loss: hidden states, targets, weights; of the embedding: tokens.
    assert found.pop(("all-gather", 8)) == 2 * WEIGHTS + HIDDEN + 3 * IDS
    # In two steps: all over 2 neighbours, then that half over the 4 others.
    assert found.pop(("reduce-scatter", 2)) == WEIGHTS
    assert found.pop(("reduce-scatter", 4)) == WEIGHTS / 2
    assert found.pop(("reduce-scatter", 8)) == HIDDEN
    # The tied head to its rows and back, in eighths; hidden states and back, by parts of width.
    table = F32 * params_lib.count(MODEL.abstract["embed"])
    head = F32 * params_lib.count(MODEL.abstract["head"])
    assert found.pop(("all-to-all", 8)) == pytest.approx(2 * (head + HIDDEN) / 8)
    assert table and found.pop(("all-reduce", 8)) < SMALL
    assert not found


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"data": 2, "fsdp": 4}])
@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")])
def test_a_scatter_gives_each_device_its_part_of_the_sum(sizes, axes):
    """The gradient of a gathered weight, of which each device makes another use."""

    def loss(w):
        def use(w):
            x = weight.gather_for_use(w, axes, w.dtype)
            return jnp.sum(jnp.sin(x) * (1 + jax.lax.axis_index("fsdp")))[None]

        split = ("data", "fsdp", "expert")
        rows = P(split)
        return parallel.shard_map(use, (parallel.part(axes, split),), rows, split)(w).sum()

    w = np.arange(64.0 * 32, dtype=np.float32).reshape(64, 32)
    with jax.set_mesh(parallel.make_mesh(sizes)):
        placed = jax.device_put(w, parallel.named(jax.sharding.get_mesh(), *axes))
        scattered = jax.jit(jax.grad(loss)).lower(placed).compile()
        assert "reduce-scatter(" in scattered.as_text()
        n = sizes["fsdp"]
        total = sizes.get("data", 1) * n * (n + 1) / 2  # of 1 + the place on fsdp
        expected = np.cos(w.astype(np.float64)) * total
        np.testing.assert_allclose(scattered(placed), expected, atol=1e-4)


@pytest.mark.parametrize("micro", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_data_sums_gradients_once_a_step_whatever_the_micro_batches(micro):
    found = collectives({"data": 8}, micro)
    assert ALL <= found.pop(("all-reduce", 8)) < ALL + 200
    assert not found


@pytest.mark.slow
def test_tensor_halves_what_fsdp_sends_and_gathers_nothing_itself():
    found = collectives({"tensor": 2, "fsdp": 4})
    assert found.pop(("all-gather", 4)) == 2 * WEIGHTS / 2 + HIDDEN + 3 * IDS
    assert found.pop(("reduce-scatter", 2)) == WEIGHTS / 2 * (1 + 1 / 2)  # 4 = 2 x 2
    assert found.pop(("reduce-scatter", 4)) == HIDDEN
    # Activations are summed after both halves of a layer, thrice with remat, and their gradients.
    assert found.pop(("all-reduce", 2)) < 12 * MODEL.config.layers * HIDDEN / 4
    assert not any(kind in ("all-gather", "reduce-scatter") for kind, _ in found)


@pytest.mark.slow
def test_context_gathers_keys_and_values_and_sums_gradients_in_their_parts():
    found = collectives({"context": 2, "fsdp": 4})
    kv = 2 * TOKENS // 4 * MODEL.config.kv_heads * MODEL.config.head_dim * F32
    layers = MODEL.config.layers
    # Forward, and again in the backward pass; their segments and positions once.
    assert found[("all-gather", 2)] == 2 * layers * kv + 2 * IDS / 4
    assert WEIGHTS / 4 <= found[("all-reduce", 2)] < WEIGHTS / 4 + SMALL
    assert found[("all-gather", 4)] == 2 * WEIGHTS + IDS / 2
    assert found[("reduce-scatter", 8)] == HIDDEN
