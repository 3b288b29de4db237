"""Small models with adapters, one step of them, and a config of a run."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

import sftjax
from sftjax import config as config_lib
from sftjax import hf, losses, parallel
from sftjax import params as params_lib
from sftjax.adapters import lora
from sftjax.training import build


def section(kind="lora", rank=4, **values):
    """The config's section `adapter`."""
    c = config_lib.get_default().adapter
    c.kind, c.rank, c.alpha = kind, rank, 8.0
    c.update(values)
    return c


def adapted(how, seed=0, quantize="", **changes):
    """(model, parameters, tree of what is trained) of a tiny Llama with adapters that have moved."""
    source = hf.Origin("", {"model_type": "llama"}, {}, {})
    base = sftjax.Model(tiny.model(**changes).config, source)
    model = lora.adapt(how, base, quantize)
    section = config_lib.get_default().model
    section.quantize = quantize
    kinds = build.dtypes(section, base, params_lib.map_named(lambda name, p: True, model.abstract))
    mesh = parallel.make_mesh({}, jax.devices()[:1])
    params = jax.device_get(lora.begun(model, tiny.params(base), kinds, mesh, seed))
    rules = lora.rules(((".*", True),), model)
    rng = np.random.default_rng(0)

    def moved(name, x):
        return x + rng.normal(0, 0.05, x.shape).astype(x.dtype) if name.endswith(("/a", "/b", "/magnitude")) else x

    return model, params_lib.map_named(moved, params), params_lib.match_rules(rules, model.abstract, "trainable")


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


def step(how, mesh=None, quantize="", **changes):
    """(state before, state after, metrics) of one step, on a mesh or without one."""
    model, params, trainable = adapted(how, quantize=quantize, **changes)
    tx = optax.sgd(0.5, momentum=0.9)  # Adam would make a step of the noise of a gradient that is 0
    state = sftjax.TrainState.create(params=params, tx=tx, trainable=trainable)
    run = functools.partial(sftjax.train_step, loss_fn=lora.seeded(losses.causal_lm(model)), tx=tx)
    if mesh is None:
        return state, *jax.jit(run)(state, tiny.batch())
    section = config_lib.get_default().model
    section.quantize = quantize
    target = build.abstract_state(section, model, trainable, tx, mesh)
    state = jax.device_put(state, build.shardings_of(target))
    with jax.set_mesh(mesh):
        done = jax.jit(run, out_shardings=(build.shardings_of(state), None))(
            state, parallel.put_batch(mesh, tiny.batch(), 8)
        )
    return state, *done


def config(files, kind="lora", **values):
    """A run of 6 steps on these files; values: by keys such as train__duration."""
    c = config_lib.get_default()
    c.model.path, c.model.dtype = str(files / "model"), "float32"
    c.data.train, c.data.validation = (str(files / f"{name}.jsonl") for name in ("train", "validation"))
    c.data.max_length, c.train.batch_size, c.eval.batch_size = 96, 8, 8
    c.train.duration, c.train.checkpoint_every, c.train.log_every = "6 steps", "3 steps", "1"
    c.train.tensorboard, c.optim.warmup, c.eval.every = False, "0", "0"
    c.adapter.kind, c.adapter.rank, c.adapter.dropout = kind, 4, 0.1
    for key, value in values.items():
        config_lib.override(c, key.replace("__", "."), str(value))
    return c


def losses_of(workdir):
    """{step: (loss, norm of the gradient, learning rate)} of a run."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {x["step"]: (x["loss"], x["grad_norm"], x["lr"]) for x in lines if "loss" in x}
