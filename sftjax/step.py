"""The training step: pure functions to jit in a loop of your own.

One division, after all micro-batches and devices: loss = sum of weighted token losses / sum of
weights over the whole global batch. A micro-batch without a trained token adds exactly nothing.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from sftjax import params as params_lib
from sftjax import sharding
from sftjax.errors import ConfigError

DATA = "data"  # the mesh axis whose shards hold all parameters and some of the rows


@struct.dataclass
class Loss:
    """What a loss function returns; sums add over micro-batches, hosts and evaluation batches.

    sum / weight is the loss. metrics: {name: (sum, weight)}; weight None: a plain sum, a count.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array]] = struct.field(default_factory=dict)


@struct.dataclass
class TrainState:
    """Everything a step changes. params and frozen have one structure; see params.partition."""

    step: jax.Array  # int32 scalar: optimizer steps taken
    params: Any  # trained leaves, None where frozen
    frozen: Any  # frozen leaves, None where trained
    opt_state: Any
    rng: jax.Array

    @classmethod
    def create(cls, *, params, tx, trainable=((".*", True),), rng=0):
        """A state at step 0.

        params: any pytree of arrays. tx: an optax transformation. trainable: ordered
        (regex, bool) rules over whole leaf names such as "layers/0-11/attn/q/w", or a tree of
        bools. rng: a seed or a JAX key. Raises ValueError for a rule that matches nothing.
        """
        if isinstance(trainable, (tuple, list)) and all(
            isinstance(r, (tuple, list)) and isinstance(r[0], str) for r in trainable
        ):
            trainable = params_lib.match_rules(trainable, params, "trainable")
        trained, frozen = params_lib.partition(params, trainable)
        if not jax.tree.leaves(trained):
            raise ConfigError("trainable: every parameter is frozen; nothing would be trained")
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=trained,
            frozen=frozen,
            opt_state=tx.init(trained),
            rng=jax.random.key(rng) if isinstance(rng, int) else rng,
        )

    @property
    def all_params(self):
        """The whole parameter tree, as the model takes it."""
        return params_lib.combine(self.params, self.frozen)


def train_step(state: TrainState, batch, *, loss_fn, tx, micro_batches: int = 1):
    """One optimizer step -> (new state, metrics).

    batch: a pytree of arrays with a leading batch dimension that micro_batches divides.
    loss_fn(params, batch, rng) -> Loss. metrics: finished float32 scalars, still on the device:
    loss, grad_norm (before any clipping in tx), update_ratio (norm of the update / norm of the
    trained parameters), every metric of loss_fn, and for a Batch with segments and weights:
    cells, tokens, trained_tokens. Jit it with donate_argnums=0.
    """
    rng = jax.random.fold_in(state.rng, state.step)

    def loss_and_grad(params, frozen, micro, rng):
        def objective(trained):
            loss = loss_fn(params_lib.combine(trained, frozen), micro, rng)
            return loss.sum.astype(jnp.float32), loss

        (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return loss, grads

    work = functools.partial(_accumulate, loss_and_grad, micro_batches)
    loss, grads = _sum_once(work, micro_batches)(state.params, state.frozen, batch, rng)
    grads = jax.tree.map(lambda g: _ratio(g, loss.weight.astype(g.dtype)), grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": _ratio(loss.sum, loss.weight),
        "grad_norm": optax.tree.norm(grads),
        "update_ratio": _ratio(optax.tree.norm(updates), optax.tree.norm(params)),
    }
    ratios = {k: s if w is None else _ratio(s, w) for k, (s, w) in loss.metrics.items()}
    metrics |= ratios | _counts(batch)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, metrics


def eval_step(params, batch, *, loss_fn) -> Loss:
    """The Loss of one batch, to be added up over batches; one division at the very end."""
    return loss_fn(params, batch, None)


def _accumulate(fn, n, params, frozen, batch, rng):
    """Sum of fn(params, frozen, micro_batch, rng) over n micro-batches, one at a time."""
    if n == 1:
        return fn(params, frozen, batch, rng)

    def split(x):
        if x.shape[0] % n:
            raise ConfigError(f"a batch of {x.shape[0]} does not divide into {n} micro-batches")
        # Every n-th row, so that each device's rows stay on it.
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    micro = jax.tree.map(split, batch)
    rngs = jax.random.split(rng, n)
    first = jax.tree.map(lambda x: x[0], micro)
    shapes = jax.eval_shape(fn, params, frozen, first, rngs[0])
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total, xs):
        return jax.tree.map(jnp.add, total, fn(params, frozen, *xs)), None

    return jax.lax.scan(body, zero, (micro, rngs))[0]


def _sum_once(work, micro_batches):
    """`work` on each shard of the data axis, with one sum over it after all micro-batches.

    Left to the partitioner, every micro-batch's gradients would be summed over the axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if micro_batches == 1 or mesh.empty or mesh.shape.get(DATA, 1) == 1:
        return work

    def shard(params, frozen, batch, rng):
        rng = jax.random.fold_in(rng, jax.lax.axis_index(DATA))
        return jax.lax.psum(work(params, frozen, batch, rng), DATA)

    return sharding.shard_map(shard, (P(), P(), P(DATA), P()), P(), axes={DATA})


def _ratio(a, b):
    """a / b, and exactly 0 where b is 0."""
    return jnp.where(b == 0, jnp.zeros_like(a), a / jnp.where(b == 0, 1, b))


def _counts(batch):
    if not (isinstance(batch, dict) and {"segments", "weights"} <= batch.keys()):
        return {}
    return {
        "cells": jnp.float32(batch["segments"].size),
        "tokens": jnp.sum(batch["segments"] > 0, dtype=jnp.float32),
        "trained_tokens": jnp.sum(batch["weights"] != 0, dtype=jnp.float32),
    }
