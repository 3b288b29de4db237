"""The training step: pure functions to jit in a loop of your own.

One division, after all micro-batches and devices: loss = sum of weighted token losses / sum of weights over the whole
global batch. A micro-batch without a trained token adds exactly nothing.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec as P

from sftjax import parallel
from sftjax import params as params_lib
from sftjax.errors import ConfigError
from sftjax.ops import adam8

DATA = "data"  # the mesh axis whose shards hold all parameters and some of the rows


@struct.dataclass
class Loss:
    """What a loss function returns; sums add over micro-batches, hosts and evaluation batches.

    sum / weight is the loss. metrics: {name: (sum, weight)}; weight None: a plain sum, a count. state: the model's
    state after this batch (such as batch statistics), where it has one.
    """

    sum: jax.Array
    weight: jax.Array
    metrics: dict[str, tuple[jax.Array, jax.Array | None]] = struct.field(default_factory=dict)
    state: Any = None


@struct.dataclass
class TrainState:
    """Everything a step changes. params and frozen have one structure; see params.partition.

    model_state: what a model learns besides parameters, such as batch statistics, or None. A loss function then gets it
    as a fourth argument, and returns the new one as Loss(..., state=new).
    """

    step: jax.Array  # int32 scalar: optimizer steps taken
    params: Any  # trained leaves, None where frozen
    frozen: Any  # frozen leaves, None where trained
    opt_state: Any
    rng: jax.Array
    model_state: Any = None

    @classmethod
    def create(
        cls,
        *,
        params: Any,
        tx: optax.GradientTransformation,
        trainable: Any = ((".*", True),),
        rng: int | jax.Array = 0,
        model_state: Any = None,
    ) -> "TrainState":
        """A state at step 0.

        params: any pytree of arrays. tx: an optax transformation. trainable: ordered
        (regex, bool) rules over whole leaf names such as "layers/0-11/attn/q/w", or a tree of bools. rng: a seed or a
        JAX key. model_state: a pytree of arrays, or None. Raises ValueError for a rule that matches nothing.
        """
        pairs = trainable if isinstance(trainable, (tuple, list)) else [None]
        if all(isinstance(r, (tuple, list)) and isinstance(r[0], str) for r in pairs):
            trainable = params_lib.match_rules(trainable, params, "trainable")
        trained, frozen = params_lib.partition(params, trainable)
        if not jax.tree.leaves(trained):
            raise ConfigError("trainable: every parameter is frozen; nothing would be trained")
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=trained,
            frozen=frozen,
            opt_state=tx.init(adam8.wide(trained)),
            rng=jax.random.key(rng) if isinstance(rng, int) else rng,
            model_state=model_state,
        )

    @property
    def all_params(self) -> Any:
        """The whole parameter tree, as the model takes it."""
        return params_lib.combine(self.params, self.frozen)


def train_step(
    state: TrainState,
    batch: Any,
    *,
    loss_fn: Callable[..., Loss],
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step -> (new state, metrics).

    batch: a pytree of arrays with a leading batch dimension that micro_batches divides. loss_fn(params, batch, rng) ->
    Loss, or loss_fn(params, batch, rng, model_state) for a state with one. metrics: finished float32 scalars, still on
    the device: loss, grad_norm (before any clipping in tx), update_ratio (norm of the update / norm of the trained
    parameters), skipped, and every metric of loss_fn. Jit it with donate_argnums=0.

    Where the loss, the gradient or what the update makes of the parameters is not finite, the update is skipped: the
    new state is the old one at the next step, and metrics["skipped"] is 1.
    """
    rng = jax.random.fold_in(state.rng, state.step)

    def loss_and_grad(params, frozen, micro, rng, model_state):
        def objective(trained):
            whole = params_lib.combine(trained, frozen)
            loss = call(loss_fn, whole, micro, rng, model_state)
            return loss.sum.astype(jnp.float32), loss

        (_, loss), grads = jax.value_and_grad(objective, has_aux=True)(params)
        return (loss.replace(state=None), grads), loss.state

    work = functools.partial(_accumulate, loss_and_grad, micro_batches)
    if state.model_state is None:  # else a micro-batch's statistics are those of all its devices
        work = _sum_once(work, micro_batches)
    (loss, grads), model_state = work(state.params, state.frozen, batch, rng, state.model_state)
    grads = jax.tree.map(lambda g: _ratio(g, loss.weight.astype(g.dtype)), grads)
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(adam8.wide(grads), state.opt_state, adam8.wide(state.params))
        params = jax.tree.map(functools.partial(adam8.add, step=state.step), state.params, updates)
    value, norm = _ratio(loss.sum, loss.weight), optax.tree.norm(adam8.wide(grads))
    size, change = optax.tree.norm(adam8.wide(params)), optax.tree.norm(updates)
    # A norm is finite only if every one of its elements is.
    sound = jnp.isfinite(value + norm + size + change)
    for x in jax.tree.leaves(model_state):
        sound &= jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else True
    new = dict(params=params, opt_state=opt_state, model_state=model_state)
    old = {name: getattr(state, name) for name in new}
    new = jax.tree.map(functools.partial(jnp.where, sound), new, old)
    metrics = {
        "loss": value,
        "grad_norm": norm,
        "update_ratio": _ratio(change, size),
        "skipped": 1 - sound.astype(jnp.float32),
    }
    metrics |= {k: s if w is None else _ratio(s, w) for k, (s, w) in loss.metrics.items()}
    return dataclasses.replace(state, step=state.step + 1, **new), metrics


def eval_step(params: Any, batch: Any, *, loss_fn: Callable[..., Loss], model_state: Any = None) -> Loss:
    """The Loss of one batch, to be added up over batches; one division at the very end.

    loss_fn gets None for rng: nothing random, and no new state.
    """
    return call(loss_fn, params, batch, None, model_state)


def call(loss_fn: Callable[..., Loss], params: Any, batch: Any, rng: jax.Array | None, model_state: Any = None) -> Loss:
    """loss_fn's Loss; the model's state is an argument only where there is one.

    Raises: ValueError if it was given a state in training, and returns none.
    """
    if model_state is None:
        return loss_fn(params, batch, rng)
    loss = loss_fn(params, batch, rng, model_state)
    if rng is not None and loss.state is None:
        raise ValueError("the loss function was given model_state, but returned Loss.state=None")
    return loss


def _accumulate(fn, n, params, frozen, batch, rng, model_state):
    """(sum of the first results of fn over n micro-batches, one at a time; the last one's state).

    fn(params, frozen, micro_batch, rng, model_state) -> (a tree of sums, the new model_state).
    """
    if n == 1:
        return fn(params, frozen, batch, rng, model_state)

    def split(x):
        if x.shape[0] % n:
            raise ConfigError(f"a batch of {x.shape[0]} does not divide into {n} micro-batches")
        # Every n-th row, so that each device's rows stay on it.
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    micro = jax.tree.map(split, batch)
    rngs = jax.random.split(rng, n)
    first = jax.tree.map(lambda x: x[0], micro)
    shapes, _ = jax.eval_shape(fn, params, frozen, first, rngs[0], model_state)
    zero = adam8.wide(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))

    def body(carry, xs):
        total, model_state = carry
        new, model_state = fn(params, frozen, *xs, model_state)
        return (jax.tree.map(jnp.add, total, new), model_state), None

    return jax.lax.scan(body, (zero, model_state), (micro, rngs))[0]


def _sum_once(work, micro_batches):
    """`work` on each shard of the data axis, with one sum over it after all micro-batches.

    Left to the partitioner, every micro-batch's gradients would be summed over the axis.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if micro_batches == 1 or mesh.empty or mesh.shape.get(DATA, 1) == 1:
        return work

    def shard(params, frozen, batch, rng, model_state):
        rng = jax.random.fold_in(rng, jax.lax.axis_index(DATA))
        return jax.lax.psum(work(params, frozen, batch, rng, model_state), DATA)

    return parallel.shard_map(shard, (P(), P(), P(DATA), P(), P()), P(), axes={DATA})


def _ratio(a, b):
    """The quotient a / b, and exactly 0 where b is 0."""
    return jnp.where(b == 0, jnp.zeros_like(a), a / jnp.where(b == 0, 1, b))
