"""Weights of fewer bits: their numbers, what is kept of them, runs on such bases."""

import itertools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from adapted import adapted, close, config, losses_of, section, step
from safetensors.numpy import load_file
from scipy.stats import norm

from sftjax import config as config_lib
from sftjax import evaluate, losses, parallel
from sftjax import params as params_lib
from sftjax import train as train_lib
from sftjax.adapters import lora
from sftjax.errors import CheckpointError, ConfigError, MeshError
from sftjax.ops import quantized, weight
from sftjax.params import Param
from sftjax.training import build

SLOW = pytest.mark.slow
KINDS = ("nf4", "int4", "int8")
Q = Param((2, 128, 4, 6), ("layers", "embed", "heads", "head_dim"), inputs=("embed",))
OUT = Param((2, 4, 96, 10), ("layers", "heads", "head_dim", "embed"), inputs=("heads", "head_dim"))


def test_nf4_is_the_quantiles_of_a_normal_distribution():
    """As bitsandbytes makes its table: 8 quantiles above 0, 7 below, and 0."""
    tail = 0.9677083
    above, below = (norm.ppf(np.linspace(tail, 0.5, n)[:-1]) for n in (9, 8))
    table = np.sort([*-below, 0, *above])
    np.testing.assert_allclose(quantized.NF4, table / table.max(), atol=1e-6)


def reference(kind, w, p):
    """The weight as it is after it was held in fewer bits, in float64."""
    over = tuple(i for i, axis in enumerate(p.axes) if axis in p.inputs)
    if kind == "int8":
        top = np.abs(w).max(over, keepdims=True)
        return np.round(w / top * 127) * top / 127
    axis = over[-1]
    size = {128: 64, 96: 32}[w.shape[axis]]
    parts = np.moveaxis(w, axis, -1)
    parts = parts.reshape(*parts.shape[:-1], -1, size)
    top = np.abs(parts).max(-1, keepdims=True)
    table = np.array(quantized.NF4) if kind == "nf4" else np.arange(-7, 8) / 7
    values = table[np.abs(parts[..., None] / top[..., None] - table).argmin(-1)]
    top = np.moveaxis(top[..., 0], -1, axis)
    mean = top.mean(over, keepdims=True)
    span = np.abs(top - mean).max(over, keepdims=True)
    top = mean + np.round((top - mean) / span * 127) * span / 127
    values = np.moveaxis(values.reshape(*values.shape[:-2], -1), -1, axis)
    return values * np.repeat(top, size, axis)


@pytest.mark.parametrize("p", [Q, OUT], ids=["inputs first", "two of inputs"])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_those_of_float64(kind, p):
    w = np.random.default_rng(0).normal(0, 0.02, p.shape)
    node = jax.jit(quantized.Quantized.of(p, kind=kind).pack)(jnp.asarray(w, jnp.float32))
    assert node.codes.dtype == quantized.CODES[kind] and node.shape == p.shape
    np.testing.assert_allclose(node.dense(jnp.float32), reference(kind, w, p), atol=1e-7)
    error = np.sqrt(np.mean((np.asarray(node.dense(jnp.float32)) - w) ** 2)) / 0.02
    assert error < {"nf4": 0.1, "int4": 0.12, "int8": 0.01}[kind]
    zero = node.pack(jnp.zeros(p.shape))
    assert not np.asarray(zero.dense(jnp.float32)).any()


def test_a_number_takes_four_bits():
    big = Param((1, 1024, 1024), ("layers", "embed", "mlp"), inputs=("embed",))
    node = jax.eval_shape(quantized.Quantized.of(big, kind="nf4").pack, jax.ShapeDtypeStruct(big.shape, jnp.bfloat16))
    assert 8 * params_lib.nbytes(node) / 2**20 == pytest.approx(4 + 8 / 64 + 64 / 1024)
    read = jax.jit(lambda node: node.dense(jnp.bfloat16)).lower(node).compile().memory_analysis()
    assert read.argument_size_in_bytes == params_lib.nbytes(node)


@pytest.mark.parametrize("kind", [*KINDS, pytest.param("nf4 dora", marks=SLOW), pytest.param("nf4 pissa", marks=SLOW)])
def test_adapters_stand_on_codes(kind):
    """Values and gradients are those of the same adapters on the base that the codes stand for."""
    kind, of = (*kind.split(), "lora")[:2]
    model, params, trainable = adapted(section(of), quantize=kind)
    plain, _, _ = adapted(section(of))
    batch, loss = (
        tiny.batch(rows=2),
        lambda model: lambda t, f: losses.causal_lm(model)(params_lib.combine(t, f), batch, None).sum,
    )

    def whole(w):
        return w.replace(base=w.base.dense(jnp.float32)) if weight.is_node(w) else w

    same = jax.tree.map(whole, params, is_leaf=weight.is_node)
    on = params_lib.match_rules(lora.rules(((".*", True),), plain), plain.abstract, "trainable")
    for found, expected in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(loss(m)))(*params_lib.partition(p, t)))
            for m, p, t in ((model, params, trainable), (plain, same, on))
        ),
        strict=True,
    ):
        close(found, expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "none"])
def test_no_whole_weight_is_kept_for_the_backward_pass(remat):
    temporary, big = [], dict(width=128, heads=4, kv_heads=4, head_dim=32, mlp=512)
    for layers in (4, 8):
        model, params, trainable = adapted(section(), quantize="nf4", layers=layers, remat=remat, **big)

        def loss(trained, frozen, batch, model=model):
            return losses.causal_lm(model)(params_lib.combine(trained, frozen), batch, None).sum

        parts = params_lib.partition(params, trainable)
        memory = jax.jit(jax.grad(loss)).lower(*parts, tiny.batch(rows=1)).compile().memory_analysis()
        temporary.append(memory.temp_size_in_bytes)
    weights = 4 * (4 * 128 * 128 + 3 * 128 * 512) * 4  # of the four layers more
    assert temporary[1] - temporary[0] < (0.5 if remat == "dots" else 0.8) * weights  # less than one copy


@SLOW
@pytest.mark.parametrize(
    ("kind", "sizes", "changes"),
    [
        ("nf4", {"fsdp": 4, "tensor": 2}, {}),
        ("int8", {"data": 2, "fsdp": 2, "tensor": 2}, {}),
        ("int4", {"data": 2, "fsdp": 2, "expert": 2}, dict(experts=4, experts_per_token=2)),
    ],
    ids=str,
)
def test_eight_devices_are_one(kind, sizes, changes):
    changes = dict(mlp=128) | changes
    _, one, expected = step(section(), quantize=kind, **changes)
    _, many, found = step(section(), parallel.make_mesh(sizes), quantize=kind, **changes)
    for key in ("loss", "grad_norm"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5)
    close(many.params, one.params, 1e-4)


def test_what_does_not_go():
    tall = adapted(section(), quantize="nf4", mlp=192)[0].abstract["layers"]["0-3"]["mlp"]["down"]
    with pytest.raises(MeshError, match="w/base/absmax: dimension mlp=3 does not divide over mesh axis tensor=8"):
        parallel.param_shardings(parallel.make_mesh({"tensor": 8}), tall)
    c = config_lib.get_default()
    c.model.quantize = "nf3"
    with pytest.raises(ConfigError, match=r"model.quantize='nf3': expected '' \| nf4 \| int4 \| int8"):
        config_lib.check(c)
    p = Param((1, 64, 8), ("layers", "mlp", "embed"), inputs=("mlp",))
    node = quantized.Quantized.of(p, kind="nf4").pack(jnp.ones(p.shape))
    with pytest.raises(ConfigError, match="model.remat: 2 parts of mlp don't divide 1 blocks of model.quantize"):
        weight.cut({"w": node}, {"w": p.axes}, "mlp", 0, 2)
    with pytest.raises(ConfigError, match="model.quantize='int4' needs an even number of inputs"):
        quantized.Quantized.of(Param((1, 3, 8), p.axes, inputs=("mlp",)), kind="int4")


def test_a_base_that_is_trained_is_refused(files):
    for kind, rules in (("", ((".*", True),)), ("lora", ((".*mlp/up/w/.*", True), (".*", False)))):
        c = config(files, kind, model__quantize="nf4", adapter__targets="attention")
        c.optim.trainable = rules
        with pytest.raises(ConfigError, match="model.quantize='nf4': layers/0-1/.*/w has no gradient, and optim.train"):
            build.make_model(c, train_lib.tasks.make(c, train_lib.load_tokenizer(c)))


@SLOW
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_on_few_bits(kind, files, tmp_path):
    """It trains, and the export, in whole numbers, is worth what the run was; another base is refused."""
    c = config(files, model__quantize=kind, train__duration="4 steps", train__checkpoint_every="2 steps")
    result = train_lib.train(c, tmp_path / "run")
    assert result["after"]["losses"]["validation/loss"] < result["before"]["losses"]["validation/loss"]
    validation = str(files / "validation.jsonl")
    exported = config_lib.get_default()
    exported.model.path, exported.model.dtype, exported.data.max_length = str(tmp_path / "run/export"), "float32", 96
    for found in (evaluate.evaluate(exported, validation), evaluate.evaluate(c, validation, tmp_path / "run")):
        assert found["metrics"]["loss"] == pytest.approx(result["after"]["losses"]["validation/loss"], rel=1e-5)
    before, after = (load_file(x / "model.safetensors") for x in (files / "model", tmp_path / "run/export"))
    assert {k: x.dtype for k, x in before.items()} == {k: x.dtype for k, x in after.items()}
    curve = losses_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    train_lib.train(c, tmp_path / "run")
    assert losses_of(tmp_path / "run") == curve
    other = config(files, model__quantize="int4")
    with pytest.raises(CheckpointError, match="holds adapters of another base"):
        evaluate.evaluate(other, validation, tmp_path / "run")


def test_reading_makes_the_same_codes_layer_by_layer(files):
    """What is packed as it is read is what is packed of the whole weight."""
    c = config(files, model__quantize="nf4")
    model, trainable = build.make_model(c, train_lib.tasks.make(c, train_lib.load_tokenizer(c)))
    mesh = parallel.make_mesh({}, jax.devices()[:1])
    params, _ = build.make_params(c.model, model, trainable, mesh)
    plain = config(files, "")
    plain.adapter = config_lib.get_default().adapter
    whole_model, on = build.make_model(plain, train_lib.tasks.make(plain, train_lib.load_tokenizer(plain)))
    whole, _ = build.make_params(plain.model, whole_model, on, mesh)
    names = lora.packed(model)
    assert len(names) == 7
    for (name, node), w in itertools.product(names.items(), [params_lib.flatten(whole)]):
        expected = node.pack(w[name])
        found = lora.nodes_of(params)[name].base
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(np.asarray(a.astype(jnp.float32)), np.asarray(b.astype(jnp.float32)))


def test_what_few_bits_cost_is_measured_without_training(files):
    """An evaluation of a directory trains nothing, so no rule has to say so."""
    c = config(files, "", model__quantize="int8")
    c.adapter = config_lib.get_default().adapter
    plain = config(files, "")
    plain.adapter = c.adapter
    validation = str(files / "validation.jsonl")
    found, expected = (evaluate.evaluate(x, validation)["metrics"]["loss"] for x in (c, plain))
    assert found != expected and found == pytest.approx(expected, rel=0.01)


def test_a_model_without_such_layers_is_refused():
    how = config_lib.get_default().adapter
    bare = types.SimpleNamespace(abstract={"w": Param((2, 2), ("embed", "mlp"), inputs=("embed",))})
    with pytest.raises(ConfigError, match="model.quantize='nf4': the model has no linear layers in a stack"):
        lora.adapt(how, bare, "nf4")
