"""A weight that is a node: a product of two factors, and int8 with scales, in place of an array.

Nothing of the model is told of it. The factors say for themselves how each verb is done; the other
node gives only its arrays' axes and the dense weight, and has the rest by default.
"""

import functools
import math
from contextlib import closing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import struct
from jax.sharding import PartitionSpec as P

import sftjax
from sftjax import config as config_lib
from sftjax import hf, losses, optim, parallel
from sftjax import params as params_lib
from sftjax.models import flops, layer
from sftjax.ops import embed, weight
from sftjax.parallel import gather
from sftjax.params import Param
from sftjax.training import build, checkpoint

RANK = 4


@struct.dataclass
class Product(weight.Node):
    """w = a @ b: a has the axes `left` of w, b those that follow, both what stands before."""

    a: Any
    b: Any
    left: tuple = struct.field(pytree_node=False)

    @classmethod
    def of(cls, p):
        table = p.axes[0] != "layers"
        left, rank = p.axes[:1] if table else p.inputs, ("rank",)
        first, last = (rank if p.inputs else None, p.inputs or rank) if table else (left, rank)
        node = cls(None, None, left)
        axes = node.leaf_axes(p.axes)
        sizes = dict(zip(p.axes, p.shape, strict=True)) | {"rank": RANK}

        def param(axes, inputs):
            init = jax.nn.initializers.normal(0.3)
            return Param(tuple(sizes[a] for a in axes), axes, init, inputs)

        return cls(param(axes.a, first), param(axes.b, last), left)

    def leaf_axes(self, axes):
        i = axes.index(self.left[0])
        j = i + len(self.left)
        return self.replace(a=(*axes[:j], "rank"), b=(*axes[:i], "rank", *axes[j:]))

    def dense(self, dtype):
        lead = self.a.ndim - 1 - len(self.left)
        a = self.a.reshape(*self.a.shape[:lead], -1, RANK)
        b = self.b.reshape(*self.b.shape[: lead + 1], -1)
        return (a @ b).reshape(*self.a.shape[:-1], *self.b.shape[lead + 1 :]).astype(dtype)

    def einsum(self, equation, x):
        of_x, of_w, of_y = equation.replace("->", ",").split(",")
        n = len(self.left)
        between = of_x.translate(dict.fromkeys(map(ord, of_w[:n]))) + "z"
        x = weight.einsum(f"{of_x},{of_w[:n]}z->{between}", x, self.a)
        return weight.einsum(f"{between},z{of_w[n:]}->{of_y}", x, self.b)

    def ragged(self, x, sizes):
        return weight.ragged(weight.ragged(x, self.a, sizes), self.b, sizes)

    def lookup(self, tokens, dtype):
        x = embed.lookup(self.a, tokens, ("vocab", "rank")).astype(dtype)
        return weight.einsum("bsr,rd->bsd", x, gather.for_use(self.b, ("rank", "embed"), dtype))

    def rows(self, index, dtype):
        return (self.a[index] @ self.b).astype(dtype)

    def as_head(self, h):
        return jnp.einsum("...d,rd->...r", h, self.b.astype(h.dtype)), self.a


@struct.dataclass
class Int8(weight.Node):
    """q * scale, one scale for each output."""

    q: Any
    scale: Any
    inputs: tuple = struct.field(pytree_node=False)

    @classmethod
    def of(cls, p):
        node = cls(None, None, p.inputs).leaf_axes(p.axes)
        sizes = [1 if a is None else n for a, n in zip(node.scale, p.shape, strict=True)]
        return node.replace(
            q=Param(p.shape, p.axes, lambda key, shape, _: jax.random.randint(key, shape, -9, 9)),
            scale=Param(tuple(sizes), node.scale, jax.nn.initializers.constant(0.02)),
        )

    def leaf_axes(self, axes):
        return self.replace(q=axes, scale=tuple(None if a in self.inputs else a for a in axes))

    def dense(self, dtype):
        return (self.q * self.scale).astype(dtype)


# What is a node: names of weights, changes of the model.
MOE = dict(experts=4, experts_per_token=2)
CASES = {
    "q": (r".*/q/w", {}),
    "mlp": (r".*/(up|down)/w", {}),
    "mlp in slices": (r".*/(up|down)/w", {"remat": "full"}),
    "experts": (r".*/(up|down)/w", MOE),
    "embedding": (r"embed/w", {}),
    "head": (r"head/w", {}),
    "tied": (r"embed/w", {"tied": True}),
    "everything": (r".*/w", {"layers": 2, "loops": 2, "learned_positions": True}),
}


def node_model(names, make=Product.of, **changes):
    source = hf.Origin("", {"model_type": "llama"}, {}, {})
    return sftjax.Model(tiny.model(**changes).config, source, nodes=((names, make),))


def plain(params):
    """The same parameters with the product in place of each node."""
    dense = lambda w: w.dense(jnp.float32) if weight.is_node(w) else w  # noqa: E731
    return jax.tree.map(dense, params, is_leaf=weight.is_node)


def loss(model, params, batch):
    return losses.causal_lm(model)(params, batch, None).sum


def close(found, expected, tolerance=1e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.any(b), "a gradient of nothing shows nothing"
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


# ---- one device ----------------------------------------------------------------------------


SLOW, LONG = pytest.mark.slow, pytest.mark.long
HOW = {"tied": (), "q": SLOW, "experts": SLOW, "mlp in slices": SLOW}  # the others are long


@pytest.mark.parametrize("case", [pytest.param(c, marks=HOW.get(c, LONG)) for c in CASES])
def test_a_product_is_the_dense_weight_forward_and_by_the_chain_rule(case, monkeypatch):
    names, changes = CASES[case]
    if case == "mlp in slices":
        monkeypatch.setattr(layer, "SLICE", 16)
    model, dense = node_model(names, **changes), tiny.model(**changes)
    assert layer.slices(model.config) == (4 if case == "mlp in slices" else 1)
    params, batch = tiny.params(model), tiny.batch(rows=2)
    assert any(map(weight.is_node, jax.tree.leaves(params, is_leaf=weight.is_node)))
    shapes = lambda tree: [w.shape for w in jax.tree.leaves(tree, is_leaf=weight.is_node)]  # noqa: E731
    assert shapes(params) == shapes(tiny.params(dense)), "a node says the weight's shape"
    close(model.apply(params, batch), dense.apply(plain(params), batch))
    found = jax.jit(jax.grad(functools.partial(loss, model)))(params, batch)
    expected = jax.jit(jax.grad(lambda p, b: loss(dense, plain(p), b)))(params, batch)
    close(found, expected)


def test_no_dense_weight_is_formed_where_the_node_knows_better():
    model = node_model(".*/(q|k|v|o|up|down|gate)/w|(embed|head)/w")
    params = params_lib.shapes(model.abstract)
    batch = {k: jnp.asarray(v) for k, v in tiny.batch(rows=3).items()}  # 96 tokens
    text = jax.jit(jax.grad(functools.partial(loss, model))).lower(params, batch).as_text()
    for shape in ("64x32", "32x64", "32x4x8", "4x8x32"):  # a table, matrices of a layer
        assert f"tensor<{shape}xf32>" not in text


@pytest.mark.slow
def test_decoding_reads_the_nodes_too():
    model, dense = node_model(".*/w"), tiny.model()
    params, batch = tiny.params(model), tiny.batch(rows=2, length=16)

    def run(model, params):
        cache = model.init_cache(2, 16)
        return model.logits(params, model.decode(params, cache, {"tokens": batch["tokens"]})[0])

    close(run(model, params), run(dense, plain(params)))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=SLOW),
        pytest.param({"remat": "full"}, marks=LONG),
        pytest.param(MOE, marks=LONG),
    ],
    ids=["dots", "slices", "experts"],
)
def test_the_defaults_alone_serve_a_frozen_quantised_weight(changes, monkeypatch):
    """On 8 devices; the integers are gathered as integers."""
    monkeypatch.setattr(layer, "SLICE", 16)
    model, dense = node_model(".*/(q|o|up|down|gate)/w", Int8.of, **changes), tiny.model(**changes)
    params, batch = tiny.params(model), tiny.batch()
    rules = ((".*/w/(q|scale)", False), (".*", True))
    on = params_lib.match_rules(rules, model.abstract, "trainable")
    params = params_lib.map_named(lambda name, x: x.astype(jnp.int8) if name.endswith("/w/q") else x, params)
    trained, frozen = params_lib.partition(params, on)

    def found(trained, frozen, batch):
        return loss(model, params_lib.combine(trained, frozen), batch)

    def expected(trained):
        return loss(dense, plain(params_lib.combine(trained, frozen)), batch)

    mesh = parallel.make_mesh({"fsdp": 4, "expert": 2} if "experts" in changes else {"fsdp": 8})
    with jax.set_mesh(mesh):
        layout = params_lib.partition(parallel.param_shardings(mesh, model.abstract), on)
        args = [jax.device_put(p, s) for p, s in zip((trained, frozen), layout, strict=True)]
        step = jax.jit(jax.value_and_grad(found)).lower(*args, parallel.put_batch(mesh, batch, 8))
        compiled = step.compile()
        assert " s8[" in compiled.as_text()
        value, grads = compiled(*args, parallel.put_batch(mesh, batch, 8))
    close((value, grads), jax.jit(jax.value_and_grad(expected))(trained))


# ---- rules, optimizer, FLOPs -----------------------------------------------------------------


def test_the_factors_are_parameters_of_their_own():
    model = node_model(".*/q/w|head/w", qkv_bias=True)
    named = params_lib.flatten(model.abstract)
    assert named["layers/0-3/attn/q/w/a"].shape == (4, 32, RANK)
    assert named["layers/0-3/attn/q/w/b"].axes == ("layers", "rank", "heads", "head_dim")
    assert "layers/0-3/attn/q/w" not in named and "layers/0-3/attn/k/w" in named
    assert model.replace(dtype="bfloat16").nodes == model.nodes
    c = config_lib.get_default().optim
    decay = params_lib.flatten(params_lib.match_rules(c.decay, model.abstract, "decay"))
    assert decay["layers/0-3/attn/q/w/a"] == decay["layers/0-3/attn/q/w/b"] == 1
    assert decay["layers/0-3/attn/q/b"] == decay["norm/scale"] == 0
    with pytest.raises(ValueError, match="nodes: rule '.*/qq/w' matches no parameter"):
        _ = node_model(".*/qq/w").abstract


@pytest.mark.slow
def test_muon_takes_the_factors_for_matrices_and_leaves_the_tables():
    model = node_model(".*/(q|up)/w|embed/w")
    params = tiny.params(model)
    on = jax.tree.map(lambda _: True, params)
    c = config_lib.get_default().optim
    c.name, c.clip = "muon", 0.0
    tx = optim.make(c, lambda _: 1.0, model.abstract, on)
    update, _ = tx.update(jax.tree.map(jnp.sin, params), tx.init(params), params)
    named = params_lib.flatten(update)
    for name, shape in [("attn/q/w/a", (32, 4)), ("attn/q/w/b", (4, 32)), ("mlp/up/w/b", (4, 64))]:
        x = np.asarray(named[f"layers/0-3/{name}"][0]).reshape(shape)
        values = np.linalg.svd(x, compute_uv=False) / (0.2 * math.sqrt(max(shape)))
        assert values.min() > 0.5 and values.max() < 1.4, name
    sizes = np.abs(named["embed/w/a"])
    np.testing.assert_allclose(sizes, sizes.max(), rtol=1e-2)  # Adam's first step


def test_model_flops_count_a_node_as_it_declares_itself():
    def flops_of(model, rules=((".*", True),), trained=0):
        on = params_lib.match_rules(rules, model.abstract, "trainable")
        of = flops.train_flops(model.config, on, model.abstract)
        return of(1, trained, lambda window: 0)

    dense = flops_of(tiny.model())
    q, factors = 32 * 32, 32 * RANK + RANK * 32
    assert flops_of(node_model(".*/q/w")) == dense - 6 * 4 * (q - factors)
    frozen = ((".*/q/w/.*", False), (".*", True))
    assert flops_of(node_model(".*/q/w"), frozen) == dense - 4 * (6 * q - 4 * factors)
    # A looked-up row is multiplied by b; the head's factors are two products of a trained token.
    assert flops_of(node_model("embed/w")) == dense + 6 * RANK * 32
    head = flops_of(tiny.model(), trained=1) - dense
    assert head == 6 * 64 * 32
    assert flops_of(node_model("head/w"), trained=1) == dense + 6 * (64 * RANK + RANK * 32)
    chosen = flops_of(tiny.model(**MOE)) - flops_of(node_model(".*/up/w", **MOE))
    assert chosen == 6 * 4 * 2 * (32 * 64 - (32 * RANK + RANK * 64))


# ---- a step on a mesh, checkpoints -----------------------------------------------------------


def first_state(model, rules, tx, mesh=None):
    """(state at step 0, on the mesh as `build` lays it out)."""
    on = params_lib.match_rules(rules, model.abstract, "trainable")
    state = sftjax.TrainState.create(params=tiny.params(model), tx=tx, trainable=on)
    if mesh is None:
        return state
    target = build.abstract_state(config_lib.get_default().model, model, on, tx, mesh)
    return jax.device_put(state, build.shardings_of(target))


def run(model, rules, tx, mesh=None):
    step = functools.partial(sftjax.train_step, loss_fn=losses.causal_lm(model), tx=tx)
    batch, state = tiny.batch(), first_state(model, rules, tx, mesh)
    if mesh is None:
        return jax.jit(step)(state, batch)
    with jax.set_mesh(mesh):
        layout = build.shardings_of(state), None
        return jax.jit(step, out_shardings=layout)(state, parallel.put_batch(mesh, batch, 8))


ONLY_NODES = ((".*/w/[ab]", True), (".*", False))


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({"fsdp": 8}, {}, marks=LONG),
        pytest.param({"data": 2, "fsdp": 2, "tensor": 2}, {}, marks=SLOW),
        pytest.param({"fsdp": 4, "context": 2}, {"tied": True}, marks=LONG),
        pytest.param({"data": 2, "fsdp": 2, "expert": 2}, MOE, marks=SLOW),
    ],
    ids=str,
)
def test_a_step_on_eight_devices_is_the_step_on_one(sizes, changes):
    model = node_model(r".*/(q|up|down)/w|(embed|head)/w", **changes)
    tx, mesh = optax.sgd(0.5, momentum=0.9), parallel.make_mesh(sizes)
    one, expected = run(model, ONLY_NODES, tx)
    many, found = run(model, ONLY_NODES, tx, mesh)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)
    close(many.params, one.params)
    q = many.params["layers"]["0-3"]["attn"]["q"]["w"]
    assert q.a.sharding.spec == P(None, "fsdp", None)
    assert q.b.sharding.spec == P(None, None, "tensor", None)
    moment = params_lib.flatten(many.opt_state)["0/trace/layers/0-3/attn/q/w/a"]
    assert moment.sharding == q.a.sharding


def test_only_the_factors_are_trained_and_the_rest_stays():
    model, tx = node_model(".*/(q|v)/w"), optax.sgd(0.5)
    before = first_state(model, ONLY_NODES, tx)
    after, _ = run(model, ONLY_NODES, tx)
    names = [f"layers/0-3/attn/{w}/w/{leaf}" for w in "qv" for leaf in "ab"]
    assert list(params_lib.flatten(after.params)) == names
    for name, x in params_lib.flatten(after.params).items():
        assert not np.allclose(x, params_lib.flatten(before.params)[name]), name
    for a, b in zip(jax.tree.leaves(after.frozen), jax.tree.leaves(before.frozen), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_checkpoint_holds_the_factors_and_comes_back_on_another_mesh(tmp_path):
    model, tx = node_model(".*/q/w|embed/w"), optax.adam(1e-2)
    mesh = parallel.make_mesh({"fsdp": 8})
    state, _ = run(model, ONLY_NODES, tx, mesh)
    on = params_lib.match_rules(ONLY_NODES, model.abstract, "trainable")
    other = parallel.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    target = build.abstract_state(config_lib.get_default().model, model, on, tx, other)
    with closing(checkpoint.Checkpointer(tmp_path)) as checkpoints:
        checkpoints.save(1, state)
        back, _ = checkpoints.restore(target)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert back.params["embed"]["w"].a.sharding.spec == P("tensor", None)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        if not jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(a, b)
